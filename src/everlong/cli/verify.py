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
    forget_states: Annotated[
        bool,
        typer.Option(
            "--forget-states",
            help="Also delete the stored states; the next start builds them from the log.",
        ),
    ] = False,
) -> None:
    """Verifies the checksums of all events of a server, and its states against them."""
    from everlong.server.store.data_folder import lock_folder, shard_paths
    from everlong.server.store.log import DamagedError
    from everlong.server.store.sqlite_log import SqliteLog, SqliteReader
    from everlong.server.store.verify import forget_states as forget
    from everlong.server.store.verify import verify_states

    paths = shard_paths(data_dir)
    if not paths:
        raise ValueError(
            f"{data_dir}: expected shard-*.sqlite as a service writes them, found none"
        )
    for path in paths:
        try:
            with closing(SqliteReader(path)) as log:
                typer.echo(f"{path.name}: {log.verify():,} events as they were written")
                if not forget_states:
                    typer.echo(f"{path.name}: {verify_states(log):,} states of these events")
        except DamagedError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(DAMAGED) from error
    if forget_states:
        with lock_folder(data_dir):
            for path in paths:
                with closing(SqliteLog(path, new=False)) as log:
                    forget(log)
                typer.echo(f"{path.name}: states deleted")
