"""``everlong upgrade``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from everlong.system.formats import Upgraded


def upgrade(
    path: Annotated[
        Path,
        typer.Argument(
            help="A model folder, a data folder, a folder with a checkpoint, an event cache, an "
            "item table, or a cache of vectors."
        ),
    ],
) -> None:
    """Rewrites what an earlier version stored as this version stores it: all of it, or nothing."""
    for kind, before, after in _upgrade_of(path)(path):
        if before == after:
            typer.echo(f"{path}: {kind} of version {before}: nothing to do")
        else:
            typer.echo(f"{path}: {kind} of version {before}: now {after}")


def _upgrade_of(path: Path) -> Callable[[Path], Sequence[Upgraded]]:
    """What brings a path up, by the files that are there."""
    if path.is_file():
        from everlong.text.vector_cache import is_vector_cache, upgrade_vector_cache

        if is_vector_cache(path):
            return lambda found: [upgrade_vector_cache(found)]
        raise ValueError(
            f"{path}: expected a cache of vectors, or the folder of anything else; name the folder "
            "that this file lies in"
        )
    if not path.is_dir():
        raise FileNotFoundError(f"nothing at {path}; check the path")
    for name, choose in _FOLDERS.items():
        if any(path.glob(name)):
            return choose()
    raise ValueError(
        f"{path}: expected a folder with one of {', '.join(_FOLDERS)}, found none of them; name "
        "the folder itself, not the one above it"
    )


def _data_folder() -> Callable[[Path], Sequence[Upgraded]]:
    from everlong.server.store.data_folder import upgrade_data_folder

    return upgrade_data_folder


def _model_folder() -> Callable[[Path], Sequence[Upgraded]]:
    from everlong.recommender.folder import upgrade_folder

    return lambda path: [upgrade_folder(path)]


def _checkpoint() -> Callable[[Path], Sequence[Upgraded]]:
    from everlong.training.checkpoint import upgrade_checkpoint

    return lambda path: [upgrade_checkpoint(path)]


def _event_cache() -> Callable[[Path], Sequence[Upgraded]]:
    from everlong.data.event_cache import upgrade_event_cache

    return lambda path: [upgrade_event_cache(path)]


def _items() -> Callable[[Path], Sequence[Upgraded]]:
    from everlong.data.items import upgrade_items

    return lambda path: [upgrade_items(path)]


_FOLDERS = {
    "service.json": _data_folder,
    "shard-*.sqlite": _data_folder,
    "config.json": _model_folder,
    "checkpoint.safetensors": _checkpoint,
    "index.json": _event_cache,
    "items.json": _items,
}
"""A file by which a folder is known, and what is in such a folder; imported when it is needed."""
