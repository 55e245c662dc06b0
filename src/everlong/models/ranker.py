"""What all rankers share: features of events and candidates, recent events, and the last layers.

A ranker scores the candidates of a request against a history. Trained on requests (``rank``) and
served from states (``score``), it must answer the same.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from everlong.models import state as states
from everlong.models.batch import Batch, RequestBatch
from everlong.models.state import S
from everlong.models.user_model import Task, UserModel
from everlong.ops import newest
from everlong.ops.dropout import Dropout
from everlong.ops.sets import Sets

HOUR_S, DAY_S = 3_600, 86_400
AGES = 32
"""Buckets of the age of a recent event: powers of two of seconds."""


@dataclass(frozen=True, kw_only=True)
class RankerConfig:
    """What every ranker is given.

    Attributes:
        num_items: items of the catalogue.
        dim: width D of items, events and candidates.
        heads: of all attentions.
        window: recent events W that are read one by one.
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
    window: int = 32
    candidate_attention: bool = True
    clock: bool = True
    fields: tuple[tuple[str, int], ...] = ()
    categories: tuple[tuple[str, int, int], ...] = ()
    vectors: tuple[tuple[str, int], ...] = ()
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("dim", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, received {getattr(self, name)}")
        if self.window < 0:
            raise ValueError(f"expected window >= 0, received {self.window}")
        if self.dim % self.heads:
            raise ValueError(
                f"heads share the width: expected dim a multiple of heads, received dim={self.dim} "
                f"and heads={self.heads}"
            )


class Recent(NamedTuple):
    """The last W events before each of Q requests, oldest first."""

    events: Tensor  # [Q, W, D], embedded
    age: Tensor  # [Q, W] log2 of seconds
    present: Tensor  # [Q, W] 1 or 0
    items: Tensor  # [Q, W]


class Ranker(UserModel[S]):
    """A model that scores the candidates of a request as one set.

    ``score`` takes the candidates of a user as one set; the whole catalogue is one, too. The order
    of candidates does not matter, and one that is there twice counts twice.
    """

    task: ClassVar[Task] = "rank"
    # a norm that decays: the recorded results were trained so
    weight_decay: ClassVar[Mapping[str, bool]] = {"head.0.weight": True, "item_bias.weight": False}

    def __init__(self, config: RankerConfig) -> None:
        super().__init__(config.num_items)
        self.config = config
        self.items = ItemEncoder(config)
        self.fields = nn.ModuleList(nn.Embedding(codes, config.dim) for _, codes in config.fields)
        self.hours = nn.Embedding(24, config.dim)
        self.weekdays = nn.Embedding(7, config.dim)
        self.event_norm = nn.LayerNorm(config.dim)
        self.candidate_norm = nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)
        self.head = nn.Sequential(
            nn.LayerNorm(2 * config.dim),
            nn.Linear(2 * config.dim, config.dim),
            nn.GELU(),
            nn.Linear(config.dim, 1),
        )
        self.item_bias = nn.Embedding(config.num_items, 1)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                # five times that of the other models: norms follow, so that the size only says how
                # soon updates wipe out which items are equal, and what `match` is built on
                nn.init.trunc_normal_(module.weight, std=0.1, a=-0.2, b=0.2)
            elif isinstance(module, nn.Linear):
                # products of keys and queries must differ from the first update on: with the small
                # weights of the other models a match of item and item took four times as long
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.zeros_(self.item_bias.weight)
        for module in self.modules():
            if isinstance(module, RecentReader):
                match(module.query, module.enter)

    @property
    def field_codes(self) -> Mapping[str, int]:
        """The fields of the configuration."""
        return dict(self.config.fields)

    @property
    def set_dependent(self) -> bool:
        """Whether the score of a candidate depends on the others."""
        return bool(self.config.candidate_attention)

    @abstractmethod
    def rank(self, batch: RequestBatch) -> Tensor:
        """Training: logits ``[P]`` of all candidates of all requests, one pass over each history.

        Every request is answered as ``score`` answers it from the state just before it.
        """

    def encode(self, events: Batch, state: S | None = None) -> tuple[Tensor, S]:
        """Memories ``[N, U]`` after each event, flat, and the final states.

        The memory of every event would fill the machine: for the final state alone call
        ``final_state``, to rank candidates call ``rank``.
        """
        if state is None:
            state = self.initial_state(events.num_users)
        outputs, last = [], state
        for step in one_by_one(events):
            now = self.step(step.events, states.take(last, step.rows))
            last = states.put(last, step.rows, now)
            outputs.append((step.where, self.user_embedding(now)))
        return self._in_order(outputs), last

    def forward(self, events: Batch, state: S | None = None) -> Tensor:
        """The memory ``[N, U]`` before each event, flat, at the time of that event."""
        if state is None:
            state = self.initial_state(events.num_users)
        outputs = []
        for step in one_by_one(events):
            before = states.take(state, step.rows)
            outputs.append((step.where, self.user_embedding(before, step.events.times)))
            state = states.put(state, step.rows, self.step(step.events, before))
        return self._in_order(outputs)

    def _in_order(self, outputs: list[tuple[Tensor, Tensor]]) -> Tensor:
        if not outputs:
            width = self.user_embedding(self.initial_state(1)).shape[1]
            return self.event_norm.weight.new_zeros(0, width)
        order = torch.cat([index for index, _ in outputs]).argsort()
        return torch.cat([values for _, values in outputs])[order]

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

    def _recent_of(self, batch: RequestBatch, codes: Tensor) -> Recent:
        """The last W events before each request."""
        events, size = batch.events, self.config.window
        place = batch.cut[:, None] - size + torch.arange(size, device=batch.cut.device)
        present = place >= 0
        index = torch.where(present, events.offsets[batch.user][:, None] + place, 0)
        if events.num_events > 0:
            # which of the events of one second are the last must not depend on the order of the log
            index = newest.sorted_order(events.items, events.times, codes, events.offsets)[index]
        else:
            none = self.event_norm.weight.new_zeros(*place.shape, self.config.dim)
            unknown = torch.zeros_like(place)
            return seen_from(batch.times, unknown, unknown, none, none[..., 0])
        # each event is embedded once, however many requests see it
        embedded = self._embed(events.items, events.times, codes)[index]
        times, items = events.times[index], events.items[index]
        return seen_from(batch.times, times, items, embedded, present.to(embedded.dtype))

    def _recent_at(self, held: newest.Newest, at: Tensor) -> Recent:
        """The last W of the events of states, as they look at the times ``at [B]``."""
        size = self.config.window
        times, items = held.times[:, -size:], held.items[:, -size:].long()
        events = self._embed(items, times, held.codes[:, -size:])
        return seen_from(at, times, items, events, held.present[:, -size:].to(events.dtype))

    def _enter(self, items: Tensor, context: Tensor, sets: Sets) -> Tensor:
        """Candidates ``[P, D]`` of requests whose time is ``context [Q, D]``."""
        known = self.items(items)
        entered: Tensor = self.candidate_norm(
            self.dropout(known + context[sets.rows].to(known.dtype))
        )
        return entered

    def _leave(self, values: Tensor, entered: Tensor, items: Tensor) -> Tensor:
        """Logits ``[P]`` of candidates from what was read and from what they were."""
        logits: Tensor = self.head(torch.cat([values, entered], dim=1)) + self.item_bias(items)
        return logits[:, 0]


def seen_from(at: Tensor, times: Tensor, items: Tensor, events: Tensor, present: Tensor) -> Recent:
    """Events ``[Q, W, D]`` at ``times [Q, W]`` as they look at the times ``at [Q]``."""
    age = (at[:, None] - times).clamp(min=0).to(torch.float64)
    age = (age + 1).log2().to(events.dtype) * present
    return Recent(events * present[..., None], age, present, items)


class Single(NamedTuple):
    """One event of each of some users."""

    rows: Tensor  # of the users
    where: Tensor  # their events stand in the batch
    events: Batch


def one_by_one(events: Batch) -> Iterator[Single]:
    """The first event of each user, then the second, and so on."""
    for number in range(int(events.lengths.max()) if events.num_users else 0):
        rows = (events.lengths > number).nonzero().flatten()
        where = events.offsets[rows] + number
        offsets = torch.arange(rows.numel() + 1, device=rows.device)
        yield Single(rows, where, events.select(where, offsets))


@torch.no_grad()
def match(query: nn.Linear, key: nn.Linear) -> None:
    """Makes candidates look at events of the same item from the first update on.

    Which events matter and what their outcomes are worth can only be learned together: with
    independent queries and keys neither has a gradient at first, and a log in which users like some
    groups of items was not learned at all in the updates in which this gets it right.
    """
    query.weight.copy_(key.weight[: query.out_features])


class ItemEncoder(nn.Module):
    """Items as vectors: an embedding, the mean of those of their categories, and their vectors."""

    def __init__(self, config: RankerConfig) -> None:
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

    def fill(
        self,
        categories: Mapping[str, tuple[Tensor, Tensor]],
        vectors: Mapping[str, Tensor],
    ) -> None:
        """Takes the features of the items of the catalogue.

        Args:
            categories: by name, codes and where those of each item begin, as of ``Categories``.
            vectors: by name, ``[I, V]``.

        Raises:
            ValueError: if a feature is missing or does not fit the configuration.
        """
        for names, given in ((self.names, categories), (self.vector_names, vectors)):
            for name in names:
                if name not in given:
                    raise ValueError(
                        f"expected items with a feature {name!r}, received "
                        f"{', '.join(given) or 'none'}; name it where the items are read"
                    )
        for number, name in enumerate(self.names):
            codes, offsets = categories[name]
            self._set(f"codes_{number}", codes, name)
            self._set(f"offsets_{number}", offsets, name)
            expected = self.tables[number].num_embeddings
            if codes.numel() and int(codes.max()) >= expected:  # type: ignore[operator]
                raise ValueError(
                    f"item feature {name!r}: expected codes below {expected}, received "
                    f"{int(codes.max())}"
                )
        for number, name in enumerate(self.vector_names):
            self._set(f"vectors_{number}", vectors[name], name)

    def _set(self, buffer: str, values: Tensor, name: str) -> None:
        old = getattr(self, buffer)
        if old.shape != values.shape:
            raise ValueError(
                f"item feature {name!r}: expected {tuple(old.shape)} as configured, received "
                f"{tuple(values.shape)}; build the configuration from these items"
            )
        old.copy_(values)

    def first_category(self) -> Tensor:
        """``[I]`` the first code of each item in the first column of categories."""
        codes: Tensor = self.codes_0  # type: ignore[assignment]
        offsets: Tensor = self.offsets_0  # type: ignore[assignment]
        return codes[offsets[:-1].clamp(max=codes.numel() - 1)]

    def forward(self, items: Tensor) -> Tensor:
        """Vectors ``[.., D]`` of items ``[..]``."""
        flat = items.flatten()
        vectors: Tensor = self.ids(flat)
        for number, table in enumerate(self.tables):
            weight: Tensor = table.weight  # type: ignore[assignment]
            offsets, codes = getattr(self, f"offsets_{number}"), getattr(self, f"codes_{number}")
            start, length = offsets[flat], offsets[flat + 1] - offsets[flat]
            begin = length.cumsum(0) - length
            index = torch.arange(int(length.sum()), device=flat.device)
            index = index + (start - begin).repeat_interleave(length)
            vectors = vectors + functional.embedding_bag(
                codes[index].long(), weight, begin, mode="mean"
            )
        for number, linear in enumerate(self.maps):
            vectors = vectors + linear(getattr(self, f"vectors_{number}")[flat])
        return vectors.reshape(*items.shape, vectors.shape[-1])


class FeedForward(nn.Module):
    """Norm, two products and what is between them."""

    def __init__(self, config: RankerConfig) -> None:
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


class SetAttention(nn.Module):
    """Softmax attention among the candidates of each request."""

    def __init__(self, config: RankerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.dim)
        self.enter = nn.Linear(config.dim, 3 * config.dim)
        self.leave = nn.Linear(config.dim, config.dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, values: Tensor, sets: Sets) -> Tensor:
        """What is to be added to ``values [P, D]``; in their sets."""
        qkv = self.enter(self.norm(values)).unflatten(1, (3, self.heads, -1))
        mixed = []
        for group in sets.split(qkv):
            query, key, value = group.permute(2, 0, 3, 1, 4)  # [q, H, c, E] each
            found = functional.scaled_dot_product_attention(query, key, value)
            mixed.append(found.transpose(1, 2).flatten(2))
        added: Tensor = self.dropout(self.leave(sets.join(mixed)))
        return added


class RecentReader(nn.Module):
    """Softmax attention of candidates to the last W events, which sees how old each is."""

    def __init__(self, config: RankerConfig) -> None:
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
        mixed = []
        for (request, _), asked in zip(sets.groups, sets.split(query), strict=True):
            found = functional.scaled_dot_product_attention(
                asked.transpose(1, 2),
                key[request],
                value[request],
                attn_mask=bias[request].to(asked.dtype),
            )
            found = found.masked_fill(empty[request].view(-1, 1, 1, 1), 0.0)
            mixed.append(found.transpose(1, 2).flatten(2))
        added: Tensor = self.dropout(self.leave(sets.join(mixed)))
        return added
