"""The command ``everlong data``: audits a log, or writes its event cache."""

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
    seed: Annotated[int, typer.Option(help="Random seed of ties.")] = 0,
) -> None:
    """Audits a log: history lengths, tied timestamps, repeats, order of ids, time gaps."""
    from everlong.data.audit import audit

    events = open_log(log, user_id, item_id, timestamp, ties.value, seed)
    for line in audit(events).lines():
        typer.echo(line)


def data_cache(
    log: Log,
    folder: Annotated[Path, typer.Argument(help="The new folder of the event cache.")],
    user_id: UserColumn = "user_id",
    item_id: ItemColumn = "item_id",
    timestamp: TimeColumn = "timestamp",
    ties: TieRule = Ties.STABLE,
    seed: Annotated[int, typer.Option(help="Random seed of ties.")] = 0,
) -> None:
    """Parses a log into an event cache: memory-mapped arrays that every command accepts as LOG."""
    from everlong.data.event_cache import write_event_cache
    from everlong.data.events import read_events

    events = read_events(
        log,
        user_id=user_id,
        item_id=item_id,
        timestamp=timestamp or None,
        ties=ties.value,
        seed=seed,
    )
    write_event_cache(events, folder)
    typer.echo(
        f"{folder}: {events.num_events:,} events of {events.num_users:,} users on "
        f"{events.num_items:,} items"
    )
