"""The command ``everlong bench``."""

from __future__ import annotations

from typing import Annotated

import typer

from everlong.cli.options import Json, write_json


def bench(
    items: Annotated[int, typer.Option(help="Number of items.")] = 10_000,
    seconds: Annotated[float, typer.Option(help="Duration of each measurement in seconds.")] = 1.0,
    to: Json = None,
) -> None:
    """Measures the events/s of an untrained LRU of default size on this machine."""
    from everlong.evaluation.speed import bench as measure

    result = measure(num_items=items, seconds=seconds)
    typer.echo(result.text())
    if to is not None:
        write_json(to, result.as_dict())
