"""The command ``everlong verify``."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

DAMAGED = 3
"""The exit code for a damaged event log."""


def verify_log(
    data_dir: Annotated[
        Path, typer.Argument(help="A data folder of a server, running or stopped.")
    ],
) -> None:
    """Reads the event log of a server and verifies the checksum of each event."""
    from everlong.server.store.log import DamagedError
    from everlong.server.store.sqlite_log import SqliteReader

    paths = sorted(data_dir.glob("shard-*.sqlite"))
    if not paths:
        raise ValueError(
            f"{data_dir}: expected shard-*.sqlite as a service writes them, found none"
        )
    for path in paths:
        try:
            with closing(SqliteReader(path)) as log:
                typer.echo(f"{path.name}: {log.verify():,} events as they were written")
        except DamagedError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(DAMAGED) from error
