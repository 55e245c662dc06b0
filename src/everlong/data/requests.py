"""Requests: candidate sets that were shown to users, each with the user's history before it.

The history of a request holds the user's events strictly before its timestamp. An event of the same
second is excluded, so that no event of a request is in its own history.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from everlong.data.arrays import IntArray
from everlong.data.dataset import gather
from everlong.data.events import Events
from everlong.data.reading import Source, read_table
from everlong.data.times import TimeUnit, parse_times, to_unix_times
from everlong.models.batch import RequestBatch

SESSION_GAP_S = 1_800
"""The pause that separates sessions: exposures after it belong to the next request."""


class RequestFacts(NamedTuple):
    """Counts of what was left out when requests were read."""

    unknown_items: int = 0  # candidates whose item is not in the catalogue
    unknown_users: int = 0  # candidates whose user is not in the log, so has no history
    duplicates: int = 0  # repeated candidates of a request
    empty_requests: int = 0  # requests without a known candidate
    incomplete_rows: int = 0  # candidates without an id or a finite timestamp


NOTHING_LEFT_OUT = RequestFacts()


@dataclass(frozen=True, kw_only=True, eq=False)
class Requests:
    """``Q`` requests with ``P`` candidates, sorted by user and timestamp.

    Attributes:
        user: ``[Q]`` int64 user row of the log.
        time: ``[Q]`` int64 Unix seconds of the first candidate.
        end: ``[Q]`` int64 Unix seconds of the last candidate.
        stop: ``[Q]`` int64; the history is the user's events before this position of the log.
        offsets: ``[Q + 1]`` int64; request ``q`` owns candidates ``offsets[q]:offsets[q + 1]``.
        items: ``[P]`` int64 item rows.
        labels: ``[P]`` float32 from 0 to 1, NaN if unknown.
        facts: counts of what was left out.
    """

    user: IntArray
    time: IntArray
    end: IntArray
    stop: IntArray
    offsets: IntArray
    items: IntArray
    labels: NDArray[np.float32]
    facts: RequestFacts = NOTHING_LEFT_OUT

    @property
    def num_requests(self) -> int:
        return len(self.user)

    @property
    def num_candidates(self) -> int:
        return len(self.items)

    @property
    def num_labels(self) -> int:
        return int((~np.isnan(self.labels)).sum())

    @property
    def request_rows(self) -> IntArray:
        """The request of each candidate, ``[P]``."""
        return np.repeat(np.arange(self.num_requests), np.diff(self.offsets))

    def select(self, rows: IntArray) -> Requests:
        """The requests at ``rows``, in that order."""
        lengths = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        shift = np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths)
        places = np.arange(int(offsets[-1])) + shift
        return replace(
            self,
            user=self.user[rows],
            time=self.time[rows],
            end=self.end[rows],
            stop=self.stop[rows],
            offsets=offsets,
            items=self.items[places],
            labels=self.labels[places],
        )

    def history_lengths(self, events: Events) -> IntArray:
        """The number of events before each request, ``[Q]``."""
        lengths: IntArray = self.stop - events.offsets[self.user]
        return lengths


def requests_from_events(
    events: Events, *, label: str = "label", request: str | None = None, gap_s: int = SESSION_GAP_S
) -> Requests:
    """Groups a log of exposures into requests; an exposure is a candidate and, later, history.

    Args:
        events: a log whose events are exposures.
        label: the event field with the outcome, from 0 to 1; NaN if unknown.
        request: the event field with the request number; adjacent events with equal numbers are one
            request. None: a pause of more than ``gap_s`` begins a new request.
        gap_s: that pause, seconds.

    Raises:
        ValueError: if a field is missing, a label is not from 0 to 1, or ``request`` is None and
            the log has no timestamps.
    """
    if request is None and events.facts.time_unit == "position":
        raise ValueError(
            "expected a log with timestamps, because pauses separate its requests, received "
            "positions; read the log with its timestamps, or name the field request="
        )
    labels = _field(events, label).astype(np.float32)
    owner = np.repeat(np.arange(events.num_users), events.lengths)
    if request is None:
        marks = np.concatenate([[0], np.cumsum(np.diff(events.times) > gap_s)])[: len(owner)]
    else:
        marks = _field(events, request)
    new = np.ones(len(owner), dtype=np.bool_)
    new[1:] = (owner[1:] != owner[:-1]) | (marks[1:] != marks[:-1])
    group = np.cumsum(new) - 1
    first = np.flatnonzero(new)
    last = np.append(first[1:], len(owner)) - 1
    times = events.times[first], events.times[last]
    return _requests(events, owner[first], times, group, events.items, labels)


def read_requests(
    source: Source,
    events: Events,
    *,
    request_id: str = "request_id",
    user_id: str = "user_id",
    item_id: str = "item_id",
    timestamp: str = "timestamp",
    label: str = "label",
    time_unit: TimeUnit | str = "auto",
) -> Requests:
    """Reads requests from a table with one row per candidate.

    The timestamp of a request is the earliest of its rows. Rows with an item or a user outside the
    log are left out and counted; a null label is unknown.

    Args:
        source: as in ``read_events``.
        events: the log of the histories.
        request_id, user_id, item_id, timestamp, label: names of the columns.
        time_unit: the unit of the timestamps, as in ``read_events``.

    Raises:
        ValueError: if columns are missing, a request has several users, or a label is not from 0 to
            1.
    """
    columns = (request_id, user_id, item_id, timestamp, label)
    frame = read_table(source, dict.fromkeys(columns, 'name the column, e.g. "{name}"'))
    rows_read = frame.height
    frame = frame.with_columns(parse_times(frame[timestamp]))
    frame = frame.drop_nulls([request_id, user_id, item_id, timestamp])
    if frame[timestamp].dtype.is_float():
        frame = frame.filter(pl.col(timestamp).is_finite())
    if frame.height == 0:
        raise ValueError(
            "expected at least one row with ids and a timestamp, received none among "
            f"{rows_read} rows"
        )
    stamps = to_unix_times(frame[timestamp], time_unit)  # type: ignore[arg-type]
    if (stamps.unit == "position") != (events.facts.time_unit == "position"):
        raise ValueError(
            f"expected timestamps like those of the log ({events.facts.time_unit}), received "
            f"{stamps.unit}: requests cannot be ordered among the events; pass time_unit="
        )
    found = pl.DataFrame(
        {
            "request": frame[request_id],
            "user_id": frame[user_id],
            "user": events.user_ids.rows(frame[user_id]),
            "item": events.item_ids.rows(frame[item_id]),
            "time": stamps.times,
            "label": _numbers(frame[label]),
        }
    )
    users = found.group_by("request").agg(pl.col("user_id").n_unique())
    if (users["user_id"] > 1).any():
        name = users.filter(pl.col("user_id") > 1)["request"][0]
        raise ValueError(f"request {name!r}: expected one user, received several")
    no_user, no_item = found["user"] < 0, found["item"] < 0
    found = found.with_columns(
        time=pl.col("time").min().over("request"), end=pl.col("time").max().over("request")
    )
    found = found.filter(~no_user & ~no_item).sort("user", "time", "request", maintain_order=True)
    group = found["request"].rle_id().to_numpy().astype(np.int64)
    first = np.unique(group, return_index=True)[1]
    user, time, end = (
        found[name].to_numpy().astype(np.int64)[first] for name in ("user", "time", "end")
    )
    labels = found["label"].fill_null(float("nan")).to_numpy().astype(np.float32)
    made = _requests(events, user, (time, end), group, found["item"].to_numpy(), labels)
    facts = made.facts._replace(
        unknown_items=int((no_item & ~no_user).sum()),
        unknown_users=int(no_user.sum()),
        empty_requests=users.height - made.num_requests,
        incomplete_rows=rows_read - frame.height,
    )
    return replace(made, facts=facts)


def _numbers(column: pl.Series) -> pl.Series:
    numbers = column.cast(pl.Float32, strict=False)
    if numbers.null_count() > column.null_count():
        wrong = column.filter(numbers.is_null() & column.is_not_null())
        raise ValueError(
            f"column {column.name!r}: expected labels from 0 to 1, received {wrong[0]!r}; "
            "encode outcomes as numbers first"
        )
    return numbers


def _field(events: Events, name: str) -> NDArray[np.generic]:
    if name not in events.fields:
        raise ValueError(
            f"expected events with a field {name!r}, received "
            f"{', '.join(events.fields) or 'none'}; read the log with fields=[{name!r}]"
        )
    values: NDArray[np.generic] = events.fields[name]
    return values


def _requests(
    events: Events,
    user: IntArray,
    times: tuple[IntArray, IntArray],
    group: IntArray,
    items: NDArray[np.integer],
    labels: NDArray[np.float32],
) -> Requests:
    """Requests of candidates ``[P]``, grouped by ``group [P]``; users and times are ``[Q]``."""
    if ((labels < 0) | (labels > 1)).any():
        raise ValueError(
            f"expected labels from 0 to 1, received {np.nanmin(labels)} to {np.nanmax(labels)}; "
            "scale them, or apply a threshold"
        )
    # a repeated item of a request is one candidate, with the largest label
    order = np.lexsort((np.arange(len(items)), items, group))
    new = np.ones(len(items), dtype=np.bool_)
    same = (group[order][1:] == group[order][:-1]) & (items[order][1:] == items[order][:-1])
    new[1:] = ~same
    kept = order[new]
    best = np.fmax.reduceat(labels[order], np.flatnonzero(new)) if len(items) else labels
    # restore the order of the exposures
    shown = np.argsort(kept, kind="stable")
    kept, best = kept[shown], best[shown]
    counts = np.bincount(group[kept], minlength=len(user))
    return Requests(
        user=user.astype(np.int64),
        time=times[0].astype(np.int64),
        end=times[1].astype(np.int64),
        stop=_stops(events, user, times[0]),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        items=items[kept].astype(np.int64),
        labels=best.astype(np.float32),
        facts=RequestFacts(duplicates=len(items) - len(kept)),
    )


def _stops(events: Events, user: IntArray, time: IntArray) -> IntArray:
    """The position after the last event of each user before a timestamp, ``[Q]``."""
    low, high = events.offsets[user].copy(), events.offsets[user + 1].copy()
    # binary searches of all requests, vectorised
    while (low < high).any():
        middle = (low + high) // 2
        open_ = low < high
        before = np.zeros(len(low), dtype=np.bool_)
        before[open_] = events.times[middle[open_]] < time[open_]
        low = np.where(before, middle + 1, low)
        high = np.where(open_ & ~before, middle, high)
    return low


class RequestSplit(NamedTuple):
    """Requests split by time into training, validation and test."""

    train: Requests
    validation: Requests
    test: Requests


def split_requests(
    requests: Requests, *, validation_share: float = 0.1, test_share: float = 0.1
) -> RequestSplit:
    """Splits requests by time; requests of one second are never in different parts.

    A request that crosses the cut after its part is left out, because some of its labels are later
    than the cut.

    Args:
        requests: all requests.
        validation_share, test_share: minimum shares of the labelled candidates, rounded.

    Raises:
        ValueError: if a part is empty, or the shares are not above 0 with a sum below 1.
    """
    if min(validation_share, test_share) <= 0 or validation_share + test_share >= 1:
        raise ValueError(
            "expected two shares above 0 with a sum below 1, received "
            f"{validation_share} and {test_share}; 0.1 and 0.1 are usual"
        )
    times = requests.time[requests.request_rows][~np.isnan(requests.labels)]
    ordered, total = np.sort(times), len(times)
    test_from, validation_from = (
        ordered[-max(1, round(total * share))] if total else 0
        for share in (test_share, validation_share + test_share)
    )
    part = (requests.time >= validation_from).astype(int) + (requests.time >= test_from)
    over = (requests.end >= validation_from).astype(int) + (requests.end >= test_from)
    parts = [requests.select(np.flatnonzero((part == n) & (over == n))) for n in range(3)]
    sizes = [found.num_requests for found in parts]
    if min(sizes) == 0:
        raise ValueError(
            "expected requests in training, validation and test, received "
            f"{', '.join(map(str, sizes))}; use a log that covers more time, or other shares"
        )
    return RequestSplit(*parts)


class RequestDataset:
    """Requests as batches of whole users, so that a history is read once for all its requests.

    Args:
        events: the log.
        requests: the requests to train on or to score; those without a label are left out.
    """

    def __init__(self, events: Events, requests: Requests) -> None:
        known = (~np.isnan(requests.labels)).astype(np.int64)
        labelled = np.add.reduceat(np.append(known, 0), requests.offsets[:-1])
        labelled[np.diff(requests.offsets) == 0] = 0
        self.rows = np.flatnonzero(labelled > 0)
        self.events = events
        # by user, then by timestamp, the order of one pass over the history
        order = np.lexsort((requests.time[self.rows], requests.user[self.rows]))
        self.rows = self.rows[order]
        self.requests = requests.select(self.rows)
        self.users, self._first = np.unique(self.requests.user, return_index=True)
        ends = np.append(self._first[1:], self.requests.num_requests)[: len(self.users)]
        self._last = ends
        seen = self.requests.stop[ends - 1] - events.offsets[self.users]
        candidates = self.requests.offsets[ends] - self.requests.offsets[self._first]
        self._sizes = seen + candidates

    @property
    def num_labels(self) -> int:
        """Labels in one epoch; each is in exactly one batch."""
        return self.requests.num_labels

    @property
    def num_requests(self) -> int:
        return self.requests.num_requests

    def num_batches(self, budget: int, *, seed: int, epoch: int) -> int:
        """The number of batches of an epoch."""
        return len(self._plan(budget, self._order(seed, epoch))) - 1

    def batches(
        self, budget: int, *, seed: int, epoch: int, start: int = 0
    ) -> Iterator[RequestBatch]:
        """The batches of an epoch, users shuffled by ``seed`` and ``epoch``.

        Args:
            budget: maximum number of events plus candidates of a batch; a user with more has a
                batch of its own.
            seed, epoch: the seed of the order of users.
            start: number of batches to skip, without building them.

        Raises:
            ValueError: if ``budget`` is below 1, or ``start`` is not one of 0 .. num_batches.
        """
        order = self._order(seed, epoch)
        plan = self._plan(budget, order)
        if not 0 <= start < len(plan):
            raise ValueError(
                f"expected start between 0 and {len(plan) - 1}, the batches of this epoch, "
                f"received {start}; resume with the budget of the interrupted run"
            )
        return self._batches(order, plan, start)

    def in_order(self, budget: int) -> Iterator[RequestBatch]:
        """All batches, users in the order of their rows."""
        order = np.arange(len(self.users))
        return self._batches(order, self._plan(budget, order), 0)

    def _order(self, seed: int, epoch: int) -> IntArray:
        random = np.random.Generator(np.random.PCG64([seed, epoch]))
        return random.permutation(len(self.users))

    def _plan(self, budget: int, order: IntArray) -> list[int]:
        """The first user of each batch, as an index into ``order``."""
        if budget < 1:
            raise ValueError(f"expected a budget of at least 1 a batch, received {budget}")
        cuts, filled = [0], 0
        for place, size in enumerate(self._sizes[order].tolist()):
            if filled and filled + size > budget:
                cuts.append(place)
                filled = 0
            filled += size
        return [*cuts, len(order)] if len(order) else [0]

    def _batches(self, order: IntArray, plan: list[int], start: int) -> Iterator[RequestBatch]:
        for begin, end in zip(plan[start:-1], plan[start + 1 :], strict=True):
            yield self._batch(order[begin:end])

    def _batch(self, chosen: IntArray) -> RequestBatch:
        counts = self._last[chosen] - self._first[chosen]
        ends = np.cumsum(counts)
        rows = np.arange(int(ends[-1])) + np.repeat(self._first[chosen] - (ends - counts), counts)
        part = self.requests.select(rows)
        start = self.events.offsets[self.users[chosen]]
        user = np.repeat(np.arange(len(chosen)), counts)
        return RequestBatch(
            events=gather(self.events, start, self.requests.stop[self._last[chosen] - 1]),
            user=torch.from_numpy(user),
            cut=torch.from_numpy(part.stop - start[user]),
            times=torch.from_numpy(part.time),
            offsets=torch.from_numpy(part.offsets),
            items=torch.from_numpy(part.items),
            labels=torch.from_numpy(part.labels),
            rows=torch.from_numpy(self.rows[rows]),
        )
