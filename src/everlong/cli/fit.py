"""The command ``everlong fit``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everlong.cli.options import (
    Device,
    ItemColumn,
    Log,
    TieRule,
    Ties,
    TimeColumn,
    UserColumn,
    open_log,
    own_models,
    pairs,
)

if TYPE_CHECKING:
    from everlong.data.ids import IdMap
    from everlong.data.items import ItemTable


def fit(
    log: Log,
    out: Annotated[
        Path, typer.Option(help="The model folder; checkpoints go to a folder beside it, OUT.run.")
    ],
    model: Annotated[
        str, typer.Option(help="A built-in model, or one of your own: package.module:Class.")
    ] = "lru",
    protocol: Annotated[
        str | None, typer.Option(help="paper or temporal; by default as the log allows.")
    ] = None,
    architecture: Annotated[
        list[str] | None, typer.Option("--set", help="Setting of the model, such as dim=64.")
    ] = None,
    training: Annotated[
        list[str] | None, typer.Option("--train", help="Setting of training, such as epochs=20.")
    ] = None,
    split: Annotated[
        list[str] | None, typer.Option("--split", help="Setting of the protocol: window=50.")
    ] = None,
    items: Annotated[
        Path | None,
        typer.Option(help="What items have besides ids: a .parquet file with a row for each."),
    ] = None,
    vectors: Annotated[
        list[str] | None,
        typer.Option(help="Column of item vectors in --items; may be repeated."),
    ] = None,
    user_id: UserColumn = "user_id",
    item_id: ItemColumn = "item_id",
    timestamp: TimeColumn = "timestamp",
    ties: TieRule = Ties.STABLE,
    seed: Annotated[int, typer.Option(help="Random seed of ties, weights and training.")] = 0,
    device: Device = "cpu",
    resume: Annotated[bool, typer.Option(help="Continue an interrupted fit.")] = False,
    baselines: Annotated[bool, typer.Option(help="Also measure cheap baselines.")] = False,
) -> None:
    """Trains and tests a model, encodes all histories and saves the model folder.

    The folder OUT.run contains a checkpoint during training, the training log (train.jsonl) and
    plots. After Ctrl-C or a crash, the same command with --resume continues and ends with the same
    bits.
    """
    from everlong.cli.runs.fit import FitPlan, run_fit

    run_fit(
        FitPlan(
            model=own_models([model])[0],
            out=out,
            protocol=protocol,
            split=pairs("--split", split),
            architecture=pairs("--set", architecture),
            training={"seed": str(seed), **pairs("--train", training)},
            device=device,
            resume=resume,
            baselines=baselines,
        ),
        lambda: open_log(log, user_id, item_id, timestamp, ties.value, seed),
        item_reader(items, item_id, vectors or []),
        say=typer.echo,
    )


def item_reader(
    path: Path | None, item_id: str, vectors: Sequence[str]
) -> Callable[[IdMap], ItemTable] | None:
    """The function that reads item vectors for the items of a log; None without ``--items``.

    Raises:
        ValueError: if only one of ``--items`` and ``--vectors`` is given.
        FileNotFoundError: if the file does not exist.
    """
    if path is None and not vectors:
        return None
    if path is None or not vectors:
        raise ValueError(
            "--items and --vectors go together: expected a file and the names of its vector "
            f"columns, received --items {path}, --vectors {', '.join(vectors) or None}"
        )
    if not path.exists():
        raise FileNotFoundError(f"--items: no file at {path}; check the path")

    def read(item_ids: IdMap) -> ItemTable:
        from everlong.data.items import read_items

        return read_items(path, item_ids, item_id=item_id, vectors=vectors)

    return read
