"""The command ``everlong fit``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everlong.cli.options import (
    Allow,
    Device,
    ItemColumn,
    Log,
    TieRule,
    Ties,
    TimeColumn,
    UserColumn,
    load_model,
    open_log,
    own_models,
    pairs,
)

if TYPE_CHECKING:
    from everlong.data.ids import IdMap
    from everlong.data.items import ItemTable


class Task(StrEnum):
    """What a model learns."""

    NEXT_ITEM = "next-item"
    RANK = "rank"


DEFAULT_MODEL = {Task.NEXT_ITEM: "lru", Task.RANK: "ifa"}


def fit(
    log: Log,
    out: Annotated[
        Path, typer.Option(help="The model folder; checkpoints go to a folder beside it, OUT.run.")
    ],
    task: Annotated[Task, typer.Option(help="What to learn: the next item, or to rank.")] = (
        Task.NEXT_ITEM
    ),
    model: Annotated[
        str | None,
        typer.Option(
            help="A built-in model, or one of your own: package.module:Class. [default: lru; to "
            "rank, ifa]"
        ),
    ] = None,
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
    categories: Annotated[
        list[str] | None,
        typer.Option(help="Column of categories in --items, for --task rank; may be repeated."),
    ] = None,
    retriever: Annotated[
        Path | None, typer.Option(help="Model folder that retrieves, for --task rank.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Column of outcomes from 0 to 1, for --task rank.")
    ] = None,
    request: Annotated[
        str | None,
        typer.Option(help="Column of request numbers, for --task rank; by default a pause."),
    ] = None,
    candidates: Annotated[
        int | None, typer.Option(min=1, help="Items to retrieve, for --task rank. [default: 200]")
    ] = None,
    allow: Allow = None,
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
    from everlong.cli.runs.fit import FitPlan, NextItemPlan, RankPlan, run_fit
    from everlong.recommender.fit_ranker import Asked

    common: dict[str, Any] = {
        "model": own_models([model or DEFAULT_MODEL[task]])[0],
        "out": out,
        "architecture": pairs("--set", architecture),
        "training": {"seed": str(seed), **pairs("--train", training)},
        "device": device,
        "resume": resume,
    }
    of_rank = {
        "--retriever": retriever,
        "--categories": categories,
        "--label": label,
        "--request": request,
        "--candidates": candidates,
        "--allow": allow,
    }
    of_next_item = {"--protocol": protocol, "--split": split, "--baselines": baselines}
    fields: tuple[str, ...] = ()
    if task is Task.NEXT_ITEM:
        _only_for(Task.RANK, of_rank)
        plan: FitPlan = NextItemPlan(
            protocol=protocol, split=pairs("--split", split), baselines=baselines, **common
        )
    else:
        _only_for(Task.NEXT_ITEM, of_next_item)
        if retriever is None:
            raise ValueError(
                "--task rank: expected --retriever and a model folder, received none; fit one with "
                "--task next-item first"
            )
        asked = Asked(label=label or "label", request=request)
        ranking = RankPlan(
            retriever=partial(load_model, retriever, device, allow),
            asked=asked,
            candidates=candidates or 200,
            **common,
        )
        plan, fields = ranking, ranking.event_fields()
    run_fit(
        plan,
        lambda: open_log(log, user_id, item_id, timestamp, ties.value, seed, fields),
        item_reader(items, item_id, vectors or [], categories or []),
        say=typer.echo,
    )


def _only_for(task: Task, options: Mapping[str, object]) -> None:
    """Raises ``ValueError`` if an option is given that only another task has."""
    for name, value in options.items():
        if value:
            raise ValueError(f"{name} goes with --task {task.value}: leave it out")


def item_reader(
    path: Path | None, item_id: str, vectors: Sequence[str], categories: Sequence[str]
) -> Callable[[IdMap], ItemTable] | None:
    """The function that reads columns of ``--items`` for the items of a catalogue; None without.

    Raises:
        ValueError: if only one of ``--items`` and ``--vectors`` is given.
        FileNotFoundError: if the file does not exist.
    """
    names = [*vectors, *categories]
    if path is None and not names:
        return None
    if path is None or not names:
        raise ValueError(
            "--items and --vectors or --categories go together: expected a file and the names of "
            f"its columns, received --items {path}, columns {', '.join(names) or None}"
        )
    if not path.exists():
        raise FileNotFoundError(f"--items: no file at {path}; check the path")

    def read(item_ids: IdMap) -> ItemTable:
        from everlong.data.items import read_items

        return read_items(path, item_ids, item_id=item_id, categorical=categories, vectors=vectors)

    return read
