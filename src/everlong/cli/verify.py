"""``everlong verify``."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

DAMAGED = 3
"""Exit code of a log that is not what was written."""


def verify_log(
    data_dir: Annotated[Path, typer.Argument(help="A data folder of the service, in use or not.")],
) -> None:
    """Reads every event that a service keeps and checks that it is what was written."""
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
