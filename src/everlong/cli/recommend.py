"""The command ``everlong recommend``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from everlong.cli.options import Allow, Device, Json, ModelDir, load_model, write_json


def recommend(
    model: ModelDir,
    user: Annotated[list[str] | None, typer.Option(help="A known user; may be repeated.")] = None,
    history: Annotated[
        list[str] | None,
        typer.Option(help="A history as item ids, oldest first: 'a,b,c'; may be repeated."),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Number of items for each user.")] = 10,
    keep_seen: Annotated[
        bool | None,
        typer.Option(
            "--keep-seen/--hide-seen", help="Whether to list seen items; by default as in training."
        ),
    ] = None,
    device: Device = "cpu",
    allow: Allow = None,
    to: Json = None,
) -> None:
    """Prints recommendations for known users, or for given histories."""
    if bool(user) == bool(history):
        received = "both" if user else "neither"
        raise ValueError(f"expected either --user or --history, received {received}")
    recommender = load_model(model, device, allow)
    filter_seen = None if keep_seen is None else not keep_seen
    if user:
        frame = recommender.recommend(
            recommender.user_ids_from_text(user), k=k, filter_seen=filter_seen
        )
    else:
        histories = {
            text: recommender.item_ids.from_text([i.strip() for i in text.split(",") if i.strip()])
            for text in history or []
        }
        frame = recommender.recommend(
            {text: ids.to_list() for text, ids in histories.items()},
            k=k,
            filter_seen=filter_seen,
        )
    from everlong.evaluation.report import columns

    rows = [
        (str(row["user_id"]), str(row["rank"]), str(row["item_id"]), f"{row['score']:.4f}")
        for row in frame.iter_rows(named=True)
    ]
    typer.echo(columns(("user_id", "rank", "item_id", "score"), rows))
    if to is not None:
        write_json(to, json.loads(frame.write_json()))
