"""``everlong data``: the audit of a log, and its event cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everlong.cli.options import ItemColumn, Log, TieRule, Ties, TimeColumn, UserColumn, open_log


def data_audit(
    log: Log,
    user_id: UserColumn = "user_id",
    item_id: ItemColumn = "item_id",
    timestamp: TimeColumn = "timestamp",
    ties: TieRule = Ties.STABLE,
    seed: Annotated[int, typer.Option(help="Of random ties.")] = 0,
) -> None:
    """Says what a log can and cannot show: lengths, ties, repeats, order of ids, gaps."""
    from everlong.data.audit import audit

    events = open_log(log, user_id, item_id, timestamp, ties.value, seed)
    for line in audit(events).lines():
        typer.echo(line)


def data_index(
    log: Log,
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    user_id: UserColumn = "user_id",
    item_id: ItemColumn = "item_id",
    timestamp: TimeColumn = "timestamp",
    ties: TieRule = Ties.STABLE,
    seed: Annotated[int, typer.Option(help="Of random ties.")] = 0,
) -> None:
    """Parses a log once into memory-mapped arrays, which every command accepts as a LOG."""
    from everlong.data.event_cache import write_index
    from everlong.data.events import read_events

    events = read_events(
        log,
        user_id=user_id,
        item_id=item_id,
        timestamp=timestamp or None,
        ties=ties.value,
        seed=seed,
    )
    write_index(events, folder)
    typer.echo(
        f"{folder}: {events.num_events:,} events of {events.num_users:,} users on "
        f"{events.num_items:,} items"
    )
