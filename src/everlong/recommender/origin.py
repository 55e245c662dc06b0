"""How a recommender came to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from everlong.data.split import Protocol
from everlong.training.settings import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How a recommender came to be; stored with it.

    Attributes:
        model: name of the model.
        train: how it was trained.
        protocol: how the log was split for choosing and testing.
        time_unit: unit of the times of the log ("position" if it had no clock).
        data: facts of the log, with its fingerprint.
        metrics: results, by the part of the log that they were measured on.
    """

    model: str
    train: TrainConfig
    protocol: Protocol
    time_unit: str
    data: Mapping[str, Any]
    metrics: Mapping[str, Any]
