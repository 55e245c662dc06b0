"""From histories to states: many users, in batches of bounded size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from everlong.data.arrays import IntArray
from everlong.data.dataset import gather, plan_batches
from everlong.data.events import Events
from everlong.models.device import device_of, serving
from everlong.models.state import State, concat, num_users, put, take
from everlong.models.user_model import UserModel
from everlong.system.threads import yielding

Progress = Callable[[int, int], None]
"""Is told how much is done and how much there is in all."""

EVENTS_PER_BATCH = 1 << 15


@yielding()
def encode_histories(
    model: UserModel,
    events: Events,
    start: IntArray,
    stop: IntArray,
    *,
    events_per_batch: int = EVENTS_PER_BATCH,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> State:
    """The state after the events ``[start[q], stop[q])`` of each row q: ``Q`` users.

    IntArray of similar length are read together. A row longer than ``events_per_batch`` is read in
    pieces, its state carried from one to the next.

    Args:
        model: read in eval mode, without gradients.
        events: the log.
        start: ``[Q]`` event positions.
        stop: ``[Q]`` event positions; a row may be empty.
        events_per_batch: most events read at once.
        device: where the events are put; default where the model is.
        progress: called with the events read so far and all events.

    Raises:
        ValueError: if ``start`` and ``stop`` do not fit each other or the log, or
            ``events_per_batch`` is below 1.
    """
    check_ranges(events, start, stop)
    place = device_of(model) if device is None else torch.device(device)
    lengths = stop - start
    # empty rows come first, which no batch brings
    order = np.argsort(lengths, kind="stable")
    plan = plan_batches(lengths[order], events_per_batch)
    done = 0
    with serving(model):
        parts = [model.initial_state(int(np.count_nonzero(lengths == 0)))]
        for number in range(plan.num_batches):
            chosen = slice(plan.batch_offsets[number], plan.batch_offsets[number + 1])
            begin, end = plan.begin[chosen], plan.end[chosen]
            first = start[order[plan.row[chosen]]]
            batch = gather(events, first + begin, first + end)
            state = model.initial_state(batch.num_users)
            if begin[0] > 0:
                parts[-1], unfinished = _split_last(parts[-1])
                state = put(state, torch.zeros(1, dtype=torch.int64, device=place), unfinished)
            parts.append(model.final_state(batch.to(place), state))
            done += batch.num_events
            if progress is not None:
                progress(done, int(lengths.sum()))
    back = torch.from_numpy(np.argsort(order)).to(parts[0][0].device)
    return take(concat(parts), back)


def _split_last(state: State) -> tuple[State, State]:
    """The states of all users but the last, and that of the last."""
    rows = torch.arange(num_users(state), device=state[0].device)
    return take(state, rows[:-1]), take(state, rows[-1:])


def check_ranges(events: Events, start: IntArray, stop: IntArray) -> None:
    """Raises ``ValueError`` unless ``[start, stop)`` are ranges of events of the log."""
    if start.shape != stop.shape:
        raise ValueError(
            f"each range needs a start and a stop: received {start.size} and {stop.size}"
        )
    wrong = (start < 0) | (stop < start) | (stop > events.num_events)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"expected 0 <= start <= stop <= {events.num_events} (events of the log), received "
            f"[{start[row]}, {stop[row]}) in row {row}; use ranges of a split of the same log"
        )
