"""The command ``everlong evaluate``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

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
    from everlong.evaluation.report import metrics_text, ranking_text
    from everlong.recommender.fit_ranker import RANKING, evaluate_ranker

    recommender = load_model(model, device, allow)
    data = recommender.origin.data
    ranking = data.get(RANKING)
    facts = data if ranking is None else ranking
    fields = [*recommender.model.event_fields]
    if ranking is not None:
        fields += [name for name in (ranking["label"], ranking["request"]) if name is not None]
    events = open_log(
        *(log, user_id, item_id, timestamp),
        *(facts["ties"], facts["ties_seed"], list(dict.fromkeys(fields))),
    )
    of_ranker = ranking is not None and events.fingerprint == ranking["fingerprint"]
    result: dict[str, Any] = {}
    # the retriever and the ranker may have learned from different logs
    if not of_ranker or events.fingerprint == data["fingerprint"]:
        result = recommender.evaluate(events, part=part.value).as_dict()
        typer.echo(metrics_text(result))
    if of_ranker:
        result[RANKING] = evaluate_ranker(recommender, events, part=part.value).as_dict()
        typer.echo(f"\n{RANKING}: {ranking_text(result[RANKING])}")
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
