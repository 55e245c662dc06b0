"""Migrations of model folders: what an earlier version wrote, as if this one had.

They work on what was read, in memory; a folder is rewritten by ``everlong upgrade`` alone. Names
that models and their training share with checkpoints change in ``training.migrations``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import polars as pl
from torch import Tensor

from everlong.training.migrations import architecture_2, parameters_2, training_2


class Contents(NamedTuple):
    """The contents of a model folder, before today's classes check them."""

    config: dict[str, Any]
    """``config.json``, without ``format``, ``files`` and ``digest``."""
    weights: dict[str, Tensor]
    item_ids: pl.Series
    user_ids: pl.Series
    users: dict[str, Tensor]
    """The user table: ``state/NAME`` of each field of the states, and what is kept beside them."""
    metrics: dict[str, Any]


def _version_2(contents: Contents) -> Contents:
    """Names of settings and parameters."""
    config, metrics = dict(contents.config), dict(contents.metrics)
    config["train"] = training_2(config["train"])
    config["architecture"] = architecture_2(config["architecture"])
    for part, facts in metrics.items():
        if "training" in facts:
            metrics[part] = {**facts, "training": training_2(facts["training"])}
    return contents._replace(config=config, metrics=metrics, weights=parameters_2(contents.weights))


MIGRATIONS: tuple[Callable[[Contents], Contents], ...] = (_version_2,)
