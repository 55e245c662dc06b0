"""Migrations of model folders: what an earlier version wrote, as if this one had.

They work on what was read, in memory; a folder is rewritten by ``everlong upgrade`` alone. Names
that models and their training share with checkpoints change in ``training.migrations``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
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
    """Names of settings and parameters; seen items packed, without those that fell out of a ring
    of the last 1,024 events."""
    config, metrics = dict(contents.config), dict(contents.metrics)
    config["train"] = training_2(config["train"])
    config["architecture"] = architecture_2(config["architecture"])
    for part, facts in metrics.items():
        if "training" in facts:
            metrics[part] = {**facts, "training": training_2(facts["training"])}
    users = dict(contents.users)
    ring = users.pop("seen").numpy()
    owner, place = np.nonzero(ring >= 0)
    pairs = np.unique(np.stack([owner, ring[owner, place]]), axis=1)
    counts = np.bincount(pairs[0], minlength=len(ring))
    users["seen/items"] = torch.from_numpy(pairs[1].astype(np.int32))
    users["seen/offsets"] = torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]))
    return contents._replace(
        config=config, metrics=metrics, users=users, weights=parameters_2(contents.weights)
    )


MIGRATIONS: tuple[Callable[[Contents], Contents], ...] = (_version_2,)
