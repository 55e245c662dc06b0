"""IFA (Yu et al., arXiv 2406.09742): a whole candidate set reads a whole history at once.

Of the paper only the abstract is public to us: candidates of a request enter together, attend to
the entire history by linear attention and to each other. The rest is our reading of it, and marked
so in ``docs/ranking.md``.

Events are never changed by attention: keys and values of every layer are functions of one event
alone. So all that a history is to a candidate are sums over its events, of a fixed size, which can
be added to in any order, merged and taken apart. Beside them stand the last W events, which a
softmax attention reads.

State: ``4 L H M F (E + 1)`` bytes of sums with L layers, H heads, M rates of forgetting, F features
and E = D / H values a head; 8,704 at L = 2, H = 4, M = 1, F = E = 16; and ``(12 + 4 X)`` bytes for
each of the last W + spare events with X fields.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from everlong.models import state as states
from everlong.models.batch import Batch, RequestBatch
from everlong.models.ranker import (
    FeedForward,
    Ranker,
    RankerConfig,
    Recent,
    RecentReader,
    SetAttention,
    match,
    one_by_one,
)
from everlong.ops import newest
from everlong.ops.attention_types import Asked, History, Sums
from everlong.ops.dropout import Dropout
from everlong.ops.feature_maps import FeatureMap, MapName, feature_width
from everlong.ops.linear_attention import add_events, add_one_each, linear_attention, merged
from everlong.ops.sets import Sets

MATCH = 1.5
"""Gain of the first keys and queries: feature maps are flat near zero."""

Read = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Of a layer and queries ``[P, H, F]``: weighted sums ``[P, H, M, E]`` and masses ``[P, H, M]``."""


@dataclass(frozen=True, kw_only=True)
class IFAConfig(RankerConfig):
    """Architecture of IFA.

    Attributes:
        window: recent events W that softmax attention reads, 0 for none.
        layers: linear attention, attention among candidates and feed-forward network.
        feature_map: of the linear attention.
        half_lives: seconds after which an event counts half, one a rate of forgetting; 0 forgets
            nothing. With several, every candidate mixes them as it needs.
        spare: events that are kept beyond ``window``, so that so many can be removed exactly.
    """

    layers: int = 2
    feature_map: MapName = "elu"
    half_lives: tuple[float, ...] = (0.0,)
    spare: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers < 1:
            raise ValueError(f"expected layers >= 1, received {self.layers}")
        if self.spare < 0:
            raise ValueError(f"expected spare >= 0, received {self.spare}")
        if self.feature_map not in get_args(MapName):
            raise ValueError(
                f"expected feature_map one of {', '.join(get_args(MapName))}, "
                f"received {self.feature_map!r}"
            )
        if not self.half_lives or not all(0 <= x < math.inf for x in self.half_lives):
            raise ValueError(
                "expected half_lives in seconds, 0 for one that never forgets, at least one; "
                f"received {self.half_lives}"
            )

    @property
    def capacity(self) -> int:
        """Events that the state holds as they are."""
        return self.window + self.spare if self.window else 0


class IFAState(NamedTuple):
    """What IFA remembers of a user: sums over all events, and the newest events."""

    weighted: Tensor  # [B, L, H, M, F, E]
    mass: Tensor  # [B, L, H, M, F]
    at: Tensor  # [B] int64, the newest time of all
    events: Tensor  # [B] int64, how many are in the sums
    items: Tensor  # [B, S] int32, by time and then item, oldest first
    times: Tensor  # [B, S] int64
    codes: Tensor  # [B, S, X] int32, fields
    filled: Tensor  # [B] int64, how many of these there are


class Memory(NamedTuple):
    """All that candidates read of B users at the times of requests."""

    weighted: Tensor  # [B, L, H, M, F, E]
    mass: Tensor  # [B, L, H, M, F]
    recent: Recent
    context: Tensor  # [B, D] when they ask


class IFA(Ranker[IFAState]):
    """IFA on packed requests: one pass over a history for all requests of its user."""

    state_kind = "additive"
    config: IFAConfig

    def __init__(self, config: IFAConfig) -> None:
        super().__init__(config)
        self.memories = nn.ModuleList(
            EventMemory(config, first=n == 0) for n in range(config.layers)
        )
        self.recent = RecentReader(config) if config.window else None
        # candidates see each other once, after all that they read: in every layer it took twice as
        # long as all the rest together
        self.layers = nn.ModuleList(
            CandidateLayer(config, last=n == config.layers - 1) for n in range(config.layers)
        )
        half_lives = torch.tensor(config.half_lives, dtype=torch.float64)
        rates = torch.where(half_lives > 0, math.log(2) / half_lives.clamp(min=1e-9), 0.0)
        self.rates: Tensor
        self.register_buffer("rates", rates.float(), persistent=False)
        self._initialise()
        for layer, memory in zip(self.layers, self.memories, strict=True):
            nn.init.xavier_uniform_(memory.key.weight, gain=MATCH)  # type: ignore[union-attr, arg-type]
            match(layer.query, memory.key)  # type: ignore[arg-type]

    @property
    def _sums_shape(self) -> tuple[int, int, int, int, int]:
        """Layers, heads, rates, features and values of the sums of a user."""
        config, depth = self.config, self.config.dim // self.config.heads
        width = feature_width(config.feature_map, depth)
        return config.layers, config.heads, len(config.half_lives), width, depth

    # state

    def initial_state(self, num_users: int) -> IFAState:
        """Empty sums and no events."""
        config, like = self.config, self.event_norm.weight
        shape = (num_users, *self._sums_shape)
        none = torch.zeros(num_users, dtype=torch.int64, device=like.device)
        times = none[:, None].repeat(1, config.capacity)
        codes = times[..., None].repeat(1, 1, len(config.fields)).to(torch.int32)
        return IFAState(
            like.new_zeros(shape),
            like.new_zeros(shape[:-1]),
            none,
            none.clone(),
            times.to(torch.int32),
            times,
            codes,
            none.clone(),
        )

    def final_state(self, events: Batch, state: IFAState | None = None) -> IFAState:
        """The states after all events, in any order: two products a layer, head and user."""
        return self._added(events, state, add_events)

    def step(self, events: Batch, state: IFAState) -> IFAState:
        """Adds one event of each user, which may be older than others that were added before."""
        return self._added(events, state, add_one_each)

    def _added(
        self,
        events: Batch,
        state: IFAState | None,
        add: Callable[[Sums, History, Tensor], Sums],
    ) -> IFAState:
        if state is None:
            state = self.initial_state(events.num_users)
        codes, held = self._codes(events), held_by(state)
        parts = [
            add(self._sums(state, layer), history, self.rates)
            for layer, history in enumerate(self._histories(codes, events))
        ]
        if self.config.window:
            size = min(self.config.capacity, int(events.lengths.max()) if events.num_users else 0)
            new = newest.last_of(events.items, events.times, codes, events.offsets, size)
            held = newest.insert(held, state.events, new)
        return self._made(held, parts, state.events + events.lengths)

    def merge(self, a: IFAState, b: IFAState) -> IFAState:
        """The states of the events of both, user by user; no event may be in both.

        Raises:
            ValueError: if some of the newest W events of both together are not held any more.
        """
        parts = [
            merged(self._sums(a, layer), self._sums(b, layer), self.rates)
            for layer in range(self.config.layers)
        ]
        held = newest.merge(held_by(a), a.events, held_by(b), b.events)
        return self._checked(self._made(held, parts, a.events + b.events))

    def remove(self, events: Batch, state: IFAState) -> IFAState:
        """The states without events that were added before, given with their times and fields.

        Raises:
            ValueError: if an event is as new as those held but not among them, if more are removed
                than were added, or if fewer than the newest W are left of a longer history: the
                state has then to be built anew from the log.
        """
        count = state.events - events.lengths
        if bool((count < 0).any()):
            row = int((count < 0).nonzero()[0])
            raise ValueError(
                f"row {row}: expected at most {int(state.events[row])} events to remove, received "
                f"{int(events.lengths[row])}"
            )
        codes = self._codes(events)
        parts = [
            add_events(self._sums(state, layer), history, self.rates, sign=-1)
            for layer, history in enumerate(self._histories(codes, events))
        ]
        # what was summed up and taken out again leaves rounding: of nothing, exactly nothing
        left = (count > 0).to(state.mass.dtype).view(-1, 1, 1, 1, 1)
        parts = [Sums(x.weighted * left, x.mass * left[..., 0], x.at) for x in parts]
        held, before = held_by(state), state.events
        for step in one_by_one(events) if self.config.window else ():
            mine, new = states.take(held, step.rows), step.events
            gone = newest.last_of(new.items, new.times, codes[step.where], new.offsets, 1)
            mine = newest.remove(mine, before[step.rows], gone)
            held = states.put(held, step.rows, mine)
            before = before.index_add(0, step.rows, torch.full_like(step.rows, -1))
        return self._checked(self._made(held, parts, count))

    def _checked(self, state: IFAState) -> IFAState:
        short = state.filled < state.events.clamp(max=self.config.window)
        if bool(short.any()):
            row = int(short.nonzero()[0])
            raise ValueError(
                f"row {row}: expected the newest {self.config.window} events to be held, received "
                f"{int(state.filled[row])}; build this state anew from the log, and set a larger "
                "spare if this is frequent"
            )
        return state

    def _made(self, held: newest.Newest, parts: list[Sums], count: Tensor) -> IFAState:
        return IFAState(
            torch.stack([sums.weighted for sums in parts], dim=1),
            torch.stack([sums.mass for sums in parts], dim=1),
            parts[0].at,
            count,
            *held,
        )

    def _sums(self, state: IFAState, layer: int) -> Sums:
        return Sums(state.weighted[:, layer], state.mass[:, layer], state.at)

    # events and candidates

    def _histories(self, codes: Tensor, events: Batch) -> list[History]:
        """What each layer remembers of events."""
        values, found = self._embed(events.items, events.times, codes), []
        for memory in self.memories:
            values, features, kept = memory(values)
            found.append(History(features, kept, events.times, events.offsets))
        return found

    # reading

    def user_embedding(self, state: IFAState, at: Tensor | None = None) -> Tensor:
        """All that candidates read of users at a time, flat: ``[B, U]``."""
        at = state.at if at is None else at
        # a request in the past of the newest event is one at that event
        left = (at - state.at).clamp(min=0)
        kept = torch.exp(-self.rates * left[:, None].to(self.rates.dtype)).to(state.mass.dtype)
        weighted = state.weighted * kept[:, None, None, :, None, None]
        mass = state.mass * kept[:, None, None, :, None]
        # events are read as vectors: which items they are is not asked again
        recent = self._recent_at(held_by(state), at)[:3] if self.config.window else ()
        parts = [weighted, mass, *recent, self._when(at).to(mass.dtype)]
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def _memory(self, user: Tensor) -> Memory:
        """The memory of flat rows ``[B, U]``."""
        dim, size, sums = self.config.dim, self.config.window, self._sums_shape
        shapes = [sums, sums[:-1], (size, dim), (size,), (size,), (dim,)]
        parts = torch.split(user, [math.prod(shape) for shape in shapes], dim=1)
        weighted, mass, events, age, present, context = (
            part.reshape(user.shape[0], *shape) for part, shape in zip(parts, shapes, strict=True)
        )
        return Memory(weighted, mass, Recent(events, age, present, present), context)

    def score_vectors(self, user: Tensor, items: Tensor | None = None) -> Tensor:
        """Scores from memories ``[B, U]``: ``[B, I]``, or ``[B, C]`` for ``items [B, C]``."""
        memory, users = self._memory(user), user.shape[0]
        if items is None:
            items = torch.arange(self.num_items, device=user.device).expand(users, -1)
        count = items.shape[1]
        offsets = torch.arange(users + 1, device=user.device) * count

        def read(layer: int, queries: Tensor) -> tuple[Tensor, Tensor]:
            asked = queries.reshape(users, count, *queries.shape[1:])
            weighted = torch.einsum("bchf,bhmfe->bchme", asked, memory.weighted[:, layer])
            mass = torch.einsum("bchf,bhmf->bchm", asked, memory.mass[:, layer])
            return weighted.flatten(0, 1), mass.flatten(0, 1)

        scores = self._rank(items.flatten(), offsets, memory.context, memory.recent, read)
        return scores.reshape(users, count)

    def rank(self, batch: RequestBatch) -> Tensor:
        """Training: logits ``[P]`` of all candidates of all requests, one pass over each history.

        Every request is answered as ``score`` answers it from the state just before it.
        """
        events, at = batch.events, batch.times
        codes = self._codes(events)
        histories = self._histories(codes, events)
        none = self.initial_state(events.num_users)
        asked = Asked(batch.user, batch.cut, at, batch.offsets)

        def read(layer: int, queries: Tensor) -> tuple[Tensor, Tensor]:
            before = self._sums(none, layer)
            return linear_attention(histories[layer], queries, asked, self.rates, before)

        recent = self._recent_of(batch, codes) if self.config.window else None
        return self._rank(batch.items, batch.offsets, self._when(at), recent, read)

    def _rank(
        self, items: Tensor, offsets: Tensor, context: Tensor, recent: Recent | None, read: Read
    ) -> Tensor:
        """Logits ``[P]`` of candidates ``items [P]`` of Q requests."""
        sets = Sets.of(offsets)
        if not sets.groups:
            return self.item_bias.weight.new_zeros(0)
        entered = values = self._enter(items, context, sets)
        if self.recent is not None and recent is not None:
            values = values + self.recent(values, recent, sets)
        for number, layer in enumerate(self.layers):
            values = layer(values, sets, partial(read, number))
        return self._leave(values, entered, items)

    # what states depend on

    def history_parameters(self) -> dict[str, Tensor]:
        """Parameters and buffers that the state depends on; all others can be trained anew.

        The recent events are kept as ids, so that only what enters the sums counts.
        """
        parts = ("items.", "fields.", "hours.", "weekdays.", "event_norm.", "memories.")
        asked = ("query", "null")
        return {
            name: value
            for name, value in self.state_dict(keep_vars=True).items()
            if name.startswith(parts) and not any(word in name for word in asked)
        }

    def history_digest(self) -> str:
        """Sha256 (hex) of what the state depends on: states of another digest cannot be read."""
        digest = hashlib.sha256(repr((self.config.half_lives, self.config.feature_map)).encode())
        for name, value in self.history_parameters().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def freeze_history(self) -> None:
        """From here on training leaves the states valid."""
        for value in self.history_parameters().values():
            value.requires_grad_(False)


def held_by(state: IFAState) -> newest.Newest:
    """The newest events of a state."""
    return newest.Newest(state.items, state.times, state.codes, state.filled)


class EventMemory(nn.Module):
    """What a layer keeps of an event: features of its key and its value, from the event alone."""

    def __init__(self, config: IFAConfig, *, first: bool) -> None:
        super().__init__()
        self.heads = config.heads
        self.inner = None if first else FeedForward(config)
        self.key = nn.Linear(config.dim, config.dim)
        self.value = nn.Linear(config.dim, config.dim)
        self.features = FeatureMap(config.feature_map, config.dim // config.heads)

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values ``[N, D]`` for the next layer, features ``[N, H, F]``, values ``[N, H, E]``."""
        if self.inner is not None:
            values = values + self.inner(values)
        key = self.key(values).unflatten(1, (self.heads, -1))
        return values, self.features(key), self.value(values).unflatten(1, (self.heads, -1))


class CandidateLayer(nn.Module):
    """Linear attention to the history, softmax attention among candidates, feed-forward network."""

    def __init__(self, config: IFAConfig, *, last: bool) -> None:
        super().__init__()
        self.heads, depth = config.heads, config.dim // config.heads
        self.norm = nn.LayerNorm(config.dim)
        self.query = nn.Linear(config.dim, config.dim)
        self.features = FeatureMap(config.feature_map, depth)
        self.mixture = nn.Linear(config.dim, config.heads * len(config.half_lives))
        # a null event that every user has: with no other the candidate reads it alone
        self.null_key = nn.Parameter(torch.zeros(config.heads, depth))
        self.null_value = nn.Parameter(torch.zeros(config.heads, depth))
        self.leave = nn.Linear(config.dim + config.heads, config.dim)
        self.among = SetAttention(config) if config.candidate_attention and last else None
        self.inner = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, values: Tensor, sets: Sets, read: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Candidates ``[P, D]`` after they have read the history and each other."""
        entered = self.norm(values)
        queries = self.features(self.query(entered).unflatten(1, (self.heads, -1)))
        weighted, mass = read(queries)
        # how much each candidate makes of each rate of forgetting
        mixture = self.mixture(entered).unflatten(1, (self.heads, -1)).softmax(-1)
        null = torch.einsum("phf,hf->ph", queries, self.features(self.null_key))
        much = (mixture * mass).sum(-1) + null
        found = torch.einsum("phm,phme->phe", mixture, weighted) + null[..., None] * self.null_value
        # how much of the history matches is lost in the quotient, and told beside it
        told = torch.cat([(found / much[..., None]).flatten(1), torch.log(much / null)], dim=1)
        values = values + self.dropout(self.leave(told))
        if self.among is not None:
            values = values + self.among(values, sets)
        return values + self.inner(values)  # type: ignore[no-any-return]
