"""The recipe of every fit: prepare, train, measure, read the states of all users."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from everlong.data.events import Events, restrict_to_catalogue
from everlong.evaluation.metrics import Best
from everlong.models.registry import config_class
from everlong.models.user_model import UserModel
from everlong.recommender.recommender import Recommender
from everlong.recommender.users import read_into
from everlong.system.provenance import hardware, versions
from everlong.system.settings import load_settings, unknown
from everlong.system.threads import yielding
from everlong.training.loop import TrainResult
from everlong.training.settings import LoopConfig

log = logging.getLogger(__name__)

C = TypeVar("C", bound=LoopConfig)
M = TypeVar("M", bound=UserModel[Any])


class Prepared(Protocol):
    """A model that is ready to be trained, with the log that it learns from."""

    @property
    def events(self) -> Events:
        """The whole log, from which the states of all users are read."""

    def train(self, folder: Path | None, resume: bool) -> TrainResult:
        """Trains the model and leaves it at its best epoch."""

    def measure(self) -> Mapping[str, Mapping[str, Any]]:
        """Results by the part of the log that they were measured on."""

    def recommender(self, metrics: Mapping[str, Mapping[str, Any]]) -> Recommender:
        """The recommender with its results, without users."""


@yielding()
def follow(prepared: Prepared, folder: str | Path | None, resume: bool) -> Recommender:
    """Trains, measures and reads the states of all users.

    Args:
        prepared: what to train.
        folder: where checkpoints and the training log go.
        resume: continue from the checkpoint in ``folder``.
    """
    result = prepared.train(None if folder is None else Path(folder), resume)
    facts = {"versions": versions(), "hardware": hardware(), "best_epoch": result.best_epoch}
    metrics = {part: {**values, **facts} for part, values in prepared.measure().items()}
    recommender = prepared.recommender(metrics)
    known, dropped = restrict_to_catalogue(prepared.events, recommender.item_ids)
    recommender.users.add(known.user_ids.ids(np.arange(known.num_users)))
    read_into(recommender.model, recommender.users, known)
    if dropped:
        log.info("%d events of items outside the training catalogue are in no state", dropped)
    return recommender


def training_settings(
    kind: type[C], training: C | Mapping[str, Any] | None, metrics: Mapping[str, Best]
) -> C:
    """The settings of training, checked before a long log is read.

    Args:
        kind: class of the settings.
        training: settings, or those that differ from the defaults.
        metrics: name to the better values of each metric that validation has.

    Raises:
        ValueError: if a setting is unknown or impossible, or training cannot monitor its metric.
    """
    if training is None or isinstance(training, Mapping):
        config = load_settings(kind, training or {})
    else:
        config = training
    if config.monitor not in metrics:
        raise ValueError(unknown("monitor", config.monitor, metrics, of=kind.__name__))
    if metrics[config.monitor] == "one":
        chosen = [name for name, best in metrics.items() if best != "one"]
        raise ValueError(
            f"monitor {config.monitor}: expected a metric of which higher or lower is better, such "
            f"as {chosen[0]}, received one of which 1 is best"
        )
    return config


def initialised(
    model_class: type[M], architecture: Mapping[str, Any], num_items: int, seed: int
) -> M:
    """A model for a catalogue of some size, initialised by a seed.

    Raises:
        ValueError: if a setting is unknown or impossible.
    """
    if "num_items" in architecture:
        raise ValueError("num_items follows from the log: leave it out of the architecture")
    config = load_settings(config_class(model_class), {**architecture, "num_items": num_items})
    # the random numbers of the caller continue as if nothing had been drawn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config)
