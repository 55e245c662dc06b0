"""PerSRec (Zhang et al., ICDM 2025, arXiv 2601.03479), folding a stream of events; over HSTU.

A history is cut into segments. After each segment stand K learned tokens, the same for all users,
which read it; what they leave behind, their keys and values in every layer, is the segment's
summary. Later events see the summaries and their own segment, and nothing else:

    visible(q, k) = k <= q and (k is a token or segment(k) == segment(q))

The paper cuts once, so many events before the newest (see ``persrec_paper``). Here a cut stands
after every R-th event from the beginning of the history, so that summaries never change: the state
is the summaries of the last G segments and the events since, and it can be carried on for ever.

State: ``8 L G K M + 8 G`` bytes of summaries and ``12 (R + keep) + 16`` of events: 4.1 KB and
3.9 KB at L = 2, G = 1, K = 4, M = 64, R = 256, keep = 64. The events are kept as items and times
and read again for each request, because their keys and values would take ``8 L M`` bytes each
where item and time take 12.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from everlong.models import state as states
from everlong.models.backbone import Backbone, BackboneConfig, Sight
from everlong.models.batch import Batch
from everlong.models.hstu import HSTUBackbone, HSTUBackboneConfig
from everlong.models.ring import first_times, next_times
from everlong.models.user_model import ItemEmbeddings, UserModel, shift
from everlong.ops.pointwise_attention import Blocks
from everlong.ops.spans import Spans, make_plan, split_runs


@dataclass(frozen=True, kw_only=True)
class StreamConfig(BackboneConfig):
    """Architecture of PerSRec on a stream, over any backbone.

    Attributes:
        segment: events R of a segment.
        tokens: learned tokens K that read a segment.
        groups: summaries G that are kept; with one more the oldest leaves.
        keep: events before a cut that are still seen after it, beside their summary, until the
            next cut. With 0, as published, the first event after a cut sees summaries alone.
        random_cuts: in training, where a history begins, its first segment has a random length,
            so that in every epoch the summaries are of other stretches.
    """

    segment: int = 256
    tokens: int = 4
    groups: int = 1
    keep: int = 64
    random_cuts: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_depth(self)
        for name in ("segment", "tokens", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, received {getattr(self, name)}")
        if not 0 <= self.keep <= self.segment:
            raise ValueError(
                "what is kept was in the segment before the cut: expected 0 <= keep <= segment, "
                f"received keep={self.keep} and segment={self.segment}"
            )

    @property
    def capacity(self) -> int:
        """Most events that are not folded yet."""
        return self.segment + self.keep


@dataclass(frozen=True, kw_only=True)
class PerSRecConfig(StreamConfig, HSTUBackboneConfig):
    """Architecture of PerSRec on a stream, over HSTU."""


def check_depth(config: BackboneConfig) -> None:
    """Raises ``ValueError`` unless there are layers enough for a summary to say anything.

    What the first layer offers of a token is the same for all users: only from the second layer on
    has it read events. From one summary on to the next takes a third.
    """
    if config.layers < 2:
        raise ValueError(
            "tokens have read nothing before the second layer: expected layers >= 2, received "
            f"{config.layers}"
        )


class PerSRecState(NamedTuple):
    """What PerSRec remembers of a user: summaries, the newest last, and the events since."""

    keys: Tensor  # [B, G, K, L, M]
    values: Tensor  # [B, G, K, L, M]
    group_times: Tensor  # [B, G] int64, when the last event of each summary was
    groups: Tensor  # [B] int64, how many of the last summaries are there
    items: Tensor  # [B, R + keep] int32, oldest first
    times: Tensor  # [B, R + keep] int64
    filled: Tensor  # [B] int64, how many of these there are


class Segments(NamedTuple):
    """S segments laid out for attention: their events, and after them the tokens that read them.

    ``columns`` are rows among the tokens of all segments, in order, and then the carried ones.
    """

    items: Tensor  # [M] events of all segments, one segment after the other
    times: Tensor  # [M]
    length: Tensor  # [S] events
    asked: Tensor  # [S] the outputs of the events from this one on are wanted
    folded: Tensor  # [S] events that the tokens read, from the first
    tokens: Tensor  # [S] tokens that follow, 0 for none
    token_rows: Tensor  # [T] which learned token each is
    columns: Tensor  # [S, m] tokens that the segment sees
    hidden: Tensor  # [S] how many of the first columns do not count, and may say anything


class Summaries(NamedTuple):
    """Keys and values that tokens have left behind."""

    keys: Tensor  # [T, L, M]
    values: Tensor  # [T, L, M]
    times: Tensor  # [T] int64


class Reader(nn.Module):
    """A backbone and the learned tokens: attention over segments and summaries.

    Args:
        backbone: the layers.
        num_tokens: learned tokens.
    """

    def __init__(self, backbone: Backbone, num_tokens: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.tokens = nn.Parameter(torch.empty(num_tokens, backbone.start.numel()))
        nn.init.trunc_normal_(self.tokens, std=0.02, a=-0.04, b=0.04)

    def forward(
        self, segments: Segments, carried: Summaries, query_times: Tensor
    ) -> tuple[Tensor, Summaries]:
        """What the last layer makes of the events that are asked for, and the new summaries.

        Args:
            segments: S segments with M events and T tokens.
            carried: summaries from before.
            query_times: of the events that are asked for, as the last layer has them.

        Returns:
            User vectors, in the order of the events, and summaries ``[T]``.
        """
        slots, backbone = Slots.of(segments), self.backbone
        places = torch.cat([slots.place, slots.token_place])
        times = torch.cat([segments.times, slots.token_times])
        vectors = torch.cat([backbone.items(segments.items), self.tokens[segments.token_rows]])
        values = backbone.enter(vectors, places)
        key_times = torch.cat([times, carried.times])
        everyone = item_plan(segments, slots, torch.zeros_like(segments.asked))
        sight = Sight([*everyone, *token_plan(segments, slots)], times, key_times)
        keys, offered = [], []
        for nth, layer in enumerate(backbone.layers):
            key, value = layer.remember(values)  # type: ignore[operator]
            keys.append(key[slots.num_items :])
            offered.append(value[slots.num_items :])
            key = torch.cat([key, carried.keys[:, nth]])
            value = torch.cat([value, carried.values[:, nth]])
            if nth == len(backbone.layers) - 1:
                rows = runs(slots.start + segments.asked, segments.length - segments.asked)
                asked = item_plan(segments, slots, segments.asked)
                values, sight = values[rows], Sight(asked, query_times, key_times)
            values = layer(values, key, value, sight)
        made = Summaries(torch.stack(keys, dim=1), torch.stack(offered, dim=1), slots.token_times)
        return backbone.user_embedding(values), made


class Slots(NamedTuple):
    """Where the events and tokens of segments stand: M events, then T tokens."""

    start: Tensor  # [S] first event
    place: Tensor  # [M] of each event in its segment
    token_start: Tensor  # [S] first token, counted from the first token of all
    token_place: Tensor  # [T], after the events that it reads
    token_times: Tensor  # [T], the time of the last of these events

    @property
    def num_items(self) -> int:
        return self.place.numel()

    @staticmethod
    def of(segments: Segments) -> Slots:
        """The slots of segments."""
        length, tokens = segments.length, segments.tokens
        start, token_start = length.cumsum(0) - length, tokens.cumsum(0) - tokens
        segment = torch.arange(length.numel(), device=length.device)
        owner = segment.repeat_interleave(tokens)
        nth = torch.arange(owner.numel(), device=length.device) - token_start[owner]
        folded = segments.folded[owner]
        last = start[owner] + folded - 1
        return Slots(
            start,
            runs(torch.zeros_like(length), length),
            token_start,
            folded + nth,
            segments.times[last],
        )


def runs(start: Tensor, length: Tensor) -> Tensor:
    """The numbers ``start .. start + length - 1`` of every run, one run after the other."""
    first = start - (length.cumsum(0) - length)
    total = int(length.sum())
    return torch.arange(total, device=start.device) + first.repeat_interleave(
        length, output_size=total
    )


def item_plan(segments: Segments, slots: Slots, begin: Tensor) -> list[Blocks]:
    """Events from ``begin [S]`` on, which see earlier summaries and their own segment so far."""
    seen, number = segments.columns.shape[1], segments.length - begin
    owner, at, queries = split_runs(number)
    row = (number.cumsum(0) - number)[owner] + at
    spans = Spans(owner, row, queries, seen + begin[owner] + at, segments.hidden[owner])

    def own(segment: Tensor, place: Tensor) -> Tensor:
        return slots.start[segment] + place

    return make_plan(spans, columns_of(segments, slots, own))


def token_plan(segments: Segments, slots: Slots) -> list[Blocks]:
    """Tokens, which see earlier summaries, the events that they fold, and the tokens so far."""
    seen = segments.columns.shape[1]
    owner = segments.tokens.nonzero().flatten()
    row = slots.num_items + slots.token_start[owner]
    folded = segments.folded[owner]
    spans = Spans(owner, row, segments.tokens[owner], seen + folded, segments.hidden[owner])

    def own(segment: Tensor, place: Tensor) -> Tensor:
        token = place - segments.folded[segment]
        row = slots.num_items + slots.token_start[segment] + token
        return torch.where(token < 0, slots.start[segment] + place, row)

    return make_plan(spans, columns_of(segments, slots, own))


def columns_of(
    segments: Segments, slots: Slots, own: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Rows of the keys of a segment: first the summaries that it sees, then its own by place."""
    seen = segments.columns.shape[1]

    def keys_at(segment: Tensor, column: Tensor) -> Tensor:
        if seen == 0:
            return own(segment, column)
        summary = slots.num_items + segments.columns[segment, column.clamp(max=seen - 1)]
        return torch.where(column < seen, summary, own(segment, (column - seen).clamp(min=0)))

    return keys_at


class Cuts(NamedTuple):
    """S segments of users' events, those of the state and then new ones."""

    user: Tensor  # [S] batch row
    nth: Tensor  # [S] folds of the user before this segment
    first: Tensor  # [S] first event
    length: Tensor  # [S] events
    asked: Tensor  # [S] the outputs of the events from this one on are wanted
    folded: Tensor  # [S] events that its tokens read, 0 for none


class Stream(UserModel[PerSRecState]):
    """PerSRec on packed histories, with a cut after every R-th event, over any backbone.

    In training and in ``encode`` all segments are read at once. An event that is kept beyond a cut
    is read twice, at the end of one segment and at the head of the next.
    """

    def __init__(self, config: StreamConfig, backbone: Backbone) -> None:
        super().__init__(config.num_items)
        self.config = config
        self.reader = Reader(backbone, config.tokens)

    def initial_state(self, num_users: int) -> PerSRecState:
        """No events and no summaries."""
        config, start = self.config, self.reader.backbone.start
        shape = (num_users, config.groups, config.tokens, config.layers, config.memory)
        whole = torch.zeros(num_users, dtype=torch.int64, device=start.device)
        times = whole[:, None].repeat(1, config.capacity)
        return PerSRecState(
            start.new_zeros(shape),
            start.new_zeros(shape),
            whole[:, None].repeat(1, config.groups),
            whole,
            times.to(torch.int32),
            times,
            whole.clone(),
        )

    def encode(
        self, events: Batch, state: PerSRecState | None = None
    ) -> tuple[Tensor, PerSRecState]:
        """Outputs ``[N, D]`` after each event, as of its own time, and the final states."""
        if state is None:
            state = self.initial_state(events.num_users)
        skipped = torch.zeros_like(state.filled)
        folds, cuts = self._cuts(state, events, skipped)
        outputs, made = self._read(state, events, folds, cuts, events.times)
        return outputs, self._after(state, events, folds, made)

    def forward(self, events: Batch, state: PerSRecState | None = None) -> Tensor:
        """The user vector ``[N, D]`` before each event, at the time of that event."""
        if state is None:
            state = self.initial_state(events.num_users)
        if events.num_events == 0:
            return self.reader.backbone.start.new_zeros(0, self.config.dim)
        folds, cuts = self._cuts(state, events, self._skipped(state))
        outputs, _ = self._read(state, events, folds, cuts, next_times(events))
        return shift(outputs, self.user_embedding(state, first_times(events)), events.offsets)

    def step(self, events: Batch, state: PerSRecState) -> PerSRecState:
        """Appends one event of each user; where there is no place for it, folds a segment first."""
        full = (state.filled == self.config.capacity).nonzero().flatten()
        if full.numel():
            state = states.put(state, full, self._fold(states.take(state, full)))
        where = (torch.arange(events.num_users, device=full.device), state.filled)
        return state._replace(
            items=state.items.index_put(where, events.items.to(torch.int32)),
            times=state.times.index_put(where, events.times),
            filled=state.filled + 1,
        )

    def user_embedding(self, state: PerSRecState, at: Tensor | None = None) -> Tensor:
        """The user vector ``[B, D]`` at the times ``at [B]``, default that of the newest event."""
        some = state.filled.nonzero().flatten()
        vectors = self.reader.backbone.nobody().expand(state.filled.numel(), -1)
        if some.numel() == 0:
            return vectors
        state = states.take(state, some)
        newest = state.filled - 1
        at = state.times.gather(1, newest[:, None])[:, 0] if at is None else at[some]
        rows, none = torch.arange(newest.numel(), device=newest.device), torch.zeros_like(newest)
        cuts = Cuts(rows, none, none, state.filled, newest, none)
        nothing = Batch(items=none[:0], times=none[:0], offsets=torch.cat([none, none[:1]]))
        outputs, _ = self._read(state, nothing, none, cuts, at)
        return vectors.index_copy(0, some, outputs.to(vectors.dtype))

    def item_embeddings(self) -> ItemEmbeddings:
        """The embedding table, tied, as unit vectors."""
        return self.reader.backbone.item_embeddings()

    def embeddings_of(self, items: Tensor) -> ItemEmbeddings:
        """The same of some items, without the others."""
        return self.reader.backbone.embeddings_of(items)

    def _skipped(self, state: PerSRecState) -> Tensor:
        """``[B]`` events that the first segment of a history lacks; in training a random number."""
        if not (self.training and self.config.random_cuts):
            return torch.zeros_like(state.filled)
        drawn = torch.randint(self.config.segment, state.filled.shape).to(state.filled.device)
        return torch.where((state.filled == 0) & (state.groups == 0), drawn, 0)

    def _cuts(self, state: PerSRecState, events: Batch, skipped: Tensor) -> tuple[Tensor, Cuts]:
        """How many segments of each user are folded, and segments that cover the new events."""
        config, held = self.config, state.filled + events.lengths
        beyond = (held + skipped - config.capacity).clamp(min=0)
        folds: Tensor = -(-beyond // config.segment)
        number = torch.where(events.lengths > 0, folds + 1, 0)
        user = rows_of(number)
        nth = runs(torch.zeros_like(number), number)
        first = (nth * config.segment - skipped[user]).clamp(min=0)
        stop = (nth * config.segment - skipped[user] + config.capacity).minimum(held[user])
        folded = (nth + 1) * config.segment - skipped[user] - first
        return folds, Cuts(
            user,
            nth,
            first,
            stop - first,
            torch.where(nth == 0, state.filled[user], config.keep),
            torch.where(nth < folds[user], folded, 0),
        )

    def _read(
        self, state: PerSRecState, events: Batch, folds: Tensor, cuts: Cuts, query_times: Tensor
    ) -> tuple[Tensor, Summaries]:
        """Outputs that the cuts ask for, and the summaries of those segments that are folded."""
        config = self.config
        row = runs(cuts.first, cuts.length)
        owner = cuts.user.repeat_interleave(cuts.length)
        items, times = events_at(state, events, owner, row)
        tokens = torch.where(cuts.folded > 0, config.tokens, 0)
        columns, hidden = self._visible(state, folds, cuts)
        segments = Segments(
            items,
            times,
            cuts.length,
            cuts.asked,
            cuts.folded,
            tokens,
            runs(torch.zeros_like(tokens), tokens),
            columns,
            hidden,
        )
        some = slice(None) if bool(state.groups.any()) else slice(0)
        carried = Summaries(
            state.keys.flatten(0, 2)[some],
            state.values.flatten(0, 2)[some],
            state.group_times.flatten().repeat_interleave(config.tokens)[some],
        )
        outputs: tuple[Tensor, Summaries] = self.reader(segments, carried, query_times)
        return outputs

    def _visible(self, state: PerSRecState, folds: Tensor, cuts: Cuts) -> tuple[Tensor, Tensor]:
        """Which tokens a segment sees, and how many columns are there for others' sake alone."""
        groups, tokens = self.config.groups, self.config.tokens
        visible = (state.groups[cuts.user] + cuts.nth).clamp(max=groups)
        most = int(visible.max()) if visible.numel() else 0
        # of the user's summaries, carried and then new, the newest G before this segment
        number = cuts.nth[:, None] + torch.arange(groups - most, groups, device=visible.device)
        before = folds.cumsum(0) - folds
        new = before[cuts.user][:, None] + number - groups
        old = folds.sum() + cuts.user[:, None] * groups + number
        group = torch.where(number < groups, old, new)
        columns = group[:, :, None] * tokens + torch.arange(tokens, device=group.device)
        return columns.flatten(1), (most - visible) * tokens

    def _fold(self, state: PerSRecState) -> PerSRecState:
        """The states after the first R events of each, who all have R + keep, are folded."""
        config = self.config
        rows = torch.arange(state.filled.numel(), device=state.filled.device)
        none = torch.zeros_like(rows)
        whole = none + config.segment
        cuts = Cuts(rows, none, none, whole, whole, whole)
        nothing = Batch(items=none[:0], times=none[:0], offsets=torch.cat([none, none[:1]]))
        _, made = self._read(state, nothing, none + 1, cuts, none[:0])
        return self._after(state, nothing, none + 1, made)

    def _after(
        self, state: PerSRecState, events: Batch, folds: Tensor, made: Summaries
    ) -> PerSRecState:
        """The state once the events are in and so many segments are folded."""
        config = self.config
        filled = state.filled + events.lengths - folds * config.segment
        place = torch.arange(config.capacity, device=filled.device).expand(filled.numel(), -1)
        there = place < filled[:, None]
        owner = rows_of(filled)
        items, times = events_at(
            state, events, owner, (place + folds[:, None] * config.segment)[there]
        )
        by_group = (made.times.numel() // config.tokens, *state.keys.shape[2:])
        group_times = made.times.view(by_group[:2])[:, 0]
        return PerSRecState(
            newest_groups(state.keys, made.keys.view(by_group), folds),
            newest_groups(state.values, made.values.view(by_group), folds),
            newest_groups(state.group_times, group_times, folds),
            (state.groups + folds).clamp(max=config.groups),
            torch.zeros_like(state.items).masked_scatter(there, items.to(torch.int32)),
            torch.zeros_like(state.times).masked_scatter(there, times),
            filled,
        )


class PerSRec(Stream):
    """PerSRec on a stream, over HSTU."""

    config: PerSRecConfig

    def __init__(self, config: PerSRecConfig) -> None:
        places = config.capacity + config.tokens
        reach = config.groups * config.tokens + places
        super().__init__(config, HSTUBackbone(config, reach=reach, places=places))


def rows_of(lengths: Tensor) -> Tensor:
    """``[N]`` which run each place belongs to, for runs of ``lengths [B]``."""
    return torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths)


def events_at(
    state: PerSRecState, events: Batch, user: Tensor, number: Tensor
) -> tuple[Tensor, Tensor]:
    """Items and times of events of users, counted from the first that the state holds."""
    held, room = state.filled[user], state.items.shape[1]
    new = state.items.numel() + events.offsets[user] + number - held
    row = torch.where(number < held, user * room + number, new)
    items = torch.cat([state.items.flatten().long(), events.items])[row]
    return items, torch.cat([state.times.flatten(), events.times])[row]


def newest_groups(old: Tensor, new: Tensor, folds: Tensor) -> Tensor:
    """The last G of the groups ``old [B, G, ..]`` and the new ones, ``folds [B]`` of each user."""
    groups = old.shape[1]
    if new.shape[0] == 0:
        return old
    number = folds[:, None] + torch.arange(groups, device=folds.device)
    added = ((folds.cumsum(0) - folds)[:, None] + number - groups).clamp(min=0)
    user = torch.arange(folds.numel(), device=folds.device)[:, None]
    carried = (number < groups).reshape(*number.shape, *[1] * (old.dim() - 2))
    # an index beyond the end belongs to a user without new groups, who does not look at it
    fresh = new[added.clamp(max=new.shape[0] - 1)]
    return torch.where(carried, old[user, number.clamp(max=groups - 1)], fresh)
