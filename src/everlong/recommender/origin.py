"""How a recommender came to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everlong.data.events import Events
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


def data_facts(events: Events) -> dict[str, Any]:
    """What identifies a log."""
    return {
        "source": Path(events.facts.source).name,
        "users": events.num_users,
        "items": events.num_items,
        "events": events.num_events,
        "ties": events.facts.ties,
        "ties_seed": events.facts.seed,
        "fingerprint": events.fingerprint,
    }
