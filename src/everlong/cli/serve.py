"""The command ``everlong serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everlong.cli.options import Allow, ModelDir, own_models


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
    allow: Allow = None,
) -> None:
    """Runs the HTTP server, which ingests events and answers requests, until it is stopped."""
    from everlong.models.registry import load_model_class
    from everlong.server.http.run import run_service

    # also for model folders that the service is given later
    for name in own_models(allow):
        load_model_class(name, None)
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
