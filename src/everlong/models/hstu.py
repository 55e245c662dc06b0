"""HSTU (Zhai et al., ICML 2024, arXiv 2402.17152): pointwise attention over a window of events.

State: keys and values of the last W events in every layer, their times, and what the last layer
reads of the newest event: ``8 L W D + 8 W + 4 D + 8`` bytes, 206 KB at W = 200.

Scores are cosines of user and item vectors by a temperature. Departures from the published code,
each stated at its line: the divisor of the attention, the time of the request, the initial weights
and the absence of absolute positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from everlong.batch import Batch
from everlong.model import ItemHead, UserModel, shift
from everlong.ops.dropout import Dropout
from everlong.ops.pointwise_attention import (
    ELAPSED_BUCKETS,
    Blocks,
    RelativeBias,
    pointwise_attention,
)
from everlong.ops.spans import Spans, make_plan, split_runs


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Architecture of a stack of HSTU layers.

    Attributes:
        num_items: items of the catalogue.
        dim: width D of item and user vectors.
        heads: attention heads, a divisor of ``dim``.
        layers: blocks of attention.
        dropout: on embeddings and on what leaves the attention of each layer.
        relative_bias: add learned biases by distance and by elapsed time to the scores of the
            attention; without them, learned positions are added to the embeddings instead. They
            count from the beginning of a history (PerSRec: of a segment) and share one vector from
            the last position on: of a history longer than its window HSTU then knows no order.
        temperature: scores are cosines divided by it; 0.05 is published.
        learn_temperature: learn it from there, never below 0.01.
    """

    num_items: int
    dim: int = 64
    heads: int = 2
    layers: int = 2
    dropout: float = 0.2
    relative_bias: bool = True
    temperature: float = 0.05
    learn_temperature: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "heads", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, received {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(
                f"heads share the width evenly: expected dim a multiple of heads={self.heads}, "
                f"received dim={self.dim}"
            )
        if not self.temperature >= 0.01:
            raise ValueError(f"expected temperature >= 0.01, received {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class HSTUConfig(BackboneConfig):
    """Architecture of HSTU.

    Attributes:
        window: events that an event sees, itself included; the whole history where it is longer
            than any history.
    """

    window: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"expected window >= 1, received {self.window}")


class HSTUState(NamedTuple):
    """What HSTU remembers of a user; event n stands in place n mod W."""

    keys: Tensor  # [B, L, W, D]
    values: Tensor  # [B, L, W, D]
    times: Tensor  # [B, W] int64
    seen: Tensor  # [B] int64, events so far
    newest: Tensor  # [B, D], what the last layer reads of the newest event


class Layer(nn.Module):
    """One HSTU block: ``X + W_o (U * norm(A V)) + b_o`` with ``A = silu(Q K^T + bias) / n``."""

    def __init__(self, config: BackboneConfig, reach: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False)
        # published: one product for U, V, Q and K; two let queries and keys be of different events
        self.ask = nn.Linear(config.dim, 2 * config.dim, bias=False)
        self.offer = nn.Linear(config.dim, 2 * config.dim, bias=False)
        self.mixed_norm = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False)
        self.leave = nn.Linear(config.dim, config.dim)
        self.dropout = Dropout(config.dropout)
        self.distance_bias = self.elapsed_bias = None
        if config.relative_bias:
            self.distance_bias = nn.Parameter(torch.empty(reach))
            self.elapsed_bias = nn.Parameter(torch.empty(ELAPSED_BUCKETS))
            nn.init.normal_(self.distance_bias, std=0.02)
            nn.init.normal_(self.elapsed_bias, std=0.02)
        for linear in (self.ask, self.offer, self.leave):
            # published: N(0, 0.02) for U, V, Q and K, which makes A V so small at first that the
            # eps of the norm after it, and not A V, decides what leaves
            nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(self.leave.bias)

    def remember(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[N, D]`` of events, from the input of the layer ``[N, D]``."""
        offered = self.offer(self.norm(values)).to(values.dtype)
        key, value = functional.silu(offered).chunk(2, dim=-1)
        return key, value

    def forward(self, values: Tensor, key: Tensor, value: Tensor, sight: Sight) -> Tensor:
        """The output ``[N, D]`` for inputs ``[N, D]`` that look at keys and values ``[M, D]``."""
        asked = self.ask(self.norm(values)).to(values.dtype)
        gate, query = functional.silu(asked).chunk(2, dim=-1)
        bias = None
        if self.distance_bias is not None and self.elapsed_bias is not None:
            times = sight.query_times, sight.key_times
            bias = RelativeBias(self.distance_bias, self.elapsed_bias, *times)
        heads = (self.heads, values.shape[-1] // self.heads)
        query, key, value = (part.view(len(part), *heads) for part in (query, key, value))
        mixed = pointwise_attention(query, key, value, sight.plan, bias).flatten(1)
        left: Tensor = self.leave(self.dropout(gate * self.mixed_norm(mixed)))
        return values + left

    def alone(self, values: Tensor) -> Tensor:
        """The output for inputs ``[.., D]`` that see nothing."""
        # the norm of no attention is zero, so that only the last bias is left
        return values + self.leave.bias


class Sight(NamedTuple):
    """Which keys each query sees, and when queries and keys are."""

    plan: list[Blocks]
    query_times: Tensor  # [N] int64
    key_times: Tensor  # [M] int64


class Backbone(nn.Module):
    """Item vectors, HSTU layers and the scoring by cosine.

    Args:
        config: architecture.
        reach: columns that a query may see at most, which is how many distances have a bias.
        places: positions that have a vector where there is no bias.
    """

    def __init__(self, config: BackboneConfig, *, reach: int, places: int) -> None:
        super().__init__()
        self.scale = math.sqrt(config.dim)
        self.items = nn.Embedding(config.num_items, config.dim)
        self.start = nn.Parameter(torch.empty(config.dim))
        nn.init.trunc_normal_(self.items.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.trunc_normal_(self.start, std=0.02, a=-0.04, b=0.04)
        # published code: always; the bias already tells the order, and without a limit of length
        self.positions = None
        if not config.relative_bias:
            self.positions = nn.Parameter(torch.empty(places, config.dim))
            nn.init.trunc_normal_(self.positions, std=0.02, a=-0.04, b=0.04)
        self.layers = nn.ModuleList(Layer(config, reach) for _ in range(config.layers))
        self.dropout = Dropout(config.dropout)
        # a bias by name, which weight decay spares
        sharpness = torch.tensor(-math.log(config.temperature))
        self.log_sharpness_bias = nn.Parameter(sharpness, requires_grad=config.learn_temperature)

    def embed(self, items: Tensor, places: Tensor) -> Tensor:
        """Inputs ``[N, D]`` of the first layer, from items ``[N]`` at positions ``[N]``."""
        return self.enter(self.items(items), places)

    def enter(self, vectors: Tensor, places: Tensor) -> Tensor:
        """Inputs ``[N, D]`` of the first layer, from item vectors ``[N, D]``."""
        values = vectors * self.scale
        if self.positions is not None:
            values = values + self.positions[places.clamp(max=self.positions.shape[0] - 1)]
        entered: Tensor = self.dropout(values)
        return entered

    def nobody(self) -> Tensor:
        """The user vector ``[D]`` of users without events: the start vector, which sees nothing."""
        vector: Tensor = self.user(self.layers[-1].alone(self.start))  # type: ignore[operator]
        return vector

    def user(self, values: Tensor) -> Tensor:
        """User vectors ``[N, D]`` of length 1 / temperature, from the output of the last layer."""
        sharpness = self.log_sharpness_bias.clamp(max=math.log(100.0)).exp()
        return functional.normalize(values, dim=-1) * sharpness

    def item_head(self) -> ItemHead:
        """Item vectors of length 1, without biases."""
        weight = functional.normalize(self.items.weight, dim=-1)
        return ItemHead(weight, weight.new_zeros(weight.shape[0]))


class HSTU(UserModel):
    """HSTU on packed histories; each event sees the last W events, itself included.

    In all layers but the last, the time that a query has is that of its own event, so that keys
    and values never change once they are computed. The last layer alone has the time of the
    request (published: the time of the next event, in every layer).
    """

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__(config.num_items)
        self.config = config
        self.backbone = Backbone(config, reach=config.window, places=config.window)

    def initial_state(self, num_users: int) -> HSTUState:
        """No events."""
        config, start = self.config, self.backbone.start
        # one user's zeros, seen as those of all: training begins here with every batch
        ring = start.new_zeros(1, config.layers, config.window, config.dim)
        times = torch.zeros(1, config.window, dtype=torch.int64, device=start.device)
        return HSTUState(
            ring.expand(num_users, -1, -1, -1),
            ring.expand(num_users, -1, -1, -1),
            times.expand(num_users, -1),
            times.new_zeros(num_users),
            start.new_zeros(num_users, config.dim),
        )

    def encode(self, events: Batch, state: HSTUState | None = None) -> tuple[Tensor, HSTUState]:  # type: ignore[override]
        """Outputs ``[N, D]`` after each event, as of its own time, and the final states."""
        if state is None:
            state = self.initial_state(events.num_users)
        run = self._run(events, state, events.times)
        return run.outputs, self._append(events, state, run)

    def forward(self, events: Batch, state: HSTUState | None = None) -> Tensor:  # type: ignore[override]
        """The user vector ``[N, D]`` before each event, at the time of that event."""
        if state is None:
            state = self.initial_state(events.num_users)
        if events.num_events == 0:
            return self.backbone.start.new_zeros(0, self.config.dim)
        outputs = self._run(events, state, next_times(events)).outputs
        return shift(outputs, self.user(state, first_times(events)), events.offsets)

    def user(self, state: HSTUState, at: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """The user vector ``[B, D]`` at the times ``at [B]``, default that of the newest event.

        The last layer alone is computed: ``W D`` multiply-adds twice, whatever the history.
        """
        window, some = self.config.window, state.seen.nonzero().flatten()
        vectors = self.backbone.nobody().expand(state.seen.numel(), -1)
        if some.numel() == 0:
            return vectors
        seen, times = state.seen[some], state.times[some]
        visible = seen.clamp(max=window)
        rows, zero = torch.arange(some.numel(), device=some.device), torch.zeros_like(some)
        plan = make_plan(
            Spans(rows, rows, zero + 1, visible - 1, zero),
            lambda user, column: user * window + (seen[user] - visible[user] + column) % window,
        )
        at = times[rows, (seen - 1) % window] if at is None else at[some]
        key, value = (part[some, -1].flatten(0, 1) for part in (state.keys, state.values))
        sight = Sight(plan, at, times.flatten())
        outputs = self.backbone.layers[-1](state.newest[some], key, value, sight)
        return vectors.index_copy(0, some, self.backbone.user(outputs))

    def item_head(self) -> ItemHead:
        """The embedding table, tied, as unit vectors."""
        return self.backbone.item_head()

    def _run(self, events: Batch, state: HSTUState, query_times: Tensor) -> _Run:
        config, backbone = self.config, self.backbone
        window, carried = config.window, bool(state.seen.any())
        number = numbers(events, state.seen)
        user, begin, queries = split_runs(events.lengths)
        seen = state.seen[user]
        # columns count from the oldest event that the first query sees
        oldest = (seen + begin + 1 - window).clamp(min=0)
        spans = Spans(
            torch.arange(user.numel(), device=user.device),
            events.offsets[user] + begin,
            queries,
            seen + begin - oldest,
            torch.zeros_like(begin),
        )

        def keys_at(span: Tensor, column: Tensor) -> Tensor:
            owner, at = user[span], oldest[span] + column
            new: Tensor = events.offsets[owner] + at - state.seen[owner]
            if not carried:
                return new
            held = events.num_events + owner * window + at % window
            return torch.where(at < state.seen[owner], held, new)

        plan = make_plan(spans, keys_at, window)
        key_times = events.times
        if carried:
            key_times = torch.cat([key_times, state.times.flatten()])
        values = backbone.embed(events.items, number)
        memories = []
        for nth, layer in enumerate(backbone.layers):
            key, value = layer.remember(values)  # type: ignore[operator]
            memories.append((key, value))
            if carried:
                key = torch.cat([key, state.keys[:, nth].flatten(0, 1)])
                value = torch.cat([value, state.values[:, nth].flatten(0, 1)])
            is_last = nth == config.layers - 1
            entered = values
            sight = Sight(plan, query_times if is_last else events.times, key_times)
            values = layer(values, key, value, sight)
        return _Run(backbone.user(values), memories, entered)

    def _append(self, events: Batch, state: HSTUState, run: _Run) -> HSTUState:
        """The state after the events: the last W of old and new ones."""
        window, lengths = self.config.window, events.lengths
        count = state.seen + lengths
        place = torch.arange(window, device=count.device)
        # the newest event that belongs in each place, once the new ones are in
        number = count[:, None] - 1 - (count[:, None] - 1 - place) % window
        users, places = (number >= state.seen[:, None]).nonzero(as_tuple=True)
        row = events.offsets[users] + number[users, places] - state.seen[users]

        layer = torch.arange(self.config.layers, device=count.device)

        def ring(old: Tensor, layers: Iterable[Tensor]) -> Tensor:
            fresh = torch.stack([part[row] for part in layers], dim=1)
            return old.index_put((users[:, None], layer, places[:, None]), fresh)

        keys, values = zip(*run.memories, strict=True)
        busy = lengths > 0
        newest = run.entered[(events.offsets[1:] - 1)[busy]]
        return HSTUState(
            ring(state.keys, keys),
            ring(state.values, values),
            state.times.index_put((users, places), events.times[row]),
            count,
            state.newest.index_copy(0, busy.nonzero().flatten(), newest),
        )


def numbers(events: Batch, count: Tensor) -> Tensor:
    """``[N]`` the number of each event, for users who have had ``count [B]`` before."""
    user = events.user_rows
    place = torch.arange(events.num_events, device=user.device) - events.offsets[user]
    return count[user] + place


def next_times(events: Batch) -> Tensor:
    """``[N]`` the time of the user's next event of the batch; of the last event its own."""
    following = torch.arange(1, events.num_events + 1, device=events.times.device)
    last = events.offsets[1:][events.lengths > 0] - 1
    return events.times[following.index_copy(0, last, last)]


def first_times(events: Batch) -> Tensor:
    """``[B]`` the time of each user's first event of the batch; of a user without events any."""
    return events.times[events.offsets[:-1].clamp(max=events.num_events - 1)]


class _Run(NamedTuple):
    """What comes of reading events."""

    outputs: Tensor  # [N, D] user vectors
    memories: list[tuple[Tensor, Tensor]]  # keys and values [N, D] of each layer
    entered: Tensor  # [N, D] input of the last layer
