"""``everlong demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Where the model and the pictures go.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of the log and of training.")] = 0,
) -> None:
    """Shows the whole path on a made-up log whose best possible score is known."""
    from everlong.cli.runs.demo import DEMO, run_demo

    run_demo(DEMO, out, seed=seed, say=typer.echo)
