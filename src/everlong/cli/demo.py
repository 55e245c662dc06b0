"""The command ``everlong demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="The folder for the model and the plots.")] = Path(
        "demo"
    ),
    seed: Annotated[int, typer.Option(help="Random seed of the log and of training.")] = 0,
) -> None:
    """Trains, evaluates and updates a model on a synthetic log with a known best score."""
    from everlong.cli.runs.demo import DEMO, run_demo

    run_demo(DEMO, out, seed=seed, say=typer.echo)
