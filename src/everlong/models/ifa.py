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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from everlong import state as states
from everlong.batch import Batch
from everlong.items import ItemTable
from everlong.model import UserModel
from everlong.ops import newest
from everlong.ops.dropout import Dropout
from everlong.ops.feature_maps import FeatureMap, MapName
from everlong.ops.linear_attention import (
    Asked,
    History,
    Sums,
    add_events,
    add_one_each,
    linear_attention,
    merged,
)
from everlong.ops.sets import Sets
from everlong.requests import RequestBatch

HOUR_S, DAY_S = 3_600, 86_400
AGES = 32
"""Buckets of the age of a recent event: powers of two of seconds."""

Read = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Of a layer and queries ``[P, H, F]``: weighted sums ``[P, H, M, E]`` and masses ``[P, H, M]``."""


@dataclass(frozen=True, kw_only=True)
class IFAConfig:
    """Architecture of IFA.

    Attributes:
        num_items: items of the catalogue.
        dim: width D of items, events and candidates.
        heads: of all attentions.
        layers: linear attention, attention among candidates and feed-forward network.
        feature_map: of the linear attention.
        half_lives: seconds after which an event counts half, one a rate of forgetting; 0 forgets
            nothing. With several, every candidate mixes them as it needs.
        window: recent events W that are read by softmax attention; 0 for none.
        spare: events that are kept beyond these, so that so many can be removed exactly.
        candidate_attention: whether the candidates of a request see each other. Their scores then
            depend on the set.
        clock: whether hour and weekday (UTC) of events and requests are seen.
        fields: event fields that are read, each with its number of codes.
        categories: item features, each with its number of codes and of entries in the item table.
        vectors: item vectors, each with its width.
        dropout: on embeddings and on what is added to them.
    """

    num_items: int
    dim: int = 64
    heads: int = 4
    layers: int = 2
    feature_map: MapName = "elu"
    half_lives: tuple[float, ...] = (0.0,)
    window: int = 32
    spare: int = 8
    candidate_attention: bool = True
    clock: bool = True
    fields: tuple[tuple[str, int], ...] = ()
    categories: tuple[tuple[str, int, int], ...] = ()
    vectors: tuple[tuple[str, int], ...] = ()
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("dim", "heads", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, received {getattr(self, name)}")
        for name in ("window", "spare"):
            if getattr(self, name) < 0:
                raise ValueError(f"expected {name} >= 0, received {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(
                f"heads share the width: expected dim a multiple of heads, received dim={self.dim} "
                f"and heads={self.heads}"
            )
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
    count: Tensor  # [B] int64, events in the sums
    items: Tensor  # [B, S] int32, by time and then item, oldest first
    times: Tensor  # [B, S] int64
    codes: Tensor  # [B, S, X] int32, fields
    filled: Tensor  # [B] int64, how many of these there are


class Recent(NamedTuple):
    """The last W events before each of Q requests, oldest first."""

    events: Tensor  # [Q, W, D], embedded
    age: Tensor  # [Q, W] log2 of seconds
    present: Tensor  # [Q, W] 1 or 0


class Memory(NamedTuple):
    """All that candidates read of B users at the times of requests."""

    weighted: Tensor  # [B, L, H, M, F, E]
    mass: Tensor  # [B, L, H, M, F]
    recent: Recent
    context: Tensor  # [B, D] when they ask


class IFA(UserModel):
    """IFA on packed requests: one pass over a history for all requests of its user.

    ``score`` takes the candidates of a user as one set; the whole catalogue is one, too. The order
    of candidates does not matter, and one that is there twice counts twice.
    """

    state_kind = "additive"

    def __init__(self, config: IFAConfig) -> None:
        super().__init__(config.num_items)
        self.config = config
        self.items = ItemEncoder(config)
        self.fields = nn.ModuleList(nn.Embedding(codes, config.dim) for _, codes in config.fields)
        self.hours = nn.Embedding(24, config.dim)
        self.weekdays = nn.Embedding(7, config.dim)
        self.event_norm = nn.LayerNorm(config.dim)
        self.memories = nn.ModuleList(
            EventMemory(config, first=n == 0) for n in range(config.layers)
        )
        self.recent = RecentReader(config) if config.window else None
        self.candidate_norm = nn.LayerNorm(config.dim)
        self.layers = nn.ModuleList(CandidateLayer(config) for _ in range(config.layers))
        self.dropout = Dropout(config.dropout)
        self.head = nn.Sequential(
            nn.LayerNorm(2 * config.dim),
            nn.Linear(2 * config.dim, config.dim),
            nn.GELU(),
            nn.Linear(config.dim, 1),
        )
        self.item_bias = nn.Embedding(config.num_items, 1)
        half_lives = torch.tensor(config.half_lives, dtype=torch.float64)
        rates = torch.where(half_lives > 0, math.log(2) / half_lives.clamp(min=1e-9), 0.0)
        self.rates: Tensor
        self.register_buffer("rates", rates.float(), persistent=False)
        for name, parameter in self.named_parameters():
            if "norm" not in name and parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(self.item_bias.weight)

    @property
    def set_dependent(self) -> bool:
        """Whether the score of a candidate depends on the others."""
        return self.config.candidate_attention

    # state

    def initial_state(self, num_users: int) -> IFAState:
        """Empty sums and no events."""
        config, like = self.config, self.event_norm.weight
        depth = config.dim // config.heads
        width = self.memories[0].features.width  # type: ignore[union-attr]
        shape = (num_users, config.layers, config.heads, len(config.half_lives), width)
        none = torch.zeros(num_users, dtype=torch.int64, device=like.device)
        times = none[:, None].repeat(1, config.capacity)
        codes = times[..., None].repeat(1, 1, len(config.fields)).to(torch.int32)
        return IFAState(
            like.new_zeros(*shape, depth),
            like.new_zeros(shape),
            none,
            none.clone(),
            times.to(torch.int32),
            times,
            codes,
            none.clone(),
        )

    def encode(self, events: Batch, state: IFAState | None = None) -> tuple[Tensor, IFAState]:  # type: ignore[override]
        """Memories ``[N, U]`` after each event, flat, and the final states.

        The memory of every event would fill the machine: who needs the final state alone calls
        ``advance``, who ranks candidates calls ``rank``.
        """
        if state is None:
            state = self.initial_state(events.num_users)
        outputs, last = [], state
        for step in one_by_one(events):
            now = self.step(step.events, states.take(last, step.rows))
            last = states.put(last, step.rows, now)
            outputs.append((step.places, self.user(now)))
        return self._in_order(outputs), last

    def forward(self, events: Batch, state: IFAState | None = None) -> Tensor:  # type: ignore[override]
        """The memory ``[N, U]`` before each event, flat, at the time of that event."""
        if state is None:
            state = self.initial_state(events.num_users)
        outputs = []
        for step in one_by_one(events):
            before = states.take(state, step.rows)
            outputs.append((step.places, self.user(before, step.events.times)))
            state = states.put(state, step.rows, self.step(step.events, before))
        return self._in_order(outputs)

    def _in_order(self, outputs: list[tuple[Tensor, Tensor]]) -> Tensor:
        if not outputs:
            width = self.user(self.initial_state(1)).shape[1]
            return self.event_norm.weight.new_zeros(0, width)
        order = torch.cat([places for places, _ in outputs]).argsort()
        return torch.cat([values for _, values in outputs])[order]

    def advance(self, events: Batch, state: IFAState | None = None) -> IFAState:  # type: ignore[override]
        """The states after all events, in any order: two products a layer, head and user."""
        return self._added(events, state, add_events)

    def step(self, events: Batch, state: IFAState) -> IFAState:  # type: ignore[override]
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
            held = newest.insert(held, state.count, new)
        return self._made(held, parts, state.count + events.lengths)

    def merge(self, a: IFAState, b: IFAState) -> IFAState:
        """The states of the events of both, user by user; no event may be in both.

        Raises:
            ValueError: if some of the newest W events of both together are not held any more.
        """
        parts = [
            merged(self._sums(a, layer), self._sums(b, layer), self.rates)
            for layer in range(self.config.layers)
        ]
        held = newest.merge(held_by(a), a.count, held_by(b), b.count)
        return self._checked(self._made(held, parts, a.count + b.count))

    def remove(self, events: Batch, state: IFAState) -> IFAState:
        """The states without events that were added before, given with their times and fields.

        Raises:
            ValueError: if an event is as new as those held but not among them, if more are removed
                than were added, or if fewer than the newest W are left of a longer history: the
                state has then to be built anew from the log.
        """
        count = state.count - events.lengths
        if bool((count < 0).any()):
            row = int((count < 0).nonzero()[0])
            raise ValueError(
                f"row {row}: expected at most {int(state.count[row])} events to remove, received "
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
        held, before = held_by(state), state.count
        for step in one_by_one(events) if self.config.window else ():
            mine, new = states.take(held, step.rows), step.events
            gone = newest.last_of(new.items, new.times, codes[step.places], new.offsets, 1)
            mine = newest.remove(mine, before[step.rows], gone)
            held = states.put(held, step.rows, mine)
            before = before.index_add(0, step.rows, torch.full_like(step.rows, -1))
        return self._checked(self._made(held, parts, count))

    def _checked(self, state: IFAState) -> IFAState:
        short = state.filled < state.count.clamp(max=self.config.window)
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

    def _codes(self, events: Batch) -> Tensor:
        """``[N, X]`` int32, the fields that are read.

        Raises:
            ValueError: if the events lack a field, or a code is out of range.
        """
        columns = []
        for name, codes in self.config.fields:
            if name not in events.fields:
                raise ValueError(
                    f"expected events with a field {name!r}, received "
                    f"{', '.join(events.fields) or 'none'}; read the log with it"
                )
            column = events.fields[name].long()
            if column.is_cpu and bool(((column < 0) | (column >= codes)).any()):
                raise ValueError(
                    f"field {name!r}: expected codes 0 .. {codes - 1}, received "
                    f"{int(column.min())} .. {int(column.max())}"
                )
            columns.append(column.to(torch.int32))
        if not columns:
            return events.items.new_zeros(events.num_events, 0, dtype=torch.int32)
        return torch.stack(columns, dim=1)

    def _embed(self, items: Tensor, times: Tensor, codes: Tensor) -> Tensor:
        """Events ``[.., D]`` from items, times ``[..]`` and codes ``[.., X]``."""
        values = self.items(items) + self._when(times)
        for number, table in enumerate(self.fields):
            values = values + table(codes[..., number].long())
        embedded: Tensor = self.event_norm(self.dropout(values))
        return embedded

    def _when(self, times: Tensor) -> Tensor:
        if not self.config.clock:
            return self.hours.weight.new_zeros(*times.shape, self.config.dim)
        # 1 January 1970 was a Thursday
        weekday = (times // DAY_S + 3) % 7
        vectors: Tensor = self.hours(times % DAY_S // HOUR_S) + self.weekdays(weekday)
        return vectors

    def _histories(self, codes: Tensor, events: Batch) -> list[History]:
        """What each layer remembers of events."""
        values, found = self._embed(events.items, events.times, codes), []
        for memory in self.memories:
            values, features, kept = memory(values)
            found.append(History(features, kept, events.times, events.offsets))
        return found

    # reading

    def user(self, state: IFAState, at: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """All that candidates read of users at a time, flat: ``[B, U]``."""
        at = state.at if at is None else at
        # a request in the past of the newest event is one at that event
        left = (at - state.at).clamp(min=0)
        kept = torch.exp(-self.rates * left[:, None].to(self.rates.dtype)).to(state.mass.dtype)
        weighted = state.weighted * kept[:, None, None, :, None, None]
        mass = state.mass * kept[:, None, None, :, None]
        recent, size = [], self.config.window
        if size:
            times = state.times[:, -size:]
            events = self._embed(state.items[:, -size:].long(), times, state.codes[:, -size:])
            present = held_by(state).present[:, -size:].to(events.dtype)
            recent = list(seen_from(at, times, events, present))
        parts = [weighted, mass, *recent, self._when(at).to(mass.dtype)]
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    def _memory(self, user: Tensor) -> Memory:
        """The memory of flat rows ``[B, U]``."""
        config, depth = self.config, self.config.dim // self.config.heads
        width: int = self.memories[0].features.width  # type: ignore[union-attr, assignment]
        sums = (config.layers, config.heads, len(config.half_lives), width)
        size = config.window
        shapes = [(*sums, depth), sums, (size, config.dim), (size,), (size,), (config.dim,)]
        parts = user.split([math.prod(shape) for shape in shapes], dim=1)
        weighted, mass, events, age, present, context = (
            part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)
        )
        return Memory(weighted, mass, Recent(events, age, present), context)

    def read(self, user: Tensor, items: Tensor | None = None) -> Tensor:
        """Scores from memories ``[B, U]``: ``[B, I]``, or ``[B, C]`` for ``items [B, C]``."""
        memory, users = self._memory(user), user.shape[0]
        if items is None:
            items = torch.arange(self.num_items, device=user.device).expand(users, -1)
        count = items.shape[1]
        places = torch.arange(users + 1, device=user.device) * count

        def read(layer: int, queries: Tensor) -> tuple[Tensor, Tensor]:
            asked = queries.unflatten(0, (users, count))
            weighted = torch.einsum("bchf,bhmfe->bchme", asked, memory.weighted[:, layer])
            mass = torch.einsum("bchf,bhmf->bchm", asked, memory.mass[:, layer])
            return weighted.flatten(0, 1), mass.flatten(0, 1)

        scores = self._rank(items.flatten(), places, memory.context, memory.recent, read)
        return scores.unflatten(0, (users, count))

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

    def _recent_of(self, batch: RequestBatch, codes: Tensor) -> Recent:
        """The last W events before each request."""
        events, size = batch.events, self.config.window
        place = batch.cut[:, None] - size + torch.arange(size, device=batch.cut.device)
        present = place >= 0
        index = torch.where(present, events.offsets[batch.user][:, None] + place, 0)
        if events.num_events == 0:
            none = self.event_norm.weight.new_zeros(*place.shape, self.config.dim)
            return seen_from(batch.times, torch.zeros_like(place), none, none[..., 0])
        times = events.times[index]
        embedded = self._embed(events.items[index], times, codes[index])
        return seen_from(batch.times, times, embedded, present.to(embedded.dtype))

    def _rank(
        self, items: Tensor, offsets: Tensor, context: Tensor, recent: Recent | None, read: Read
    ) -> Tensor:
        """Logits ``[P]`` of candidates ``items [P]`` of Q requests."""
        sets = Sets.of(offsets)
        known = self.items(items)
        entered: Tensor = self.candidate_norm(
            self.dropout(known + context[sets.rows].to(known.dtype))
        )
        values = entered
        if self.recent is not None and recent is not None:
            values = values + self.recent(values, recent, sets)
        for number, layer in enumerate(self.layers):
            values = layer(values, sets, lambda queries, nth=number: read(nth, queries))
        logits = self.head(torch.cat([values, entered], dim=1)) + self.item_bias(items)
        return logits[:, 0]

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


def seen_from(at: Tensor, times: Tensor, events: Tensor, present: Tensor) -> Recent:
    """Events ``[Q, W, D]`` at ``times [Q, W]`` as they look at the times ``at [Q]``."""
    age = (at[:, None] - times).clamp(min=0).to(torch.float64)
    return Recent(events * present[..., None], (age + 1).log2().to(events.dtype) * present, present)


class Single(NamedTuple):
    """One event of each of some users."""

    rows: Tensor  # of the users
    places: Tensor  # of their events in the batch
    events: Batch


def one_by_one(events: Batch) -> Iterator[Single]:
    """The first event of each user, then the second, and so on."""
    for number in range(int(events.lengths.max()) if events.num_users else 0):
        rows = (events.lengths > number).nonzero().flatten()
        places = events.offsets[rows] + number
        offsets = torch.arange(rows.numel() + 1, device=rows.device)
        yield Single(rows, places, events.select(places, offsets))


class ItemEncoder(nn.Module):
    """Items as vectors: an embedding, the mean of those of their categories, and their vectors."""

    def __init__(self, config: IFAConfig) -> None:
        super().__init__()
        self.ids = nn.Embedding(config.num_items, config.dim)
        self.names = [name for name, _, _ in config.categories]
        self.tables = nn.ModuleList(
            nn.Embedding(codes, config.dim) for _, codes, _ in config.categories
        )
        for number, (_, _, entries) in enumerate(config.categories):
            self.register_buffer(f"codes_{number}", torch.zeros(entries, dtype=torch.int32))
            offsets = torch.zeros(config.num_items + 1, dtype=torch.int64)
            self.register_buffer(f"offsets_{number}", offsets)
        self.vector_names = [name for name, _ in config.vectors]
        self.maps = nn.ModuleList(
            nn.Linear(width, config.dim, bias=False) for _, width in config.vectors
        )
        for number, (_, width) in enumerate(config.vectors):
            self.register_buffer(f"vectors_{number}", torch.zeros(config.num_items, width))

    def fill(self, table: ItemTable) -> None:
        """Takes categories and vectors from an item table.

        Raises:
            ValueError: if the table lacks a column or does not fit the configuration.
        """
        for number, name in enumerate(self.names):
            if name not in table.categories:
                raise ValueError(
                    f"expected an item table with categories {name!r}, received "
                    f"{', '.join(table.categories) or 'none'}"
                )
            column = table.categories[name]
            self._set(f"codes_{number}", torch.from_numpy(column.codes), name)
            self._set(f"offsets_{number}", torch.from_numpy(column.offsets), name)
            if len(column.names) != self.tables[number].num_embeddings:
                raise ValueError(
                    f"categories {name!r}: expected {self.tables[number].num_embeddings} codes, "
                    f"received {len(column.names)}"
                )
        for number, name in enumerate(self.vector_names):
            if name not in table.vectors:
                raise ValueError(
                    f"expected an item table with vectors {name!r}, received "
                    f"{', '.join(table.vectors) or 'none'}"
                )
            self._set(f"vectors_{number}", torch.from_numpy(table.vectors[name]), name)

    def _set(self, buffer: str, values: Tensor, name: str) -> None:
        old = getattr(self, buffer)
        if old.shape != values.shape:
            raise ValueError(
                f"item feature {name!r}: expected {tuple(old.shape)} as configured, received "
                f"{tuple(values.shape)}; build the configuration from this table"
            )
        old.copy_(values)

    def forward(self, items: Tensor) -> Tensor:
        """Vectors ``[.., D]`` of items ``[..]``."""
        flat = items.flatten()
        vectors: Tensor = self.ids(flat)
        for number, table in enumerate(self.tables):
            offsets, codes = getattr(self, f"offsets_{number}"), getattr(self, f"codes_{number}")
            start, length = offsets[flat], offsets[flat + 1] - offsets[flat]
            begin = length.cumsum(0) - length
            index = torch.arange(int(length.sum()), device=flat.device)
            index = index + (start - begin).repeat_interleave(length)
            vectors = vectors + functional.embedding_bag(
                codes[index].long(), table.weight, begin, mode="mean"
            )
        for number, linear in enumerate(self.maps):
            vectors = vectors + linear(getattr(self, f"vectors_{number}")[flat])
        return vectors.unflatten(0, items.shape) if items.dim() != 1 else vectors


def item_features(
    table: ItemTable,
) -> tuple[tuple[tuple[str, int, int], ...], tuple[tuple[str, int], ...]]:
    """``categories`` and ``vectors`` of a configuration that takes all of an item table."""
    categories = tuple(
        (name, len(column.names), len(column.codes)) for name, column in table.categories.items()
    )
    return categories, tuple((name, v.shape[1]) for name, v in table.vectors.items())


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


class FeedForward(nn.Module):
    """Norm, two products and what is between them."""

    def __init__(self, config: IFAConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.widen = nn.Linear(config.dim, 2 * config.dim)
        self.narrow = nn.Linear(2 * config.dim, config.dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, values: Tensor) -> Tensor:
        """What is to be added to ``values [N, D]``."""
        inner = functional.gelu(self.widen(self.norm(values)))
        added: Tensor = self.dropout(self.narrow(inner))
        return added


class CandidateLayer(nn.Module):
    """Linear attention to the history, softmax attention among candidates, feed-forward network."""

    def __init__(self, config: IFAConfig) -> None:
        super().__init__()
        self.heads, depth = config.heads, config.dim // config.heads
        self.norm = nn.LayerNorm(config.dim)
        self.query = nn.Linear(config.dim, config.dim)
        self.features = FeatureMap(config.feature_map, depth)
        self.mixture = nn.Linear(config.dim, config.heads * len(config.half_lives))
        # a null event that everyone has: with no other the candidate reads it alone
        self.null_key = nn.Parameter(torch.zeros(config.heads, depth))
        self.null_value = nn.Parameter(torch.zeros(config.heads, depth))
        self.leave = nn.Linear(config.dim + config.heads, config.dim)
        self.among = SetAttention(config) if config.candidate_attention else None
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


class SetAttention(nn.Module):
    """Softmax attention among the candidates of each request."""

    def __init__(self, config: IFAConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.dim)
        self.enter = nn.Linear(config.dim, 3 * config.dim)
        self.leave = nn.Linear(config.dim, config.dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, values: Tensor, sets: Sets) -> Tensor:
        """What is to be added to ``values [P, D]``; in their sets."""
        qkv = self.enter(self.norm(values)).unflatten(1, (3, self.heads, -1))
        mixed = torch.zeros_like(values)
        for _, index in sets.groups:
            query, key, value = qkv[index].permute(2, 0, 3, 1, 4)  # [q, H, c, E] each
            found = functional.scaled_dot_product_attention(query, key, value)
            mixed = mixed.index_copy(
                0, index.flatten(), found.transpose(1, 2).flatten(2).flatten(0, 1)
            )
        added: Tensor = self.dropout(self.leave(mixed))
        return added


class RecentReader(nn.Module):
    """Softmax attention of candidates to the last W events, which sees how old each is."""

    def __init__(self, config: IFAConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.dim)
        self.query = nn.Linear(config.dim, config.dim)
        self.enter = nn.Linear(config.dim, 2 * config.dim)
        self.age = nn.Embedding(AGES, config.heads)
        self.leave = nn.Linear(config.dim, config.dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, values: Tensor, recent: Recent, sets: Sets) -> Tensor:
        """What is to be added to candidates ``[P, D]`` that stand in ``sets``."""
        query = self.query(self.norm(values)).unflatten(1, (self.heads, -1))
        key, value = (
            self.enter(recent.events).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        bias = self.age(recent.age.long().clamp(0, AGES - 1)).permute(0, 2, 1)  # [Q, H, W]
        hidden = torch.zeros_like(recent.present).masked_fill(recent.present == 0, -torch.inf)
        # nothing at all to see: the softmax of nothing is not a number, and counts for nothing
        empty = recent.present.sum(1) == 0
        hidden = hidden.masked_fill(empty[:, None], 0.0)
        bias = (bias + hidden[:, None])[:, :, None]  # [Q, H, 1, W]
        mixed = torch.zeros_like(values)
        for request, index in sets.groups:
            found = functional.scaled_dot_product_attention(
                query[index].transpose(1, 2), key[request], value[request],
                attn_mask=bias[request].to(query.dtype),
            )  # fmt: skip
            found = found.masked_fill(empty[request].view(-1, 1, 1, 1), 0.0)
            mixed = mixed.index_copy(
                0, index.flatten(), found.transpose(1, 2).flatten(2).flatten(0, 1)
            )
        added: Tensor = self.dropout(self.leave(mixed))
        return added
