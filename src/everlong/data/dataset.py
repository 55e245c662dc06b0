"""Packed batches of at most a given number of events: of training segments and of any ranges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everlong.data.arrays import IntArray
from everlong.data.events import Events
from everlong.data.split import TrainSegments
from everlong.models.batch import Batch


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """A batch of training events and a mask of its labels.

    Attributes:
        events: one batch row for each segment, or for a chunk of one.
        labels: ``[N]`` bool, True where the event is a label.
        carried: row 0 continues the last row of the batch before, so it starts from that row's
            final state; all other rows start from an initial state.
        continues: the segment of the last row continues in the next batch.
    """

    events: Batch
    labels: Tensor
    carried: bool
    continues: bool


class BatchPlan(NamedTuple):
    """The assignment of ranges to batches; a range longer than the budget has several chunks.

    Batch ``m`` holds the chunks ``batch_offsets[m] .. batch_offsets[m + 1]``; a chunk is the
    part ``begin .. end`` of the range ``row``.
    """

    row: IntArray  # [C]
    begin: IntArray  # [C]
    end: IntArray  # [C]
    batch_offsets: IntArray  # [M + 1]

    @property
    def num_batches(self) -> int:
        return len(self.batch_offsets) - 1


class Dataset:
    """Training segments of a log as packed batches, shuffled for each epoch.

    Args:
        events: the log; its arrays may be memory-mapped and are read batch by batch.
        segments: the training segments; those without labels are left out.
    """

    def __init__(self, events: Events, segments: TrainSegments) -> None:
        with_labels = segments.stop > segments.label_start
        self.events = events
        self.segments = TrainSegments(*(values[with_labels] for values in segments))

    @property
    def num_events(self) -> int:
        """Events read in one epoch."""
        return int((self.segments.stop - self.segments.start).sum())

    @property
    def num_labels(self) -> int:
        """Labels in one epoch; each is in exactly one batch."""
        return int((self.segments.stop - self.segments.label_start).sum())

    def item_counts(self, num_items: int) -> Tensor:
        """Counts how often each item is a label in one epoch, ``[num_items]`` int64.

        Raises:
            ValueError: if an item row of a label is not below ``num_items``.
        """
        begin, stop = self.segments.label_start, self.segments.stop
        size = self.events.num_events + 1
        covered = np.cumsum(np.bincount(begin, minlength=size) - np.bincount(stop, minlength=size))
        labels = np.repeat(self.events.items, covered[:-1])
        counts = np.bincount(labels, minlength=num_items)
        if len(counts) > num_items:
            raise ValueError(
                f"expected items of a catalogue of {num_items}, received item row "
                f"{len(counts) - 1}; build the model with num_items={self.events.num_items}"
            )
        return torch.from_numpy(counts.astype(np.int64))

    def plan(self, budget: int, *, seed: int, epoch: int) -> BatchPlan:
        """The batches of an epoch as chunks of segments; deterministic in its arguments."""
        random = np.random.Generator(np.random.PCG64([seed, epoch]))
        order = random.permutation(len(self.segments.start))
        lengths = (self.segments.stop - self.segments.start)[order]
        plan = plan_batches(lengths, budget)
        return plan._replace(row=order[plan.row])

    def num_batches(self, budget: int, *, seed: int, epoch: int) -> int:
        """The number of batches of an epoch."""
        return self.plan(budget, seed=seed, epoch=epoch).num_batches

    def batches(
        self, budget: int, *, seed: int, epoch: int, start: int = 0
    ) -> Iterator[TrainBatch]:
        """The batches of an epoch.

        Args:
            budget: maximum number of events of a batch. A segment that does not fit begins the
                next batch; one longer than the budget is split into chunks of adjacent batches.
            seed: with ``epoch``, the seed of the order of segments.
            epoch: counted from 0.
            start: number of batches to skip, without building them.

        Raises:
            ValueError: if ``budget`` is below 1, or ``start`` is not one of 0 .. num_batches.
        """
        plan = self.plan(budget, seed=seed, epoch=epoch)
        if not 0 <= start <= plan.num_batches:
            raise ValueError(
                f"expected start between 0 and {plan.num_batches}, the batches of this epoch, "
                f"received {start}; resume with the budget of the interrupted run"
            )
        return (self._batch(plan, number) for number in range(start, plan.num_batches))

    def _batch(self, plan: BatchPlan, number: int) -> TrainBatch:
        chosen = slice(plan.batch_offsets[number], plan.batch_offsets[number + 1])
        row = plan.row[chosen]
        start = self.segments.start[row] + plan.begin[chosen]
        stop = self.segments.start[row] + plan.end[chosen]
        position = _positions(start, stop)
        label_start = np.repeat(self.segments.label_start[row], stop - start)
        return TrainBatch(
            events=gather(self.events, start, stop),
            labels=torch.from_numpy(position >= label_start),
            carried=bool(plan.begin[chosen][0] > 0),
            continues=bool(stop[-1] < self.segments.stop[row[-1]]),
        )


def plan_batches(lengths: IntArray, budget: int) -> BatchPlan:
    """Packs ranges of ``lengths [R]``, in order, into batches of at most ``budget`` events.

    A range that does not fit begins the next batch. A range longer than the budget is split into
    chunks of ``budget`` events, one a batch; its last chunk may share a batch with the next ranges.
    Empty ranges are left out.

    Raises:
        ValueError: if ``budget`` is below 1.
    """
    if budget < 1:
        raise ValueError(f"expected a budget of at least 1 event a batch, received {budget}")
    count = -(-lengths // budget)
    row = np.repeat(np.arange(len(lengths), dtype=np.int64), count)
    first_chunk = np.repeat(np.cumsum(count) - count, count)
    begin = (np.arange(len(row), dtype=np.int64) - first_chunk) * budget
    end = np.minimum(begin + budget, lengths[row])
    return BatchPlan(row, begin, end, _batch_offsets(end - begin, budget))


def _batch_offsets(sizes: IntArray, budget: int) -> IntArray:
    """The first chunk of each batch, ``[M + 1]``, for a greedy fill with ``sizes [C]``."""
    ends = np.concatenate([[0], np.cumsum(sizes)])
    # for every chunk, the end of a batch that would begin there; the batches are then a chain
    next_batch = (np.searchsorted(ends, ends[:-1] + budget, side="right") - 1).tolist()
    offsets = [0]
    while offsets[-1] < len(sizes):
        offsets.append(next_batch[offsets[-1]])
    return np.asarray(offsets, dtype=np.int64)


def gather(events: Events, start: IntArray, stop: IntArray) -> Batch:
    """Copies the events ``start[b] .. stop[b]`` of a log into row ``b`` of a batch.

    Args:
        events: the log; its arrays may be memory-mapped.
        start: ``[B]`` positions in ``events.items``.
        stop: ``[B]``; equal to ``start`` for a row without events.
    """
    position = _positions(start, stop)
    offsets = np.concatenate([[0], np.cumsum(stop - start)]).astype(np.int64)
    return Batch(
        items=_tensor(events.items[position].astype(np.int64)),
        times=_tensor(events.times[position].astype(np.int64)),
        offsets=torch.from_numpy(offsets),
        fields={name: _tensor(values[position]) for name, values in events.fields.items()},
    )


def _positions(start: IntArray, stop: IntArray) -> IntArray:
    """The positions of all ranges, concatenated, ``[N]``."""
    length = stop - start
    ends = np.cumsum(length)
    total = int(ends[-1]) if len(ends) else 0
    shift: IntArray = np.repeat(start - (ends - length), length)
    return np.arange(total, dtype=np.int64) + shift


def _tensor(values: NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(np.asarray(values))
