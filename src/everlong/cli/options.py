"""Options that several commands share, and functions for their values."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from everlong.data.events import Events
    from everlong.recommender.recommender import Recommender


class Ties(StrEnum):
    """The order of a user's events with equal timestamps."""

    STABLE = "stable"
    RANDOM = "random"


Log = Annotated[
    list[Path], typer.Argument(help="The log: .csv, .tsv or .parquet files, or an event cache.")
]
ModelDir = Annotated[Path, typer.Argument(help="A model folder, as fit writes it.")]
UserColumn = Annotated[str, typer.Option("--user-id", help="Column of user ids.")]
ItemColumn = Annotated[str, typer.Option("--item-id", help="Column of item ids.")]
TimeColumn = Annotated[
    str, typer.Option("--timestamp", help="Column of timestamps; '' if rows are in order already.")
]
TieRule = Annotated[
    Ties, typer.Option("--ties", help="Order of a user's events with equal timestamps.")
]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
Allow = Annotated[
    list[str] | None,
    typer.Option(help="A custom model that may be loaded, package.module:Class; may be repeated."),
]
Device = Annotated[str, typer.Option(help="The device of the model: cpu, cuda, cuda:1, ...")]


def pairs(option: str, texts: Sequence[str] | None) -> dict[str, str | None]:
    """Parses ``name=value`` options; the value ``none`` is None.

    Raises:
        ValueError: if a text has another form, or a name is repeated.
    """
    settings: dict[str, str | None] = {}
    for text in texts or []:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not name or not equals:
            raise ValueError(f"{option}: expected name=value, received {text!r}")
        if name in settings:
            raise ValueError(f"{option} {name}: expected one value, received two; give it once")
        settings[name] = None if value == "none" else value
    return settings


def write_json(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Writes a result as JSON, atomically."""
    from everlong.system.atomic import write_bytes

    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, (json.dumps(value, indent=2, default=str) + "\n").encode())


def open_log(
    log: Sequence[Path],
    user_id: str,
    item_id: str,
    timestamp: str,
    ties: Literal["stable", "random"],
    seed: int,
    fields: Sequence[str] = (),
) -> Events:
    from everlong.data.event_cache import open_events

    return open_events(
        log,
        user_id=user_id,
        item_id=item_id,
        timestamp=timestamp or None,
        fields=fields,
        ties=ties,
        seed=seed,
    )


def load_model(folder: Path, device: str, allow: Sequence[str] | None) -> Recommender:
    from everlong.recommender.recommender import load

    return load(folder, models=own_models(allow), device=device)


def own_models(names: Sequence[str] | None) -> Sequence[str]:
    """Import paths of custom models; adds the current folder to the module search path."""
    here = str(Path.cwd())
    if any(":" in name for name in names or ()) and here not in sys.path:
        sys.path.insert(0, here)
    return names or ()
