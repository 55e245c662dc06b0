"""A window of events, whose keys and values are kept: a decoder's cache as a ring.

State: keys and values of the last W events in every layer, their times, and what the last layer
reads of the newest event: ``8 L W M + 8 W + 4 D + 8`` bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from everlong.models.backbone import AttentionMask, Backbone, BackboneConfig
from everlong.models.batch import Batch
from everlong.models.user_model import ItemEmbeddings, UserModel
from everlong.ops.attention_mask import MaskRuns, block_mask, split_runs


@dataclass(frozen=True, kw_only=True)
class RingConfig(BackboneConfig):
    """Architecture of a decoder with a window.

    Attributes:
        window: events that an event sees, itself included; the whole history where it is longer
            than any history.
    """

    window: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"expected window >= 1, received {self.window}")


class RingState(NamedTuple):
    """What is remembered of a user; event n stands in place n mod W."""

    keys: Tensor  # [B, L, W, M]
    values: Tensor  # [B, L, W, M]
    times: Tensor  # [B, W] int64
    seen: Tensor  # [B] int64, events so far
    newest: Tensor  # [B, D], what the last layer reads of the newest event


class RingRun(NamedTuple):
    """What comes of reading events."""

    outputs: Tensor  # [N, D] user vectors
    memories: list[tuple[Tensor, Tensor]]  # keys and values [N, D] of each layer
    entered: Tensor  # [N, D] input of the last layer


class Ring(UserModel[RingState]):
    """A decoder on packed histories; each event sees the last W events, itself included.

    In all layers but the last, the time that a query has is that of its own event, so that keys
    and values never change once they are computed. The last layer alone has the time of the
    request (published: the time of the next event, in every layer).
    """

    def __init__(self, config: RingConfig, backbone: Backbone) -> None:
        super().__init__(config.num_items)
        self.config = config
        self.backbone = backbone

    def initial_state(self, num_users: int) -> RingState:
        """No events."""
        config, start = self.config, self.backbone.start
        # one user's zeros, seen as those of all: training begins here with every batch
        ring = start.new_zeros(1, config.layers, config.window, config.memory)
        times = torch.zeros(1, config.window, dtype=torch.int64, device=start.device)
        return RingState(
            ring.expand(num_users, -1, -1, -1),
            ring.expand(num_users, -1, -1, -1),
            times.expand(num_users, -1),
            times.new_zeros(num_users),
            start.new_zeros(num_users, config.dim),
        )

    def encode(self, events: Batch, state: RingState | None = None) -> tuple[Tensor, RingState]:
        """Outputs ``[N, D]`` after each event, as of its own time, and the final states."""
        if state is None:
            state = self.initial_state(events.num_users)
        run = self._run(events, state, events.times)
        return run.outputs, self._append(events, state, run)

    def outputs_at(self, events: Batch, state: RingState, at: Tensor) -> Tensor:
        """Outputs ``[N, D]`` after each event, as of the times ``at [N]``."""
        return self._run(events, state, at).outputs

    def user_embedding(self, state: RingState, at: Tensor | None = None) -> Tensor:
        """The user vector ``[B, D]`` at the times ``at [B]``, default that of the newest event.

        The last layer alone is computed: ``W D`` multiply-adds twice, whatever the history.
        """
        window, some = self.config.window, state.seen.nonzero().flatten()
        vectors = self.backbone.without_events().expand(state.seen.numel(), -1)
        if some.numel() == 0:
            return vectors
        seen, times = state.seen[some], state.times[some]
        visible = seen.clamp(max=window)
        rows, zero = torch.arange(some.numel(), device=some.device), torch.zeros_like(some)
        blocks = block_mask(
            MaskRuns(rows, rows, zero + 1, visible - 1, zero),
            lambda user, column: user * window + (seen[user] - visible[user] + column) % window,
        )
        at = times[rows, (seen - 1) % window] if at is None else at[some]
        key, value = (part[some, -1].flatten(0, 1) for part in (state.keys, state.values))
        mask = AttentionMask(blocks, at, times.flatten())
        outputs = self.backbone.layers[-1](state.newest[some], key, value, mask)
        return vectors.index_copy(0, some, self.backbone.user_embedding(outputs).to(vectors.dtype))

    def item_embeddings(self) -> ItemEmbeddings:
        """The embedding table, tied, as unit vectors."""
        return self.backbone.item_embeddings()

    def embeddings_of(self, items: Tensor) -> ItemEmbeddings:
        """The same of some items, without the others."""
        return self.backbone.embeddings_of(items)

    def _run(self, events: Batch, state: RingState, query_times: Tensor) -> RingRun:
        config, backbone = self.config, self.backbone
        window, carried = config.window, bool(state.seen.any())
        number = numbers(events, state.seen)
        user, begin, queries = split_runs(events.lengths)
        seen = state.seen[user]
        # columns count from the oldest event that the first query sees
        oldest = (seen + begin + 1 - window).clamp(min=0)
        mask_runs = MaskRuns(
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

        blocks = block_mask(mask_runs, keys_at, window)
        key_times = events.times
        if carried:
            key_times = torch.cat([key_times, state.times.flatten()])
        values = backbone.enter(backbone.items(events.items), number)
        memories = []
        for nth, layer in enumerate(backbone.layers):
            key, value = layer.remember(values)  # type: ignore[operator]
            memories.append((key, value))
            if carried:
                key = torch.cat([key, state.keys[:, nth].flatten(0, 1)])
                value = torch.cat([value, state.values[:, nth].flatten(0, 1)])
            is_last = nth == config.layers - 1
            entered = values
            mask = AttentionMask(blocks, query_times if is_last else events.times, key_times)
            values = layer(values, key, value, mask)
        return RingRun(backbone.user_embedding(values), memories, entered)

    def _append(self, events: Batch, state: RingState, run: RingRun) -> RingState:
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
        return RingState(
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
