"""``everlong bench``."""

from __future__ import annotations

from typing import Annotated

import typer

from everlong.cli.options import Json, write_json


def bench(
    items: Annotated[int, typer.Option(help="Size of the catalogue.")] = 10_000,
    seconds: Annotated[float, typer.Option(help="Length of each measurement.")] = 1.0,
    to: Json = None,
) -> None:
    """Measures how fast this machine reads events with a fresh LRU of default size."""
    from everlong.evaluation.speed import bench as measure

    result = measure(num_items=items, seconds=seconds)
    typer.echo(result.text())
    if to is not None:
        write_json(to, result.as_dict())
