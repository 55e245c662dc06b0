"""PerSRec over HSTU as published (arXiv 2601.03479): the past is cut off from the newest event.

The last r events are recent; the p events before them are the past, in one segment or several,
each read by its own learned tokens. Predictions come from the recent events and the summaries.
Where the cut stands depends on how many events there are: each further event moves it, and the
summaries with it, so a summary that is not made anew grows old. ``persrec`` cuts where it never
has to.

State: summaries of the past, ``8 L K M + 8 K`` bytes, and the last p + r events from which they are
made anew, ``12 (p + r) + 24``: 4 KB and 15 KB at L = 2, K = 4, M = 64, p = 1,024, r = 256.

Departures from the published code: relative biases, which count the columns that a query sees, so
that tokens of several segments stand side by side; the divisor; no tokens for empty segments; the
first event of each segment is a target and no token ever is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from everlong.models import state as states
from everlong.models.backbone import Backbone, BackboneConfig
from everlong.models.batch import Batch
from everlong.models.hstu import HSTUBackbone, HSTUBackboneConfig
from everlong.models.persrec_core import (
    Layout,
    PerSRecCore,
    Segments,
    Summaries,
    SummaryReader,
    check_depth,
    no_events,
    rows_of,
    runs,
)


@dataclass(frozen=True, kw_only=True)
class PublishedPerSRecConfig(BackboneConfig):
    """Architecture of PerSRec as published, over any backbone.

    Attributes:
        placement: ``(offset, k)`` in order: after the first ``offset`` events of the past stand k
            learned tokens, which read the events since the offset before. The last offset is p.
        recent: events r after the past. In training between r / 2 and r, drawn for each user, so
            that in every epoch the summaries are of another stretch (published: always r).
        refresh: the summaries are made anew once so many events have come since; until then
            the oldest recent events drop out unread, as many as have come. With 1 every step reads
            all p + r events.
        max_gap: in training, up to so many events between past and recent ones, drawn anew for
            each user, are seen by neither; a model that is refreshed seldom should know gaps.
    """

    placement: tuple[tuple[int, int], ...] = ((256, 4),)
    recent: int = 64
    refresh: int = 1
    max_gap: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_depth(self)
        if not self.placement:
            raise ValueError(
                "tokens stand somewhere: expected a placement of at least one (offset, tokens), "
                "received none; ((256, 4),) puts 4 after 256 events"
            )
        offset = 0
        for place, tokens in self.placement:
            if place <= offset:
                raise ValueError(
                    "each segment needs events: expected offsets with 0 < offset_1 < offset_2 < "
                    f"..., received {place} after {offset}"
                )
            if tokens < 1:
                raise ValueError(f"expected tokens >= 1 at offset {place}, received {tokens}")
            offset = place
        for name, least in (("recent", 1), ("refresh", 1), ("max_gap", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} >= {least}, received {getattr(self, name)}")

    @property
    def past(self) -> int:
        """Events p of the past."""
        return self.placement[-1][0]

    @property
    def tokens(self) -> int:
        """Learned tokens K of all segments."""
        return sum(tokens for _, tokens in self.placement)

    @property
    def longest(self) -> int:
        """Most events of a segment, and the tokens after it."""
        most = max(tokens for _, tokens in self.placement)
        return max(self.past, self.recent, self.max_gap) + most


@dataclass(frozen=True, kw_only=True)
class PublishedPerSRecHSTUConfig(PublishedPerSRecConfig, HSTUBackboneConfig):
    """Architecture of PerSRec as published, over HSTU."""


class PublishedPerSRecState(NamedTuple):
    """What the published PerSRec remembers of a user."""

    keys: Tensor  # [B, K, L, M], the newest last
    values: Tensor  # [B, K, L, M]
    token_times: Tensor  # [B, K] int64, when the last event of each token's segment was
    tokens: Tensor  # [B] int64, how many of the last tokens there are
    items: Tensor  # [B, p + r] int32, the newest last
    times: Tensor  # [B, p + r] int64
    filled: Tensor  # [B] int64, how many of the last places are filled
    age: Tensor  # [B] int64, events since the summaries were made


class Cuts(NamedTuple):
    """Where the histories of B users, counted from the oldest event at hand, are cut."""

    held: Tensor  # [B] events
    past_end: Tensor  # [B], where the past ends
    recent: Tensor  # [B] first recent event; between the two is the gap


class PublishedPerSRec(PerSRecCore[PublishedPerSRecState]):
    """PerSRec as published, over any backbone.

    All events of a batch are predicted: recent ones from summaries and what is recent before them,
    those of the past from their own segment and the summaries of earlier ones. What is older than
    p + r is read in segments of p without summaries.
    """

    exemptions: ClassVar[Mapping[int, str]] = MappingProxyType(
        {
            2: "step leaves the summaries as they are until they are made anew",
            3: "the cut is counted from the newest event of a call",
            4: "a later event moves the cut, and with it what an earlier one has seen",
            7: "training cuts once for all targets of a history, serving once for each",
        }
    )

    def __init__(self, config: PublishedPerSRecConfig, backbone: Backbone) -> None:
        super().__init__(config.num_items)
        self.config = config
        self.reader = SummaryReader(backbone, config.tokens)

    def initial_state(self, num_users: int) -> PublishedPerSRecState:
        """No events and no summaries."""
        config, start = self.config, self.reader.backbone.start
        shape = (num_users, config.tokens, config.layers, config.memory)
        whole = torch.zeros(num_users, dtype=torch.int64, device=start.device)
        times = whole[:, None].repeat(1, config.past + config.recent)
        return PublishedPerSRecState(
            start.new_zeros(shape),
            start.new_zeros(shape),
            whole[:, None].repeat(1, config.tokens),
            whole,
            times.to(torch.int32),
            times,
            whole.clone(),
            whole.clone(),
        )

    def _held(self, state: PublishedPerSRecState) -> tuple[Tensor, Tensor]:
        return state.filled, state.times[:, -1]

    def _layout(self, state: PublishedPerSRecState, events: Batch, *, random: bool) -> Layout:
        held = state.filled + events.lengths
        return self._segments(
            state, events, self._random_cuts(held) if random else self._cuts(held)
        )

    def step(self, events: Batch, state: PublishedPerSRecState) -> PublishedPerSRecState:
        """Appends one event of each user; makes summaries anew that are due."""
        state = self.append(events, state)
        due = (state.age >= self.config.refresh).nonzero().flatten()
        if due.numel():
            state = states.put(state, due, self.refresh(states.take(state, due)))
        return state

    def refresh(self, state: PublishedPerSRecState) -> PublishedPerSRecState:
        """The states with summaries made anew, of the p events before the last r."""
        nothing = no_events(state.filled.numel(), state.filled.device)
        layout = self._segments(state, nothing, self._cuts(state.filled))
        _, summaries = self.reader(layout.segments, layout.carried, nothing.times)
        return self._with_summaries(state, summaries, layout.made)

    def _recent(self, state: PublishedPerSRecState) -> Layout:
        config = self.config
        length = state.filled.clamp(max=config.recent)
        row = runs(torch.full_like(length, state.items.shape[1]) - length, length)
        owner = rows_of(length)
        none = torch.zeros_like(length)
        segments = Segments(
            state.items[owner, row].long(),
            state.times[owner, row],
            length,
            length - 1,
            none,
            none,
            none[:0],
            torch.arange(state.token_times.numel(), device=none.device).view_as(state.token_times),
            config.tokens - state.tokens,
        )
        carried = Summaries(
            state.keys.flatten(0, 1), state.values.flatten(0, 1), state.token_times.flatten()
        )
        return Layout(segments, carried, none)

    def _cuts(self, held: Tensor) -> Cuts:
        recent = (held - self.config.recent).clamp(min=0)
        return Cuts(held, recent, recent)

    def _random_cuts(self, held: Tensor) -> Cuts:
        """Between r / 2 and r recent events, and a gap of up to ``max_gap`` before them."""
        config, shape = self.config, held.shape
        draw = torch.randint((config.recent + 1) // 2, config.recent + 1, shape).to(held.device)
        gap = torch.randint(0, config.max_gap + 1, shape).to(held.device)
        recent = (held - draw).clamp(min=0)
        return Cuts(held, (recent - gap).clamp(min=0), recent)

    def _segments(self, state: PublishedPerSRecState, events: Batch, cuts: Cuts) -> Layout:
        """Segments by the cuts; every token that reads one becomes a summary."""
        pieces = self._pieces(cuts)
        length = pieces.end - pieces.begin
        row, owner = runs(pieces.begin, length), pieces.user.repeat_interleave(length)
        room, held = state.items.shape[1], state.filled[owner]
        new = state.items.numel() + events.offsets[owner] + row - held
        source = torch.where(row < held, owner * room + room - held + row, new)
        # tokens that a segment sees: those of its user's segments before it
        tokens = torch.zeros_like(cuts.held).index_add(0, pieces.user, pieces.tokens)
        before = pieces.tokens.cumsum(0) - pieces.tokens
        base = tokens.cumsum(0) - tokens
        visible = before - base[pieces.user]
        most = int(visible.max()) if visible.numel() else 0
        column = torch.arange(most, device=row.device)
        columns = (before - most)[:, None] + column
        segments = Segments(
            torch.cat([state.items.flatten().long(), events.items])[source],
            torch.cat([state.times.flatten(), events.times])[source],
            length,
            (state.filled[pieces.user] - pieces.begin).clamp(min=0).minimum(length),
            torch.where(pieces.tokens > 0, length, 0),
            pieces.tokens,
            runs(pieces.token_row, pieces.tokens),
            columns,
            most - visible,
        )
        nothing = Summaries(state.keys[:0, 0], state.values[:0, 0], state.times[:0, 0])
        return Layout(segments, nothing, tokens)

    def _pieces(self, cuts: Cuts) -> Pieces:
        """Segments of every user: older than the past, past, gap and recent."""
        config = self.config
        users = torch.arange(cuts.held.numel(), device=cuts.held.device)
        some = users[cuts.held > 0]
        found = []
        oldest = (cuts.past_end - config.past).clamp(min=0)
        count = -(-oldest // config.past)
        user = rows_of(count)
        begin = runs(torch.zeros_like(count), count) * config.past
        found.append(Pieces.plain(user, begin, (begin + config.past).minimum(oldest[user])))
        offset = token = 0
        for place, number in config.placement:
            begin = (cuts.past_end - config.past + offset).clamp(min=0)[some]
            end = (cuts.past_end - config.past + place).clamp(min=0)[some]
            # the published code gives tokens to an empty segment too, which read nothing
            tokens = torch.where(end > begin, number, 0)
            row = torch.full_like(tokens, token)
            found.append(Pieces(some, begin, end, tokens, row))
            offset, token = place, token + number
        for begin, end in ((cuts.past_end, cuts.recent), (cuts.recent, cuts.held)):
            found.append(Pieces.plain(some, begin[some], end[some]))
        joined = Pieces(*(torch.cat(values) for values in zip(*found, strict=True)))
        joined = Pieces(*(values[joined.end > joined.begin] for values in joined))
        # each user's are in order already
        order = torch.argsort(joined.user, stable=True)
        return Pieces(*(values[order] for values in joined))

    def _next_state(
        self, state: PublishedPerSRecState, events: Batch, made: Tensor, summaries: Summaries
    ) -> PublishedPerSRecState:
        """The states after the events, with ``made [B]`` summaries of users with new events."""
        busy = events.lengths > 0
        final = self._with_summaries(self.append(events, state), summaries, made)
        return PublishedPerSRecState(
            *(
                torch.where(busy.view(-1, *[1] * (new.dim() - 1)), new, old)
                for new, old in zip(final, state, strict=True)
            )
        )

    def append(self, events: Batch, state: PublishedPerSRecState) -> PublishedPerSRecState:
        """The states after the events, with the summaries as they are."""
        room, lengths = state.items.shape[1], events.lengths
        number = torch.arange(room, device=lengths.device) - room + lengths[:, None]
        new = number >= 0
        user, place = new.nonzero(as_tuple=True)
        row = events.offsets[user] + number[user, place]
        kept = (number + room).clamp(max=room - 1)
        return state._replace(
            items=state.items.gather(1, kept).masked_scatter(
                new, events.items[row].to(torch.int32)
            ),
            times=state.times.gather(1, kept).masked_scatter(new, events.times[row]),
            filled=(state.filled + lengths).clamp(max=room),
            age=state.age + lengths,
        )

    def _with_summaries(
        self, state: PublishedPerSRecState, made: Summaries, tokens: Tensor
    ) -> PublishedPerSRecState:
        """The states with these summaries, the newest last, in place of what they had."""
        most = self.config.tokens
        place = torch.arange(most, device=tokens.device) >= most - tokens[:, None]
        user, column = place.nonzero(as_tuple=True)
        where = (user, column)
        return state._replace(
            keys=torch.zeros_like(state.keys).index_put(where, made.keys),
            values=torch.zeros_like(state.values).index_put(where, made.values),
            token_times=torch.zeros_like(state.token_times).index_put(where, made.times),
            tokens=tokens,
            age=torch.zeros_like(state.age),
        )


class PublishedPerSRecHSTU(PublishedPerSRec):
    """PerSRec as published, over HSTU."""

    config: PublishedPerSRecHSTUConfig

    def __init__(self, config: PublishedPerSRecHSTUConfig) -> None:
        reach = config.tokens + config.longest
        super().__init__(config, HSTUBackbone(config, reach=reach, num_positions=config.longest))


class Pieces(NamedTuple):
    """Segments of users' events."""

    user: Tensor  # [S] batch row
    begin: Tensor  # [S] first event
    end: Tensor  # [S] one past the last
    tokens: Tensor  # [S] tokens that read it
    token_row: Tensor  # [S] the first of these among the learned tokens

    @staticmethod
    def plain(user: Tensor, begin: Tensor, end: Tensor) -> Pieces:
        """Segments without tokens of their own."""
        none = torch.zeros_like(user)
        return Pieces(user, begin, end, none, none)
