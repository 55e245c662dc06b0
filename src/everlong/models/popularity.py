"""Popularity: every user is offered what most events are about, of all times or of late.

State: a constant, 4 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from everlong.models.batch import Batch
from everlong.models.user_model import CountingModel, ItemEmbeddings


@dataclass(frozen=True, kw_only=True)
class PopularityConfig:
    """The catalogue of a popularity model."""

    num_items: int


@dataclass(frozen=True, kw_only=True)
class RecentPopularityConfig(PopularityConfig):
    """Recent popularity.

    Attributes:
        half_life_s: seconds after which an event counts half, a week by default; events, where
            the log has positions instead of a clock.
    """

    half_life_s: float = 7 * 86_400.0

    def __post_init__(self) -> None:
        if not self.half_life_s > 0:
            raise ValueError(
                f"expected half_life_s > 0 seconds, received {self.half_life_s}; "
                "use the model `popularity` to count all events alike"
            )


class PopularityState(NamedTuple):
    """Nothing: every user is alike."""

    user: Tensor  # [B, 1], always one


class Popularity(CountingModel[PopularityState]):
    """Scores an item by the number of its events."""

    counts: Tensor  # [I]

    def __init__(self, config: PopularityConfig) -> None:
        super().__init__(config.num_items)
        self.config = config
        self.register_buffer("counts", torch.zeros(config.num_items))

    def observe(self, events: Batch, state: PopularityState | None = None) -> None:
        """Adds the events to the counts."""
        seen = torch.bincount(events.items, minlength=self.num_items)
        self.counts = self.counts + seen.to(self.counts)

    def initial_state(self, num_users: int) -> PopularityState:
        """One for every user, which the counts are multiplied by."""
        return PopularityState(self.counts.new_ones(num_users, 1))

    def encode(
        self, events: Batch, state: PopularityState | None = None
    ) -> tuple[Tensor, PopularityState]:
        """The constant, for every event and every user."""
        if state is None:
            state = self.initial_state(events.num_users)
        return self.counts.new_ones(events.num_events, 1), state

    def item_embeddings(self) -> ItemEmbeddings:
        """The counts as item vectors of width 1."""
        return ItemEmbeddings(self.counts[:, None], torch.zeros_like(self.counts))


class RecentPopularity(Popularity):
    """Scores an item by the number of its events, each halved with every ``half_life_s``."""

    config: RecentPopularityConfig
    latest: Tensor  # int64, the time from which ages are measured

    def __init__(self, config: RecentPopularityConfig) -> None:
        super().__init__(config)
        self.register_buffer("latest", torch.tensor(torch.iinfo(torch.int64).min))

    def observe(self, events: Batch, state: PopularityState | None = None) -> None:
        """Adds the events to the counts, all aged to the latest event seen so far."""
        if events.num_events == 0:
            return
        latest = torch.maximum(self.latest, events.times.max())
        # float64, because the age of the first sentinel does not fit into int64
        aged = self._share(latest.double() - self.latest.double())
        shares = self._share((latest - events.times).double())
        seen = torch.bincount(events.items, weights=shares, minlength=self.num_items)
        self.counts = (self.counts * aged + seen).to(self.counts)
        self.latest = latest

    def _share(self, age_s: Tensor) -> Tensor:
        return torch.exp2(-age_s / self.config.half_life_s)
