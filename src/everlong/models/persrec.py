"""PerSRec (Zhang et al., ICDM 2025, arXiv 2601.03479), folding a stream of events; over HSTU.

What tokens, segments and summaries are: see ``persrec_core``.

The paper cuts once, so many events before the newest (see ``persrec_paper``). Here a cut stands
after every R-th event from the beginning of the history, so that summaries never change: the state
is the summaries of the last G segments and the events since, and it can be carried on for ever.

State: ``8 L G K M + 8 G`` bytes of summaries and ``12 (R + keep) + 16`` of events: 4.1 KB and
3.9 KB at L = 2, G = 1, K = 4, M = 64, R = 256, keep = 64. The events are kept as items and times
and read again for each request, because their keys and values would take ``8 L M`` bytes each
where item and time take 12.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
class StreamingPerSRecConfig(BackboneConfig):
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
class PerSRecConfig(StreamingPerSRecConfig, HSTUBackboneConfig):
    """Architecture of PerSRec on a stream, over HSTU."""


class PerSRecState(NamedTuple):
    """What PerSRec remembers of a user: summaries, the newest last, and the events since."""

    keys: Tensor  # [B, G, K, L, M]
    values: Tensor  # [B, G, K, L, M]
    group_times: Tensor  # [B, G] int64, when the last event of each summary was
    groups: Tensor  # [B] int64, how many of the last summaries are there
    items: Tensor  # [B, R + keep] int32, oldest first
    times: Tensor  # [B, R + keep] int64
    filled: Tensor  # [B] int64, how many of these there are


class Stretches(NamedTuple):
    """S segments of users' events, those of the state and then new ones."""

    user: Tensor  # [S] batch row
    nth: Tensor  # [S] folds of the user before this segment
    first: Tensor  # [S] first event
    length: Tensor  # [S] events
    asked: Tensor  # [S] the outputs of the events from this one on are wanted
    folded: Tensor  # [S] events that its tokens read, 0 for none


class StreamingPerSRec(PerSRecCore[PerSRecState]):
    """PerSRec on packed histories, with a cut after every R-th event, over any backbone.

    In training and in ``encode`` all segments are read at once. An event that is kept beyond a cut
    is read twice, at the end of one segment and at the head of the next.
    """

    def __init__(self, config: StreamingPerSRecConfig, backbone: Backbone) -> None:
        super().__init__(config.num_items)
        self.config = config
        self.reader = SummaryReader(backbone, config.tokens)

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

    def _held(self, state: PerSRecState) -> tuple[Tensor, Tensor]:
        newest = (state.filled - 1).clamp(min=0)
        return state.filled, state.times.gather(1, newest[:, None])[:, 0]

    def _layout(self, state: PerSRecState, events: Batch, *, random: bool) -> Layout:
        skipped = self._skipped(state) if random else torch.zeros_like(state.filled)
        folds, stretches = self._stretches(state, events, skipped)
        return self._segments(state, events, folds, stretches)

    def _recent(self, state: PerSRecState) -> Layout:
        rows = torch.arange(state.filled.numel(), device=state.filled.device)
        none = torch.zeros_like(rows)
        stretches = Stretches(rows, none, none, state.filled, state.filled - 1, none)
        return self._segments(state, no_events(rows.numel(), rows.device), none, stretches)

    def _skipped(self, state: PerSRecState) -> Tensor:
        """``[B]`` events that the first segment of a history lacks; in training a random number."""
        if not (self.training and self.config.random_cuts):
            return torch.zeros_like(state.filled)
        drawn = torch.randint(self.config.segment, state.filled.shape).to(state.filled.device)
        return torch.where((state.filled == 0) & (state.groups == 0), drawn, 0)

    def _stretches(
        self, state: PerSRecState, events: Batch, skipped: Tensor
    ) -> tuple[Tensor, Stretches]:
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
        return folds, Stretches(
            user,
            nth,
            first,
            stop - first,
            torch.where(nth == 0, state.filled[user], config.keep),
            torch.where(nth < folds[user], folded, 0),
        )

    def _segments(
        self, state: PerSRecState, events: Batch, folds: Tensor, stretches: Stretches
    ) -> Layout:
        """The stretches as segments, of which ``folds [B]`` of each user are folded."""
        config = self.config
        row = runs(stretches.first, stretches.length)
        owner = stretches.user.repeat_interleave(stretches.length)
        items, times = events_at(state, events, owner, row)
        tokens = torch.where(stretches.folded > 0, config.tokens, 0)
        columns, hidden = self._visible(state, folds, stretches)
        segments = Segments(
            items,
            times,
            stretches.length,
            stretches.asked,
            stretches.folded,
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
        return Layout(segments, carried, folds)

    def _visible(
        self, state: PerSRecState, folds: Tensor, stretches: Stretches
    ) -> tuple[Tensor, Tensor]:
        """Which tokens a segment sees, and how many columns are there for others' sake alone."""
        groups, tokens = self.config.groups, self.config.tokens
        visible = (state.groups[stretches.user] + stretches.nth).clamp(max=groups)
        most = int(visible.max()) if visible.numel() else 0
        # of the user's summaries, carried and then new, the newest G before this segment
        number = stretches.nth[:, None] + torch.arange(groups - most, groups, device=visible.device)
        before = folds.cumsum(0) - folds
        new = before[stretches.user][:, None] + number - groups
        old = folds.sum() + stretches.user[:, None] * groups + number
        group = torch.where(number < groups, old, new)
        columns = group[:, :, None] * tokens + torch.arange(tokens, device=group.device)
        return columns.flatten(1), (most - visible) * tokens

    def _fold(self, state: PerSRecState) -> PerSRecState:
        """Folds the first R events of each user; all users have R + keep."""
        rows = torch.arange(state.filled.numel(), device=state.filled.device)
        none = torch.zeros_like(rows)
        whole, nothing = none + self.config.segment, no_events(rows.numel(), rows.device)
        stretches = Stretches(rows, none, none, whole, whole, whole)
        layout = self._segments(state, nothing, none + 1, stretches)
        _, summaries = self.reader(layout.segments, layout.carried, none[:0])
        return self._next_state(state, nothing, layout.made, summaries)

    def _next_state(
        self, state: PerSRecState, events: Batch, made: Tensor, summaries: Summaries
    ) -> PerSRecState:
        """The states once the events are in and ``made [B]`` segments are folded."""
        config, folds = self.config, made
        filled = state.filled + events.lengths - folds * config.segment
        place = torch.arange(config.capacity, device=filled.device).expand(filled.numel(), -1)
        there = place < filled[:, None]
        owner = rows_of(filled)
        items, times = events_at(
            state, events, owner, (place + folds[:, None] * config.segment)[there]
        )
        by_group = (summaries.times.numel() // config.tokens, *state.keys.shape[2:])
        group_times = summaries.times.view(by_group[:2])[:, 0]
        return PerSRecState(
            newest_groups(state.keys, summaries.keys.view(by_group), folds),
            newest_groups(state.values, summaries.values.view(by_group), folds),
            newest_groups(state.group_times, group_times, folds),
            (state.groups + folds).clamp(max=config.groups),
            torch.zeros_like(state.items).masked_scatter(there, items.to(torch.int32)),
            torch.zeros_like(state.times).masked_scatter(there, times),
            filled,
        )


class PerSRec(StreamingPerSRec):
    """PerSRec on a stream, over HSTU."""

    config: PerSRecConfig

    def __init__(self, config: PerSRecConfig) -> None:
        positions = config.capacity + config.tokens
        reach = config.groups * config.tokens + positions
        super().__init__(config, HSTUBackbone(config, reach=reach, num_positions=positions))


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
    # an index beyond the end belongs to a user without new groups, which does not read it
    fresh = new[added.clamp(max=new.shape[0] - 1)]
    return torch.where(carried, old[user, number.clamp(max=groups - 1)], fresh)
