"""SASRec (Kang and McAuley, ICDM 2018, arXiv 1808.09781): self-attention over a window of events.

State: the last W items and the number of events so far, ``4 W + 8`` bytes: 808 at W = 200.

Positions are learned and count from where the window begins. Departures from the published code,
as in current practice: the norm before attention is applied to keys and values too (the code
normalises queries alone), histories are packed instead of padded on the left, an item bias, a
learned vector for users without events, and a loss over the catalogue (not part of the model).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from everlong.models.batch import Batch
from everlong.models.item_vectors import ItemConfig, ItemVectors
from everlong.models.user_model import ItemEmbeddings, UserModel
from everlong.ops.dropout import Dropout

SHORT = 8
"""Windows up to this length share a bucket."""

MAX_WEIGHTS = 1 << 22
"""Most attention weights of a head at one time."""


@dataclass(frozen=True, kw_only=True)
class SASRecConfig(ItemConfig):
    """Architecture of SASRec.

    Attributes:
        heads: attention heads, a divisor of ``dim``.
        layers: blocks of attention and feed-forward network.
        inner: width of the feed-forward network as a multiple of ``dim``; the paper has 1.
        window: most events that are read, an even number.
        dropout: on embeddings, inside the feed-forward network and on the output of each part.
        attention_dropout: on attention weights. The published code uses ``dropout`` here too; it
            is off by default because fused attention on CPU has none, and the plain one takes
            several times as long.
        scale_items: multiply the item vectors of the events by sqrt(D), as the published code does.
    """

    heads: int = 2
    layers: int = 2
    inner: int = 1
    window: int = 200
    dropout: float = 0.2
    attention_dropout: float = 0.0
    scale_items: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "layers", "inner", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, received {getattr(self, name)}")
        if self.dim % self.heads:
            raise ValueError(
                f"heads share the width evenly: expected dim a multiple of heads={self.heads}, "
                f"received dim={self.dim}"
            )
        if self.window % 2:
            raise ValueError(
                "windows overlap by half: expected an even window, "
                f"received {self.window}; use {self.window + 1}"
            )


class SASRecState(NamedTuple):
    """What SASRec remembers of a user."""

    items: Tensor  # [B, W] int32, the last items, the newest at the end
    seen: Tensor  # [B] int64, events so far


class SASRec(UserModel[SASRecState]):
    """Self-attention over windows.

    A served user vector is read from the last W events. In training, and in the outputs of
    ``encode``, a history longer than W is covered by windows that begin at every W/2-th event of
    the user, and each event is read in the first window in which W/2 or more events precede it:
    the cost grows with T times W and not with T squared. Up to W events both are the same.
    """

    exemptions: ClassVar[Mapping[int, str]] = MappingProxyType(
        {
            2: "positions count from where the window begins, which moves with every event "
            "beyond the window; encode moves it by half a window at a time",
            7: "beyond the window, serving reads the last W events, training W/2 to W of them",
        }
    )

    weight_decay: ClassVar[Mapping[str, bool]] = {"start": True}

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__(config.num_items)
        self.config = config
        self.items = ItemVectors(config)
        self.positions = nn.Embedding(config.window, config.dim)
        self.start = nn.Parameter(torch.empty(config.dim))
        self.item_bias = nn.Parameter(torch.zeros(config.num_items))
        for parameter in (*self.items.parameters(), self.positions.weight, self.start):
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(SASRecBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.scale = math.sqrt(config.dim) if config.scale_items else 1.0

    def initial_state(self, num_users: int) -> SASRecState:
        """An empty window."""
        device = self.start.device
        shape = (num_users, self.config.window)
        items = torch.zeros(shape, dtype=torch.int32, device=device)
        return SASRecState(items, torch.zeros(num_users, dtype=torch.int64, device=device))

    def encode(self, events: Batch, state: SASRecState | None = None) -> tuple[Tensor, SASRecState]:
        """Outputs ``[N, D]`` after each event, and the last items."""
        if state is None:
            state = self.initial_state(events.num_users)
        final = self._append(events, state)
        if events.num_events == 0:
            return self.start.new_zeros(0, self.config.dim), final
        windows = covering(state.seen, events.lengths, self.config.window)
        hidden, tokens = self._attend(windows, state, events)
        # most events stand in two windows: take the one that owns them
        half = self.config.window // 2
        own = owner(tokens.age, half) * half == windows.first[tokens.window]
        own &= tokens.age >= state.seen[tokens.user]
        target = (events.offsets[tokens.user] + tokens.age - state.seen[tokens.user])[own]
        outputs = hidden.new_empty(events.num_events, self.config.dim)
        return outputs.index_copy(0, target, hidden[own]), final

    def step(self, events: Batch, state: SASRecState) -> SASRecState:
        """The window moved on by one event; attention is left to ``score``."""
        new = events.items[:, None].to(torch.int32)
        return SASRecState(torch.cat([state.items[:, 1:], new], dim=1), state.seen + 1)

    def user_embedding(self, state: SASRecState, at: Tensor | None = None) -> Tensor:
        """The user vector ``[B, D]``: attention over the last W events of each user."""
        vectors = self.start.expand(state.seen.numel(), -1)
        windows = latest(state.seen, self.config.window)
        if windows.user.numel() == 0:
            return vectors
        hidden, _ = self._attend(windows, state)
        newest = hidden[windows.lengths.cumsum(0) - 1]
        return vectors.to(newest.dtype).index_copy(0, windows.user, newest)

    def item_embeddings(self) -> ItemEmbeddings:
        """The item vectors, tied, and the item biases."""
        return ItemEmbeddings(self.items.table(), self.item_bias)

    def embeddings_of(self, items: Tensor) -> ItemEmbeddings:
        """The same of some items, without the others."""
        return ItemEmbeddings(self.items(items), self.item_bias[items])

    def _append(self, events: Batch, state: SASRecState) -> SASRecState:
        """The state after the events: the last W items of old and new ones."""
        window = self.config.window
        age = torch.arange(window, device=state.seen.device) - window
        count = state.seen + events.lengths
        users = torch.arange(count.numel(), device=count.device).repeat_interleave(window)
        age = (count[:, None] + age).flatten()
        items = items_at(users, age, state, events).view(-1, window)
        return SASRecState(items.masked_fill(age.view(-1, window) < 0, 0), count)

    def _attend(
        self, windows: Windows, state: SASRecState, events: Batch | None = None
    ) -> tuple[Tensor, Tokens]:
        """The output ``[M, D]`` of every event of every window, and which events these are."""
        tokens = tokens_of(windows)
        items = items_at(tokens.user, tokens.age, state, events)
        values = self.items(items) * self.scale + self.positions(tokens.position)
        values = self.dropout(values)
        buckets = make_buckets(windows.lengths)
        for block in self.blocks:
            values = block(values, buckets)
        outputs: Tensor = self.norm(values)
        return outputs, tokens


class SASRecBlock(nn.Module):
    """Attention and a feed-forward network, each with a norm before it and a residual (eq. 5)."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        self.heads, self.attention_dropout = config.heads, config.attention_dropout
        self.attention_norm = nn.LayerNorm(config.dim)
        self.enter = nn.Linear(config.dim, 3 * config.dim)
        self.leave = nn.Linear(config.dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.widen = nn.Linear(config.dim, config.inner * config.dim)
        self.narrow = nn.Linear(config.inner * config.dim, config.dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, values: Tensor, buckets: list[Bucket]) -> Tensor:
        """``[M, D]`` from ``[M, D]``, packed windows."""
        mixed = self._attention(self.enter(self.attention_norm(values)), buckets)
        values = values + self.dropout(self.leave(mixed))
        # eq. 4
        inner = self.dropout(functional.relu(self.widen(self.ffn_norm(values))))
        refined: Tensor = values + self.dropout(self.narrow(inner))
        return refined

    def _attention(self, entered: Tensor, buckets: list[Bucket]) -> Tensor:
        """Eq. 2 and 3: every event looks at itself and at the earlier ones of its window."""
        entered = entered.view(entered.shape[0], 3, self.heads, -1)
        dropout = self.attention_dropout if self.training else 0.0
        found = []
        for bucket in buckets:
            # [3, windows, heads, T, D / heads]; the padding stands last, so that the causal
            # mask hides it from the events
            query, key, value = entered[bucket.tokens].permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=True
            )
            found.append(mixed.transpose(1, 2).flatten(2)[bucket.valid])
        return torch.cat(found)


class Windows(NamedTuple):
    """R stretches of users' whole histories, shortest first."""

    user: Tensor  # [R] batch row
    first: Tensor  # [R] number of the first event, counted from the user's first event ever
    lengths: Tensor  # [R], at least one event and at most W


class Tokens(NamedTuple):
    """The M events of all windows, one window after the other."""

    window: Tensor  # [M]
    user: Tensor  # [M] batch row
    position: Tensor  # [M] in the window
    age: Tensor  # [M] number of the event, counted from the user's first event ever


class Bucket(NamedTuple):
    """Windows of similar length, padded to the longest by repeating their last event."""

    tokens: Tensor  # [windows, T] places among the M events
    valid: Tensor  # [windows, T]


def owner(age: Tensor, half: int) -> Tensor:
    """Which of the windows that begin at every ``half``-th event gives the output at ``age``."""
    return (age // half - 1).clamp(min=0)


def covering(count: Tensor, lengths: Tensor, window: int) -> Windows:
    """Windows that own the next ``lengths [B]`` events of users who have had ``count [B]``."""
    half, end = window // 2, count + lengths
    lowest = owner(count, half)
    number = torch.where(lengths > 0, owner(end - 1, half) - lowest + 1, 0)
    user = torch.arange(count.numel(), device=count.device).repeat_interleave(number)
    nth = torch.arange(user.numel(), device=count.device) - (number.cumsum(0) - number)[user]
    first = (lowest[user] + nth) * half
    return shortest_first(user, first, (first + window).minimum(end[user]) - first)


def latest(count: Tensor, window: int) -> Windows:
    """The last ``window`` events of every user who has any."""
    user = count.nonzero().flatten()
    lengths = count[user].clamp(max=window)
    return shortest_first(user, count[user] - lengths, lengths)


def shortest_first(user: Tensor, first: Tensor, lengths: Tensor) -> Windows:
    """The windows in order of their lengths."""
    lengths, order = lengths.sort(stable=True)
    return Windows(user[order], first[order], lengths)


def tokens_of(windows: Windows) -> Tokens:
    """The events of the windows."""
    rows = torch.arange(windows.user.numel(), device=windows.user.device)
    window = rows.repeat_interleave(windows.lengths)
    starts = windows.lengths.cumsum(0) - windows.lengths
    position = torch.arange(window.numel(), device=window.device) - starts[window]
    return Tokens(window, windows.user[window], position, windows.first[window] + position)


def items_at(users: Tensor, age: Tensor, state: SASRecState, events: Batch | None) -> Tensor:
    """The items of the events number ``age [M]`` of ``users [M]``, from the state or from new ones.

    What is older than the state remembers is undefined.
    """
    window, count = state.items.shape[1], state.seen[users]
    source, index = state.items.flatten(), users * window + (window - count + age).clamp(min=0)
    if events is None:
        return source[index]
    new = source.numel() + events.offsets[users] + age - count
    return torch.cat([source, events.items.to(torch.int32)])[torch.where(age < count, index, new)]


def make_buckets(lengths: Tensor) -> list[Bucket]:
    """Windows of ``lengths [R]``, rising, in groups that waste a fifth of their places at most."""
    known, starts = lengths.tolist(), lengths.cumsum(0) - lengths
    buckets, low = [], 0
    while low < len(known):
        longest = max(known[low] * 5 // 4, SHORT)
        most = max(1, MAX_WEIGHTS // longest**2)
        high = min(bisect_right(known, longest, lo=low), low + most)
        place = torch.arange(known[high - 1], device=lengths.device)
        last = lengths[low:high, None] - 1
        tokens = starts[low:high, None] + place.minimum(last)
        buckets.append(Bucket(tokens, place <= last))
        low = high
    return buckets
