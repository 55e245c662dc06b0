"""The command ``everlong evaluate``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from everlong.cli.options import (
    Allow,
    Device,
    ItemColumn,
    Json,
    Log,
    ModelDir,
    TimeColumn,
    UserColumn,
    load_model,
    open_log,
    write_json,
)


class Part(StrEnum):
    """A held-out part of a log."""

    VALIDATION = "validation"
    TEST = "test"


def evaluate(
    model: ModelDir,
    log: Log,
    part: Annotated[Part, typer.Option(help="The held-out part.")] = Part.TEST,
    user_id: UserColumn = "user_id",
    item_id: ItemColumn = "item_id",
    timestamp: TimeColumn = "timestamp",
    device: Device = "cpu",
    allow: Allow = None,
    to: Json = None,
) -> None:
    """Evaluates a model on a held-out part of its log."""
    from everlong.evaluation.report import metrics_text

    recommender = load_model(model, device, allow)
    data = recommender.origin.data
    events = open_log(log, user_id, item_id, timestamp, data["ties"], data["ties_seed"])
    result = recommender.evaluate(events, part=part.value).as_dict()
    typer.echo(metrics_text(result))
    if to is not None:
        origin = recommender.origin
        record = {
            "model": origin.model,
            "part": part.value,
            "protocol": origin.protocol.model_dump(mode="json"),
            "data": dict(data),
            **result,
        }
        write_json(to, record)
