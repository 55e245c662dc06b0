"""Options that several commands have, and what they stand for."""

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
    """The order of events of one user at one time."""

    STABLE = "stable"
    RANDOM = "random"


Log = Annotated[
    list[Path], typer.Argument(help="The log: .csv, .tsv or .parquet files, or an index folder.")
]
ModelDir = Annotated[Path, typer.Argument(help="A model folder, as fit writes it.")]
UserColumn = Annotated[str, typer.Option("--user-id", help="Column of user ids.")]
ItemColumn = Annotated[str, typer.Option("--item-id", help="Column of item ids.")]
TimeColumn = Annotated[
    str, typer.Option("--timestamp", help="Column of times; '' if the rows are in order already.")
]
TieRule = Annotated[Ties, typer.Option("--ties", help="Order of events of one user at one time.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
Allow = Annotated[
    list[str] | None,
    typer.Option(
        help="A model of your own that the folder may be of, package.module:Class; may be repeated."
    ),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]


def pairs(option: str, texts: Sequence[str] | None) -> dict[str, str | None]:
    """Settings from ``name=value`` texts; the value ``none`` is None.

    Raises:
        ValueError: if a text is not of that form, or a name comes twice.
    """
    settings: dict[str, str | None] = {}
    for text in texts or []:
        name, equals, value = (piece.strip() for piece in text.partition("="))
        if not name or not equals:
            raise ValueError(f"{option} takes name=value, received {text!r}")
        if name in settings:
            raise ValueError(f"{option} {name} was given twice; give it once")
        settings[name] = None if value == "none" else value
    return settings


def write_json(path: Path, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Writes a result as JSON, whole or not at all."""
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
) -> Events:
    from everlong.data.event_cache import open_events

    return open_events(
        log,
        user_id=user_id,
        item_id=item_id,
        timestamp=timestamp or None,
        ties=ties,
        seed=seed,
    )


def load_model(folder: Path, device: str, allow: Sequence[str] | None) -> Recommender:
    from everlong.recommender.recommender import load

    return load(folder, models=own_models(allow), device=device)


def own_models(names: Sequence[str] | None) -> Sequence[str]:
    """Models that the command line names; import paths are also looked for where it runs."""
    here = str(Path.cwd())
    if any(":" in name for name in names or ()) and here not in sys.path:
        sys.path.insert(0, here)
    return names or ()
