"""What both forms of PerSRec share: learned tokens that read segments, and attention to summaries.

A history is cut into segments. After a segment stand learned tokens, the same for all users, which
read it; what they leave behind, their keys and values in every layer, is the segment's summary.
Later events see the summaries and their own segment, and nothing else:

    visible(q, k) = k <= q and (k is a token or segment(k) == segment(q))

The two forms differ in where they cut, and in what a state keeps: ``persrec`` streams,
``persrec_paper`` cuts as published.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from everlong.models import state as states
from everlong.models.backbone import AttentionMask, Backbone, BackboneConfig
from everlong.models.batch import Batch
from everlong.models.state import S
from everlong.models.user_model import ItemEmbeddings, UserModel
from everlong.ops.attention_mask import MaskRuns, block_mask, split_runs
from everlong.ops.pointwise_attention import Blocks


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


class SummaryReader(nn.Module):
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
        positions = torch.cat([slots.position, slots.token_position])
        times = torch.cat([segments.times, slots.token_times])
        vectors = torch.cat([backbone.items(segments.items), self.tokens[segments.token_rows]])
        values = backbone.enter(vectors, positions)
        key_times = torch.cat([times, carried.times])
        of_events = event_blocks(segments, slots, torch.zeros_like(segments.asked))
        mask = AttentionMask([*of_events, *token_blocks(segments, slots)], times, key_times)
        keys, offered = [], []
        for nth, layer in enumerate(backbone.layers):
            key, value = layer.remember(values)  # type: ignore[operator]
            keys.append(key[slots.num_items :])
            offered.append(value[slots.num_items :])
            key = torch.cat([key, carried.keys[:, nth]])
            value = torch.cat([value, carried.values[:, nth]])
            if nth == len(backbone.layers) - 1:
                rows = runs(slots.start + segments.asked, segments.length - segments.asked)
                asked = event_blocks(segments, slots, segments.asked)
                values, mask = values[rows], AttentionMask(asked, query_times, key_times)
            values = layer(values, key, value, mask)
        made = Summaries(torch.stack(keys, dim=1), torch.stack(offered, dim=1), slots.token_times)
        return backbone.user_embedding(values), made


class Slots(NamedTuple):
    """Where the events and tokens of segments stand: M events, then T tokens."""

    start: Tensor  # [S] first event
    position: Tensor  # [M] of each event in its segment
    token_start: Tensor  # [S] first token, counted from the first token of all
    token_position: Tensor  # [T], after the events that it reads
    token_times: Tensor  # [T], the time of the last of these events

    @property
    def num_items(self) -> int:
        return self.position.numel()

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


def event_blocks(segments: Segments, slots: Slots, begin: Tensor) -> list[Blocks]:
    """Events from ``begin [S]`` on, which see earlier summaries and their own segment so far."""
    seen, number = segments.columns.shape[1], segments.length - begin
    owner, at, queries = split_runs(number)
    row = (number.cumsum(0) - number)[owner] + at
    mask_runs = MaskRuns(owner, row, queries, seen + begin[owner] + at, segments.hidden[owner])

    def own(segment: Tensor, position: Tensor) -> Tensor:
        return slots.start[segment] + position

    return block_mask(mask_runs, columns_of(segments, slots, own))


def token_blocks(segments: Segments, slots: Slots) -> list[Blocks]:
    """Tokens, which see earlier summaries, the events that they fold, and the tokens so far."""
    seen = segments.columns.shape[1]
    owner = segments.tokens.nonzero().flatten()
    row = slots.num_items + slots.token_start[owner]
    folded = segments.folded[owner]
    mask_runs = MaskRuns(owner, row, segments.tokens[owner], seen + folded, segments.hidden[owner])

    def own(segment: Tensor, position: Tensor) -> Tensor:
        token = position - segments.folded[segment]
        row = slots.num_items + slots.token_start[segment] + token
        return torch.where(token < 0, slots.start[segment] + position, row)

    return block_mask(mask_runs, columns_of(segments, slots, own))


def columns_of(
    segments: Segments, slots: Slots, own: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """Rows of the keys of a segment: first the summaries that it sees, then its own by position."""
    seen = segments.columns.shape[1]

    def keys_at(segment: Tensor, column: Tensor) -> Tensor:
        if seen == 0:
            return own(segment, column)
        summary = slots.num_items + segments.columns[segment, column.clamp(max=seen - 1)]
        return torch.where(column < seen, summary, own(segment, (column - seen).clamp(min=0)))

    return keys_at


class Layout(NamedTuple):
    """What is read of users: segments, what they see from before, and what comes of them."""

    segments: Segments
    carried: Summaries
    made: Tensor  # [B] how many new summaries each user gets


class PerSRecCore(UserModel[S]):
    """PerSRec over any backbone. A subclass says where histories are cut and what a state keeps."""

    config: Any
    reader: SummaryReader

    @abstractmethod
    def _held(self, state: S) -> tuple[Tensor, Tensor]:
        """``[B]`` events that a state holds one by one, and the time of the newest of them."""

    @abstractmethod
    def _layout(self, state: S, events: Batch, *, random: bool) -> Layout:
        """The segments in which the outputs after all new events are found.

        Args:
            state: of the users.
            events: the new events.
            random: cuts at random places, as in training.
        """

    @abstractmethod
    def _recent(self, state: S) -> Layout:
        """The segment of the newest events of users who have some; the newest alone is asked."""

    @abstractmethod
    def _next_state(self, state: S, events: Batch, made: Tensor, summaries: Summaries) -> S:
        """The states after new events, with the new summaries ``made [B]`` of each user."""

    def encode(self, events: Batch, state: S | None = None) -> tuple[Tensor, S]:
        """Outputs ``[N, D]`` after each event, as of its own time, and the final states."""
        if state is None:
            state = self.initial_state(events.num_users)
        layout = self._layout(state, events, random=False)
        outputs, summaries = self.reader(layout.segments, layout.carried, events.times)
        return outputs, self._next_state(state, events, layout.made, summaries)

    def outputs_at(self, events: Batch, state: S, at: Tensor) -> Tensor:
        """Outputs ``[N, D]`` after each event, as of the times ``at [N]``."""
        layout = self._layout(state, events, random=self.training)
        outputs: Tensor = self.reader(layout.segments, layout.carried, at)[0]
        return outputs

    def user_embedding(self, state: S, at: Tensor | None = None) -> Tensor:
        """The user vector ``[B, D]`` at the times ``at [B]``, default that of the newest event."""
        held, newest = self._held(state)
        some = held.nonzero().flatten()
        vectors = self.reader.backbone.without_events().expand(held.numel(), -1)
        if some.numel() == 0:
            return vectors
        layout = self._recent(states.take(state, some))
        when = (newest if at is None else at)[some]
        outputs, _ = self.reader(layout.segments, layout.carried, when)
        return vectors.index_copy(0, some, outputs.to(vectors.dtype))

    def item_embeddings(self) -> ItemEmbeddings:
        """The embedding table, tied, as unit vectors."""
        return self.reader.backbone.item_embeddings()

    def embeddings_of(self, items: Tensor) -> ItemEmbeddings:
        """The same of some items, without the others."""
        return self.reader.backbone.embeddings_of(items)


def rows_of(lengths: Tensor) -> Tensor:
    """``[N]`` which run each place belongs to, for runs of ``lengths [B]``."""
    return torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths)


def no_events(num_users: int, device: torch.device) -> Batch:
    """A batch without events."""
    none = torch.zeros(num_users + 1, dtype=torch.int64, device=device)
    return Batch(items=none[:0], times=none[:0], offsets=none)
