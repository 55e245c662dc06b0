"""``everlong serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everlong.cli.options import ModelDir


def serve(
    model: ModelDir,
    data_dir: Annotated[Path, typer.Option(help="Where events and states are kept.")],
    host: Annotated[str, typer.Option(help="Address; one that others reach needs keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0 takes a free one.")] = 8_000,
    keys: Annotated[
        Path | None, typer.Option(help="JSON list of API keys: name, sha256, scopes.")
    ] = None,
    shards: Annotated[int, typer.Option(min=1, max=1_024, help="Of a new data folder.")] = 1,
    drain: Annotated[
        float, typer.Option(min=0, help="Seconds of refused readiness before the end.")
    ] = 0.0,
    verify: Annotated[
        bool, typer.Option(help="Whether another process reads the whole log after the start.")
    ] = True,
) -> None:
    """Takes events and answers requests over HTTP until it is stopped."""
    from everlong.server.http.run import run_service

    run_service(
        model,
        data_dir,
        host=host,
        port=port,
        keys=keys,
        shards=shards,
        drain=drain,
        verify=verify,
        say=typer.echo,
    )
