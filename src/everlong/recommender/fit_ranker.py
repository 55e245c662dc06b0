"""From a recommender and a log of exposures to a recommender with a ranker behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from everlong.data.events import Events, restrict_to_catalogue
from everlong.data.items import ItemTable
from everlong.data.requests import (
    SESSION_GAP_S,
    RequestDataset,
    requests_from_events,
    split_requests,
)
from everlong.evaluation.ranker import evaluate_ranking
from everlong.evaluation.requests import score_requests
from everlong.models.device import named_device
from everlong.models.ranker import Ranker
from everlong.models.registry import config_class, load_model_class, model_name
from everlong.models.two_stage import TwoStage, TwoStageConfig
from everlong.recommender.recommender import TWO_STAGE, Recommender
from everlong.recommender.users import read_into
from everlong.system.provenance import hardware, versions
from everlong.system.settings import load_settings
from everlong.system.threads import yielding
from everlong.training.ranker import train_ranker
from everlong.training.settings import RankerTrainConfig


@yielding()
def fit_ranker(
    recommender: Recommender,
    events: Events,
    model: str | type[Ranker] = "ifa",
    *,
    label: str = "label",
    request: str | None = None,
    gap_s: int = SESSION_GAP_S,
    items: ItemTable | None = None,
    architecture: Mapping[str, Any] | None = None,
    training: RankerTrainConfig | Mapping[str, Any] | None = None,
    candidates: int = 200,
    folder: str | Path | None = None,
    resume: bool = False,
    device: str = "cpu",
) -> Recommender:
    """The recommender with a ranker that orders what it retrieves, and the states of all users.

    Exposures of the log are requests; they are cut by time, the ranker learns from the first part,
    the best epoch is chosen on the second and the third is measured once (``metrics["ranking"]``).

    Args:
        recommender: what retrieves; it is not changed.
        events: a log of exposures with the outcome in a field, and the fields that the ranker
            reads (``architecture={"fields": (("outcome", 2),)}``). Items outside the recommender's
            catalogue are left out.
        model: a ranker, by name, import path or class.
        label: field with the outcome, from 0 to 1.
        request, gap_s: as of ``requests_from_events``.
        items: features of the items of the recommender's catalogue.
        architecture, training: settings that differ from their defaults.
        candidates: items that are retrieved for the ranker.
        folder, resume: checkpoints, as of ``train_ranker``.
        device: where to train and score.

    Raises:
        ValueError: for unknown names or settings, or a log that cannot be used.
        Interrupted: after Ctrl-C, once the checkpoint is written.
    """
    ranker_class = load_model_class(model, "rank")
    if isinstance(recommender.model, TwoStage):
        raise ValueError(
            "this recommender has a ranker already: expected one that retrieves alone; fit the new "
            "ranker for the recommender that the old one was fitted for"
        )
    config = (
        training
        if isinstance(training, RankerTrainConfig)
        else load_settings(RankerTrainConfig, training or {})
    )
    place = named_device(device)
    known, _ = restrict_to_catalogue(events, recommender.item_ids)
    settings = dict(architecture or {})
    if items is not None:
        settings = {**item_features(items)._asdict(), **settings}
    parts = split_requests(requests_from_events(known, label=label, request=request, gap_s=gap_s))
    num_items = len(recommender.item_ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        shape = load_settings(config_class(ranker_class), {**settings, "num_items": num_items})
        ranker: Ranker = ranker_class(shape)
    if items is not None:
        fill_items(ranker, items)

    def validate(trained: Any) -> dict[str, float]:
        found = evaluate_ranking(score_requests(trained, known, parts.validation, device=place))
        return {name: value.mean for name, value in found.metrics.items()}

    result = train_ranker(
        ranker,
        RequestDataset(known, parts.train),
        config,
        validate=validate,
        folder=None if folder is None else Path(folder),
        resume=resume,
        device=place,
    )
    measured = evaluate_ranking(score_requests(ranker, known, parts.test, device=place))
    metrics = {
        **recommender.origin.metrics,
        "ranking": {
            **measured.as_dict(),
            "training": config.model_dump(),
            "best_epoch": result.best_epoch,
            "versions": versions(),
            "hardware": hardware(),
        },
    }
    both = _two_stages(recommender, ranker, model_name(ranker_class), candidates).to(place)
    origin = dataclasses.replace(recommender.origin, model=TWO_STAGE, metrics=metrics)
    found = Recommender(both, recommender.item_ids, origin)
    found.users.add(known.user_ids.ids(np.arange(known.num_users)))
    read_into(both, found.users, known)
    return found


def _two_stages(recommender: Recommender, ranker: Ranker, name: str, candidates: int) -> TwoStage:
    """One model of both, with their parameters."""
    settings = [dataclasses.asdict(part.config) for part in (recommender.model, ranker)]
    for part in settings:
        del part["num_items"]
    model = TwoStage(
        TwoStageConfig(
            num_items=ranker.num_items,
            retriever=recommender.origin.model,
            ranker=name,
            retriever_settings=settings[0],
            ranker_settings=settings[1],
            candidates=candidates,
        )
    )
    model.retriever.load_state_dict(recommender.model.state_dict())
    model.ranker.load_state_dict(ranker.state_dict())
    return model


class ItemFeatures(NamedTuple):
    """What a ranker's configuration says of the features of its items."""

    categories: tuple[tuple[str, int, int], ...]
    vectors: tuple[tuple[str, int], ...]


def item_features(table: ItemTable) -> ItemFeatures:
    """The part of a ranker's configuration that takes all of an item table."""
    categories = tuple(
        (name, len(column.names), len(column.codes)) for name, column in table.categories.items()
    )
    return ItemFeatures(categories, tuple((n, v.shape[1]) for n, v in table.vectors.items()))


def fill_items(model: Ranker, table: ItemTable) -> None:
    """Gives a ranker the features of its items.

    Raises:
        ValueError: if the table does not fit the configuration of the model.
    """
    categories = {
        name: (torch.from_numpy(column.codes), torch.from_numpy(column.offsets))
        for name, column in table.categories.items()
    }
    model.items.fill(categories, {n: torch.from_numpy(v) for n, v in table.vectors.items()})
