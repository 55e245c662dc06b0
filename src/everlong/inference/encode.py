"""From histories to states: many users, in batches of bounded size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from everlong.data.arrays import IntArray
from everlong.data.dataset import gather, plan_batches
from everlong.data.events import Events
from everlong.models.batch import Batch
from everlong.models.device import device_of, serving
from everlong.models.state import State, take
from everlong.models.user_model import UserModel
from everlong.system.threads import yielding

Progress = Callable[[int, int], None]
"""A callback that receives the amount done and the total amount."""

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
    order = np.argsort(stop - start, kind="stable")
    with serving(model):
        # a copy, because it is written to
        rows = torch.zeros(len(start), dtype=torch.int64, device=place)
        found: State = take(model.initial_state(1), rows)

    def write(rows: IntArray, state: State, events: Batch) -> None:
        index = torch.from_numpy(order[rows]).to(place)
        for stored, value in zip(found, state, strict=True):
            stored.index_copy_(0, index, value.to(stored.dtype))

    read_ranges(
        model,
        events,
        start[order],
        stop[order],
        before=lambda rows: take(found, torch.from_numpy(order[rows]).to(place)),
        after=write,
        events_per_batch=events_per_batch,
        device=place,
        progress=progress,
    )
    return found


def read_ranges(
    model: UserModel,
    events: Events,
    start: IntArray,
    stop: IntArray,
    *,
    before: Callable[[IntArray], State],
    after: Callable[[IntArray, State, Batch], None],
    events_per_batch: int = EVENTS_PER_BATCH,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> None:
    """Reads the events ``[start[q], stop[q])`` of each row q into its state, in batches.

    A row longer than ``events_per_batch`` is read in pieces, one batch after the other.

    Args:
        model: read in eval mode, without gradients.
        events: the log.
        start, stop: ``[Q]`` event positions; a row may be empty.
        before: the states of some rows, where the events are put.
        after: takes rows, their new states, and the events that were read, on the CPU.
        events_per_batch: most events read at once.
        device: where the events are put; default where the model is.
        progress: called with the events read so far and all events.
    """
    place = device_of(model) if device is None else torch.device(device)
    plan, done = plan_batches(stop - start, events_per_batch), 0
    with serving(model):
        for number in range(plan.num_batches):
            chosen = slice(plan.batch_offsets[number], plan.batch_offsets[number + 1])
            rows = plan.row[chosen]
            batch = gather(events, start[rows] + plan.begin[chosen], start[rows] + plan.end[chosen])
            after(rows, read_batch(model, batch.to(place), before(rows)), batch)
            done += batch.num_events
            if progress is not None:
                progress(done, int((stop - start).sum()))


def read_batch(model: UserModel, events: Batch, state: State) -> State:
    """The state after the events of a batch, each user's in order.

    One event of each user is a step; more are read as in training.
    """
    alone = events.num_events == events.num_users and bool((events.lengths == 1).all())
    found: State = model.step(events, state) if alone else model.final_state(events, state)
    return found


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
