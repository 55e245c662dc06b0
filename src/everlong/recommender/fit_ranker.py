"""From a recommender and a log of exposures to a recommender with a ranker behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from everlong.data.events import Events, restrict_to_catalogue
from everlong.data.items import ItemTable
from everlong.data.requests import (
    SESSION_GAP_S,
    RequestDataset,
    Requests,
    RequestSplit,
    requests_from_events,
    split_requests,
)
from everlong.evaluation.metrics import candidate_metrics
from everlong.evaluation.ranker import RankingEvaluation, evaluate_ranking
from everlong.evaluation.requests import score_requests
from everlong.models.device import device_of, named_device
from everlong.models.ranker import Ranker
from everlong.models.registry import load_model_class, model_name
from everlong.models.two_stage import TwoStage, TwoStageConfig
from everlong.models.user_model import UserModel
from everlong.recommender.origin import data_facts
from everlong.recommender.recipe import follow, initialised, training_settings
from everlong.recommender.recommender import TWO_STAGE, Recommender
from everlong.system.settings import Settings
from everlong.training.loop import TrainResult
from everlong.training.ranker import train_ranker
from everlong.training.settings import RankerTrainConfig

RANKING = "ranking"
"""Where an ``Origin`` has the results of a ranker, and the facts of its log."""


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
    best = {name: metric.best for name, metric in candidate_metrics().items()}
    config = training_settings(RankerTrainConfig, training, best)
    place = named_device(device)
    settings = dict(architecture or {})
    if items is not None:
        settings = {**item_features(items)._asdict(), **settings}
    asked = Asked(label=label, request=request, gap_s=gap_s)
    known, parts = asked.parts(events, recommender)
    network = initialised(ranker_class, settings, len(recommender.item_ids), config.seed)
    if items is not None:
        fill_items(network, items)
    prepared = RankerFit(
        network, config, known, parts, recommender, events, asked, candidates, place
    )
    return follow(prepared, folder, resume)


class Asked(Settings):
    """How the requests of a log are found; stored with the ranker.

    Attributes:
        label, request, gap_s: as of ``requests_from_events``.
    """

    label: str = "label"
    request: str | None = None
    gap_s: int = SESSION_GAP_S

    def parts(self, events: Events, recommender: Recommender) -> tuple[Events, RequestSplit]:
        """The events of a catalogue, and their requests by time."""
        known, _ = restrict_to_catalogue(events, recommender.item_ids)
        return known, split_requests(requests_from_events(known, **self.model_dump()))


@dataclass(frozen=True, eq=False)
class RankerFit:
    """A ranker that learns from the requests of a log, behind a recommender."""

    ranker: Ranker
    config: RankerTrainConfig
    known: Events
    parts: RequestSplit
    retriever: Recommender
    events: Events
    asked: Asked
    candidates: int
    device: torch.device

    def train(self, folder: Path | None, resume: bool) -> TrainResult:
        return train_ranker(
            self.ranker,
            RequestDataset(self.known, self.parts.train),
            self.config,
            validate=self._validate,
            minimise=candidate_metrics()[self.config.monitor].best == "lower",
            folder=folder,
            resume=resume,
            device=self.device,
        )

    def _validate(self, model: UserModel) -> dict[str, float]:
        found = self._evaluate(self.parts.validation)
        return {name: value.mean for name, value in found.metrics.items()}

    def _evaluate(self, requests: Requests) -> RankingEvaluation:
        return evaluate_ranking(
            score_requests(self.ranker, self.known, requests, device=self.device)
        )

    def measure(self) -> Mapping[str, Mapping[str, Any]]:
        found = self._evaluate(self.parts.test)
        return {RANKING: {**found.as_dict(), "training": self.config.model_dump()}}

    def recommender(self, metrics: Mapping[str, Mapping[str, Any]]) -> Recommender:
        before = self.retriever.origin
        name = model_name(type(self.ranker))
        both = _two_stages(self.retriever, self.ranker, name, self.candidates).to(self.device)
        log_facts = {**data_facts(self.events), **self.asked.model_dump()}
        origin = dataclasses.replace(
            before,
            model=TWO_STAGE,
            metrics={**before.metrics, **metrics},
            data={**before.data, RANKING: log_facts},
        )
        return Recommender(both, self.retriever.item_ids, origin)


def evaluate_ranker(
    recommender: Recommender, events: Events, *, part: str = "test"
) -> RankingEvaluation:
    """Metrics of the ranker of a recommender on held-out requests of the log it was trained on.

    Args:
        recommender: as ``fit_ranker`` returns it, or loaded.
        events: the same log, with the same fields; it is divided in the same way.
        part: ``"test"`` or ``"validation"``.

    Raises:
        ValueError: if there is no ranker, the log is another one, or there is no such part.
    """
    if part not in ("test", "validation"):
        raise ValueError(f"expected part 'test' or 'validation', received {part!r}")
    facts = recommender.origin.data.get(RANKING)
    if facts is None or not isinstance(recommender.model, TwoStage):
        raise ValueError(
            "expected a recommender with a ranker and the facts of its log, received one without; "
            "fit a ranker with fit_ranker"
        )
    if events.fingerprint != facts["fingerprint"]:
        raise ValueError(
            "this log is not the one that the ranker was trained on: expected fingerprint "
            f"{facts['fingerprint'][:12]}, received {events.fingerprint[:12]}; "
            "read the same file with the same columns, ties and seed"
        )
    asked = Asked(**{name: facts[name] for name in Asked.model_fields})
    known, parts = asked.parts(events, recommender)
    requests = parts.test if part == "test" else parts.validation
    ranker = recommender.model.ranker
    place = device_of(recommender.model)
    return evaluate_ranking(score_requests(ranker, known, requests, device=place))


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
