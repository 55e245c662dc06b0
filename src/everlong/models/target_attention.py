"""Rankers that read the last W events one by one, for every candidate anew: what IFA is held to.

* ``mean``: the mean of all events, the same for every candidate.
* ``din``: Deep Interest Network (Zhou et al. 2018, arXiv 1706.06978): a small network weighs each
  pair of candidate and event; the weights are not normalised, as published.
* ``softmax``: multi-head attention of candidates to events.
* ``sim_soft``, ``sim_hard``: SIM (Pi et al. 2020, arXiv 2006.05639): attention to the few events
  that are most similar, or to the newest that share the candidate's category, beside attention to
  the newest events. The search of ``sim_soft`` is by the products of the attention itself, without
  the auxiliary loss of the paper.

State: the last W events, ``(12 + 4 X) W`` bytes with X fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from everlong.models.batch import Batch, RequestBatch
from everlong.models.ranker import (
    Ranker,
    RankerConfig,
    Recent,
    RecentReader,
    SetAttention,
    match,
)
from everlong.ops import newest
from everlong.ops.dropout import Dropout
from everlong.ops.sets import Sets

ReaderKind = Literal["mean", "din", "softmax", "sim_soft", "sim_hard"]


@dataclass(frozen=True, kw_only=True)
class TargetAttentionConfig(RankerConfig):
    """Architecture of a ranker over the last W events.

    Attributes:
        reader: how candidates read events.
        found: events that a search finds for a candidate.
        newest: events that are read beside those that a search finds.
    """

    window: int = 200
    candidate_attention: bool = False
    reader: ReaderKind = "din"
    found: int = 32
    newest: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        names = get_args(ReaderKind)
        if self.reader not in names:
            raise ValueError(f"expected reader one of {', '.join(names)}, received {self.reader!r}")
        if self.window < 1 or self.found < 1 or self.newest < 1:
            raise ValueError(
                "expected window, found and newest >= 1, received "
                f"{self.window}, {self.found} and {self.newest}"
            )
        if self.reader == "sim_hard" and not self.categories:
            raise ValueError(
                "sim_hard searches by category: expected categories, received none; "
                "give an item table, or use sim_soft"
            )


class TargetAttentionState(NamedTuple):
    """The last events of a user."""

    items: Tensor  # [B, W] int32
    times: Tensor  # [B, W] int64
    codes: Tensor  # [B, W, X] int32
    filled: Tensor  # [B] int64
    events: Tensor  # [B] int64, how many there were in all


class TargetAttention(Ranker[TargetAttentionState]):
    """Candidates that read the last W events of a history."""

    config: TargetAttentionConfig

    def __init__(self, config: TargetAttentionConfig) -> None:
        super().__init__(config)
        readers = {
            "mean": MeanReader,
            "din": DINReader,
            "softmax": RecentReader,
            "sim_soft": SearchReader,
            "sim_hard": SearchReader,
        }
        self.reader = readers[config.reader](config)
        self.among = SetAttention(config) if config.candidate_attention else None
        self._initialise()
        if isinstance(self.reader, SearchReader):
            match(self.reader.query, self.reader.enter)

    def initial_state(self, num_users: int) -> TargetAttentionState:
        """No events."""
        none = torch.zeros(num_users, dtype=torch.int64, device=self.event_norm.weight.device)
        times = none[:, None].repeat(1, self.config.window)
        codes = times[..., None].repeat(1, 1, len(self.config.fields)).to(torch.int32)
        return TargetAttentionState(times.to(torch.int32), times, codes, none, none.clone())

    def final_state(
        self, events: Batch, state: TargetAttentionState | None = None
    ) -> TargetAttentionState:
        """The last events of each user."""
        if state is None:
            state = self.initial_state(events.num_users)
        longest = int(events.lengths.max()) if events.num_users else 0
        size, codes = min(self.config.window, longest), self._codes(events)
        new = newest.last_of(events.items, events.times, codes, events.offsets, size)
        held = newest.insert(held_by(state), state.events, new)
        return TargetAttentionState(*held, state.events + events.lengths)

    def step(self, events: Batch, state: TargetAttentionState) -> TargetAttentionState:
        """Appends one event of each user."""
        return self.final_state(events, state)

    def user_embedding(self, state: TargetAttentionState, at: Tensor | None = None) -> Tensor:
        """Events, their items and the time of the request, flat: ``[B, U]``."""
        at = state.times[:, -1] if at is None else at
        recent = self._recent_at(held_by(state), at)
        # whole numbers up to 2^24 stay whole in float32: catalogues are smaller
        parts = [*recent, self._when(at).to(recent.events.dtype)]
        return torch.cat([part.flatten(1).to(recent.events.dtype) for part in parts], dim=1)

    def score_vectors(self, user: Tensor, items: Tensor | None = None) -> Tensor:
        """Scores from memories ``[B, U]``: ``[B, I]``, or ``[B, C]`` for ``items [B, C]``."""
        size, dim, users = self.config.window, self.config.dim, user.shape[0]
        shapes = [(size, dim), (size,), (size,), (size,), (dim,)]
        lengths = [torch.Size(shape).numel() for shape in shapes]
        events, age, present, ids, context = (
            part.reshape(users, *shape)
            for part, shape in zip(torch.split(user, lengths, dim=1), shapes, strict=True)
        )
        if items is None:
            items = torch.arange(self.num_items, device=user.device).expand(users, -1)
        offsets = torch.arange(users + 1, device=user.device) * items.shape[1]
        recent = Recent(events, age, present, ids)
        return self._rank(items.flatten(), offsets, context, recent).reshape(items.shape)

    def rank(self, batch: RequestBatch) -> Tensor:
        """Logits ``[P]`` of all candidates of all requests."""
        recent = self._recent_of(batch, self._codes(batch.events))
        return self._rank(batch.items, batch.offsets, self._when(batch.times), recent)

    def _rank(self, items: Tensor, offsets: Tensor, context: Tensor, recent: Recent) -> Tensor:
        sets = Sets.of(offsets)
        if not sets.groups:
            return self.item_bias.weight.new_zeros(0)
        entered = self._enter(items, context, sets)
        if isinstance(self.reader, SearchReader):
            values = entered + self.reader(
                entered, recent, sets, self._allowed(items, recent, sets)
            )
        else:
            values = entered + self.reader(entered, recent, sets)
        if self.among is not None:
            values = values + self.among(values, sets)
        return self._leave(values, entered, items)

    def _allowed(self, items: Tensor, recent: Recent, sets: Sets) -> list[Tensor] | None:
        """For each group of requests, which events share the first category: ``[q, c, W]``."""
        if self.config.reader != "sim_hard":
            return None
        category = self.items.first_category()
        of_events = category[recent.items.long()]
        return [
            category[items[index]][:, :, None] == of_events[request][:, None]
            for request, index in sets.groups
        ]


def held_by(state: TargetAttentionState) -> newest.Newest:
    """The events of a state."""
    return newest.Newest(state.items, state.times, state.codes, state.filled)


class MeanReader(nn.Module):
    """The mean of the events, for all candidates the same."""

    def __init__(self, config: RankerConfig) -> None:
        super().__init__()
        self.leave = nn.Linear(config.dim, config.dim)

    def forward(self, values: Tensor, recent: Recent, sets: Sets) -> Tensor:
        """What is to be added to candidates ``[P, D]``."""
        number = recent.present.sum(1, keepdim=True).clamp(min=1)
        mean: Tensor = self.leave(recent.events.sum(1) / number)
        return mean[sets.rows]


class DINReader(nn.Module):
    """The activation unit of DIN: a network over candidate, event, difference and product."""

    def __init__(self, config: RankerConfig) -> None:
        super().__init__()
        dim, hidden = config.dim, 36
        # the first product of the pair, split, so that it is made once a candidate and an event:
        # W [q, k, q - k, q * k] = (A + C) q + (B - C) k + D (q * k)
        self.of_candidate = nn.Linear(dim, hidden)
        self.of_event = nn.Linear(dim, hidden, bias=False)
        self.of_product = nn.Linear(dim, hidden, bias=False)
        self.weigh = nn.Linear(hidden, 1)
        self.leave = nn.Linear(dim, dim)

    def forward(self, values: Tensor, recent: Recent, sets: Sets) -> Tensor:
        """What is to be added to candidates ``[P, D]``."""
        asked, events = self.of_candidate(values), self.of_event(recent.events)
        mixed = []
        groups = zip(sets.groups, sets.split(values), sets.split(asked), strict=True)
        for (request, _), query, first in groups:
            key = recent.events[request]
            # [q, c, D, hidden] is small beside pairs of candidates and events
            product = torch.einsum("qcd,hd->qcdh", query, self.of_product.weight)
            pairs = torch.einsum("qwd,qcdh->qcwh", key, product)
            pairs = pairs + first[:, :, None] + events[request][:, None]
            weight = self.weigh(functional.silu(pairs))[..., 0] * recent.present[request][:, None]
            mixed.append(torch.einsum("qcw,qwd->qcd", weight, key))
        added: Tensor = self.leave(sets.join(mixed))
        return added


class SearchReader(nn.Module):
    """Attention to the events that a search finds, and to the newest."""

    def __init__(self, config: TargetAttentionConfig) -> None:
        super().__init__()
        self.found, self.newest, self.heads = config.found, config.newest, config.heads
        self.query = nn.Linear(config.dim, config.dim)
        self.enter = nn.Linear(config.dim, 2 * config.dim)
        self.leave = nn.Linear(config.dim, config.dim)
        self.nearby = RecentReader(config)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, values: Tensor, recent: Recent, sets: Sets, allowed: list[Tensor] | None
    ) -> Tensor:
        """What is to be added to candidates ``[P, D]``; ``allowed [q, c, W]`` in each group."""
        near = Recent(*(value[:, -self.newest :] for value in recent))
        query, (key, value) = self.query(values), self.enter(recent.events).chunk(2, dim=-1)
        mixed, size = [], min(self.found, recent.present.shape[1])
        for number, part in enumerate(sets.split(query)):
            request = sets.groups[number][0]
            scores = part @ key[request].transpose(1, 2)  # [q, c, W]
            usable = recent.present[request][:, None].bool().expand_as(scores)
            order = scores
            if allowed is not None:
                usable = usable & allowed[number]
                # the newest that are allowed
                order = torch.arange(scores.shape[2], device=scores.device).expand_as(scores)
                order = order.to(scores.dtype)
            chosen = order.detach().masked_fill(~usable, -torch.inf).topk(size, dim=2).indices
            there = usable.gather(2, chosen)
            row, head = request[:, None, None], (self.heads, -1)
            picked = [values[row, chosen].unflatten(-1, head) for values in (key, value)]
            asked = part.unflatten(-1, head)  # type: ignore[no-untyped-call]
            weights = torch.einsum("qche,qckhe->qchk", asked, picked[0]) / asked.shape[-1] ** 0.5
            weights = weights.masked_fill(~there[:, :, None], -1e9).softmax(-1)
            weights = weights * there[:, :, None]
            mixed.append(torch.einsum("qchk,qckhe->qche", weights, picked[1]).flatten(2))
        added: Tensor = self.dropout(self.leave(sets.join(mixed))) + self.nearby(values, near, sets)
        return added
