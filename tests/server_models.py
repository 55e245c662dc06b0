"""A small log with a known next item, and models of it: what the tests of the service serve."""

from __future__ import annotations

from typing import Any

import polars as pl

import everlong
from everlong.data.split import PAPER
from everlong.recommender.recommender import Recommender

ITEMS = 12


def walk(users: int = 48, events: int = 7) -> pl.DataFrame:
    """Users go round a circle of items, each from a place of their own."""
    return pl.DataFrame(
        [
            {
                "user_id": f"u{user}",
                "item_id": f"i{(user + n) % ITEMS:02d}",
                "timestamp": 1_700_000_000 + 60 * n + user,
            }
            for user in range(users)
            for n in range(events)
        ]
    )


def fitted(seed: int = 0) -> Recommender:
    return everlong.fit(
        walk(),
        "lru",
        architecture={"dim": 16, "channels": 16, "dropout": 0.0, "recurrence_dropout": 0.0},
        training={"epochs": 25, "batch_events": 64, "lr": 0.02, "seed": seed},
        protocol=PAPER.replace({"seen": "keep"}),
    )


def event(user: str, number: int, **more: Any) -> dict[str, Any]:
    """An event as a client sends it."""
    item = f"i{number % ITEMS:02d}"
    return {"user_id": user, "item_id": item, "timestamp": 1_700_000_000 + number, **more}
