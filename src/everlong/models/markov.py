"""First-order Markov chain: what followed the user's last item, backed off to popularity.

State: the row of the last item, 8 bytes. The counts are kept sparse, one entry for each pair of
items that was seen, in the order of (last item, next item).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everlong.models.batch import Batch
from everlong.models.user_model import CountingModel

NO_ITEM = -1


@dataclass(frozen=True, kw_only=True)
class MarkovConfig:
    """A Markov chain.

    Attributes:
        num_items: items of the catalogue.
        backoff: how many events popularity counts for beside those after the last item.
    """

    num_items: int
    backoff: float = 1.0

    def __post_init__(self) -> None:
        if not self.backoff > 0:
            raise ValueError(
                f"expected backoff > 0 events, received {self.backoff}; without it an item that "
                "nothing followed has no scores"
            )


class MarkovState(NamedTuple):
    """What the chain remembers of a user."""

    user: Tensor  # [B, 1] int64, the row of the last item, -1 before the first


class Markov(CountingModel[MarkovState]):
    """Scores an item by its share among the events that followed the user's last item."""

    pairs: Tensor  # [P] int64, last * I + next, rising
    pair_counts: Tensor  # [P]
    followers: Tensor  # [I], events that followed each item
    popularity: Tensor  # [I], events of each item

    def __init__(self, config: MarkovConfig) -> None:
        super().__init__(config.num_items)
        self.config = config
        self.register_buffer("pairs", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("pair_counts", torch.zeros(0))
        self.register_buffer("followers", torch.zeros(config.num_items))
        self.register_buffer("popularity", torch.zeros(config.num_items))

    def observe(self, events: Batch, state: MarkovState | None = None) -> None:
        """Adds the pairs of neighbouring events of each user, and the events, to the counts."""
        items, before = events.items, self(events, state).squeeze(1)
        known = before != NO_ITEM
        last, following = before[known], items[known]
        pairs, counts = torch.unique(last * self.num_items + following, return_counts=True)
        together = torch.cat([self.pairs, pairs])
        weights = torch.cat([self.pair_counts, counts.to(self.pair_counts)])
        self.pairs, place = torch.unique(together, return_inverse=True)
        self.pair_counts = weights.new_zeros(self.pairs.numel()).index_add(0, place, weights)
        self.followers = self.followers + self._count(last)
        self.popularity = self.popularity + self._count(items)

    def _count(self, items: Tensor) -> Tensor:
        return torch.bincount(items, minlength=self.num_items).to(self.popularity)

    def initial_state(self, num_users: int) -> MarkovState:
        """No last item."""
        shape, device = (num_users, 1), self.pairs.device
        return MarkovState(torch.full(shape, NO_ITEM, dtype=torch.int64, device=device))

    def encode(self, events: Batch, state: MarkovState | None = None) -> tuple[Tensor, MarkovState]:
        """The item of each event ``[N, 1]``, and each user's last one."""
        if state is None:
            state = self.initial_state(events.num_users)
        outputs = events.items[:, None]
        busy = events.offsets[1:] > events.offsets[:-1]
        last = events.offsets[1:][busy] - 1
        rows = busy.nonzero().flatten()
        return outputs, MarkovState(state.user.index_copy(0, rows, outputs[last]))

    def score_vectors(self, user: Tensor, items: Tensor | None = None) -> Tensor:
        """Shares of what follows the last items ``user [B, 1]``: ``[B, I]``, or ``[B, C]``.

        (pairs + backoff * popularity share) / (followers + backoff): a user without a last item,
        or with one that nothing followed, gets the popularity shares.
        """
        last, backoff = user.squeeze(1), self.config.backoff
        known = last != NO_ITEM
        followers = torch.where(known, self.followers[last.clamp(min=0)], 0.0)[:, None] + backoff
        share = self.popularity / self.popularity.sum().clamp(min=1)
        if items is None:
            counts = self._rows(last)
        else:
            counts, share = self._cells(last, items), share[items]
        scores: Tensor = (counts + backoff * share) / followers
        return scores

    def _rows(self, last: Tensor) -> Tensor:
        """Counts of every item after each of ``last [B]``, as ``[B, I]``."""
        start = torch.searchsorted(self.pairs, last * self.num_items)
        stop = torch.searchsorted(self.pairs, (last + 1) * self.num_items)
        lengths = stop - start
        rows = torch.arange(last.numel(), device=last.device).repeat_interleave(lengths)
        before = lengths.cumsum(0) - lengths
        entries = torch.arange(rows.numel(), device=last.device) + (start - before)[rows]
        columns = self.pairs[entries] % self.num_items
        counts = self.pair_counts.new_zeros(last.numel(), self.num_items)
        return counts.index_put_((rows, columns), self.pair_counts[entries])

    def _cells(self, last: Tensor, items: Tensor) -> Tensor:
        """Counts of ``items [B, C]`` after each of ``last [B]``."""
        if self.pairs.numel() == 0:
            return self.pair_counts.new_zeros(items.shape)
        # no last item: -I + item is negative and never found
        wanted = last[:, None] * self.num_items + items
        place = torch.searchsorted(self.pairs, wanted).clamp(max=self.pairs.numel() - 1)
        return torch.where(self.pairs[place] == wanted, self.pair_counts[place], 0.0)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        # the number of pairs is learned from the log, so a fresh model takes the stored one
        for name in ("pairs", "pair_counts"):
            stored = state_dict.get(prefix + name)
            if stored is not None:
                setattr(self, name, getattr(self, name).new_zeros(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)
