"""Protocols: how a log is split into training segments and evaluation targets.

A protocol is data, not code: its settings are part of every result record. Two are built in:
``PAPER`` (leave-last-out as in LRURec's code) and ``TEMPORAL`` (a cut in time, without leakage from
the future).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from everlong.data.arrays import IntArray
from everlong.data.events import Events
from everlong.data.ids import IdMap


class Protocol(BaseModel):
    """How a log is split and how targets are ranked.

    Attributes:
        name: its name in results.
        kind: ``last-out``: the last event of each user is the test target, the event before it the
            validation target. ``time-cut``: all events from a point in time on are held out.
        window: maximum number of events of a history, and of labels of a training segment; None =
            all.
        min_item_events: items with fewer events are removed, before users (one pass, 0 = off). A
            ``time-cut`` counts training events only.
        min_user_events: users with fewer remaining events are removed; a ``time-cut`` removes them
            from training only.
        drop_immediate_repeats: an event of the same item as the user's event before it is removed,
            before anything is counted.
        seen: ``mask``: items of the history are excluded from the ranking; ``keep``: they stay.
        validation_share: ``time-cut``: share of the events in the validation period.
        test_share: ``time-cut``: share of the events in the test period.
        max_targets: ``time-cut``: maximum number of targets for each user and period, the earliest;
            None = all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Literal["last-out", "time-cut"]
    window: int | None = Field(default=None, ge=1)
    min_item_events: int = Field(default=0, ge=0)
    min_user_events: int = Field(default=0, ge=0)
    drop_immediate_repeats: bool = False
    seen: Literal["mask", "keep"] = "mask"
    validation_share: float | None = Field(default=None, ge=0, lt=1)
    test_share: float | None = Field(default=None, ge=0, lt=1)
    max_targets: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _shares_belong_to_time_cuts(self) -> Self:
        shares = (self.validation_share, self.test_share)
        if self.kind == "time-cut":
            if None in shares or not 0 < self.held_out_share < 1:
                raise ValueError(
                    "kind 'time-cut': expected validation_share and test_share with a sum between "
                    f"0 and 1, received {shares[0]} and {shares[1]}; 0.1 and 0.1 are usual"
                )
        elif shares != (None, None) or self.max_targets is not None:
            raise ValueError(
                "validation_share, test_share and max_targets belong to kind 'time-cut', "
                "received them with 'last-out'; leave them out"
            )
        return self

    @property
    def held_out_share(self) -> float:
        """The share of the events that training excludes (0 for ``last-out``)."""
        return (self.validation_share or 0.0) + (self.test_share or 0.0)

    def replace(self, changes: Mapping[str, object]) -> Protocol:
        """A copy with some settings changed, as in ``PAPER.replace({"window": 50})``.

        Raises:
            ValueError: if a setting is unknown or its value is invalid.
        """
        fields = type(self).model_fields
        for key in changes:
            if key not in fields:
                near = get_close_matches(key, fields, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(fields)}"
                raise ValueError(f"a protocol has no setting {key!r}; {hint}")
        return Protocol.model_validate({**self.model_dump(), **changes})


# LRURec's code filters only its raw ML-1M file (5 events an item, then 5 a user) and no other file,
# so the filters are off here; its window is 50 for the Amazon files
PAPER = Protocol(name="paper", kind="last-out", window=200, drop_immediate_repeats=True)
TEMPORAL = Protocol(
    name="temporal", kind="time-cut", validation_share=0.1, test_share=0.1, max_targets=20
)


class TrainSegments(NamedTuple):
    """Training segments: ranges of histories, ``[S]`` int64 each, as positions in ``Events.items``.

    Events ``start .. stop`` are read from an initial state, ``label_start .. stop`` are labels.
    """

    user: IntArray
    start: IntArray
    stop: IntArray
    label_start: IntArray


class Targets(NamedTuple):
    """Evaluation targets of users, ``[Q]`` int64 each, as positions in ``Events.items``.

    Events ``start .. stop`` are the history; ``stop .. end`` are the targets, predicted in order,
    each after all events before it.
    """

    user: IntArray
    start: IntArray
    stop: IntArray
    end: IntArray


@dataclass(frozen=True, kw_only=True)
class Split:
    """A log split into training, validation and test.

    Attributes:
        events: the log, restricted to the training catalogue; user rows are unchanged.
        facts: counts of events and targets, and of what was left out.
    """

    protocol: Protocol
    events: Events
    train: TrainSegments
    validation: Targets
    test: Targets
    facts: Mapping[str, int]

    def record(self) -> dict[str, object]:
        """Protocol and facts as JSON values, for result records."""
        return {"protocol": self.protocol.model_dump(mode="json"), "split": dict(self.facts)}


def split(events: Events, protocol: Protocol) -> Split:
    """Splits a log by a protocol.

    Raises:
        ValueError: if no training event is left, or the protocol is a time-cut and the log has no
            timestamps.
    """
    if protocol.kind == "time-cut":
        return _time_cut(events, protocol)
    return _last_out(events, protocol)


def whole_histories(events: Events, *, window: int | None = None) -> TrainSegments:
    """Training segments of every user's whole history, for a final fit on all events."""
    users = np.arange(events.num_users, dtype=np.int64)
    return _segments(users, events.offsets[:-1], events.offsets[1:], window)


def _last_out(events: Events, protocol: Protocol) -> Split:
    kept, facts = _drop_repeats(events, protocol)
    frequent = np.bincount(kept.items, minlength=kept.num_items) >= protocol.min_item_events
    before = kept.num_events
    kept = _keep(kept, frequent[kept.items])
    facts["rare_item_events"] = before - kept.num_events
    before = kept.num_events
    kept = _keep(kept, np.repeat(kept.lengths >= protocol.min_user_events, kept.lengths))
    facts["short_user_events"] = before - kept.num_events
    kept = _restrict(kept, np.bincount(kept.items, minlength=kept.num_items) > 0)
    facts["items_left_out"] = events.num_items - kept.num_items
    _check_train(kept.num_events, events, protocol)

    first, end = kept.offsets[:-1], kept.offsets[1:]
    # users with fewer than three events have no two targets: all of their events are for training
    held_out = np.where(kept.lengths >= 3, 2, 0)
    facts["users_without_targets"] = int(((kept.lengths > 0) & (held_out == 0)).sum())
    users = np.arange(kept.num_users, dtype=np.int64)
    evaluated = users[held_out > 0]
    return Split(
        protocol=protocol,
        events=kept,
        train=_segments(users, first, end - held_out, protocol.window),
        validation=_targets(evaluated, first, end - 2, end - 1, protocol),
        # the validation event is part of the test history, as published
        test=_targets(evaluated, first, end - 1, end, protocol),
        facts=facts,
    )


def _time_cut(events: Events, protocol: Protocol) -> Split:
    validation_from, test_from = _cut_times(events, protocol)
    log, facts = _drop_repeats(events, protocol)
    facts |= {"validation_from": validation_from, "test_from": test_from}

    # the catalogue and its filter count no event after the cut
    train_items = log.items[log.times < validation_from]
    counts = np.bincount(train_items, minlength=log.num_items)
    known = counts >= max(1, protocol.min_item_events)
    unknown_times = log.times[~known[log.items]]
    kept = _restrict(log, known)
    facts["items_left_out"] = events.num_items - kept.num_items
    facts["unknown_item_train_events"] = int((unknown_times < validation_from).sum())
    facts["unknown_item_history_events"] = int((unknown_times < test_from).sum())
    facts["unknown_item_test_targets"] = int((unknown_times >= test_from).sum())
    facts["unknown_item_validation_targets"] = (
        facts["unknown_item_history_events"] - facts["unknown_item_train_events"]
    )

    first, end = kept.offsets[:-1], kept.offsets[1:]
    train_stop, test_start = _first_at(kept, validation_from), _first_at(kept, test_from)
    users = np.arange(kept.num_users, dtype=np.int64)
    trained = users[train_stop - first >= max(1, protocol.min_user_events)]
    train = _segments(trained, first, train_stop, protocol.window)
    _check_train(len(train.user), events, protocol)
    validation = _targets(users, first, train_stop, test_start, protocol)
    test = _targets(users, first, test_start, end, protocol)
    facts["short_users"] = int((train_stop > first).sum()) - len(trained)
    for name, targets, held_out in (
        ("validation", validation, int((test_start - train_stop).sum())),
        ("test", test, int((end - test_start).sum())),
    ):
        facts[f"{name}_targets_over_limit"] = held_out - int((targets.end - targets.stop).sum())
        facts[f"new_users_{name}"] = int(np.isin(targets.user, trained, invert=True).sum())
    return Split(
        protocol=protocol, events=kept, train=train, validation=validation, test=test, facts=facts
    )


def _cut_times(events: Events, protocol: Protocol) -> tuple[int, int]:
    """The first second of the validation period and of the test period."""
    if events.facts.time_unit == "position":
        raise ValueError(
            f"protocol {protocol.name!r} cuts the log at a point in time: expected a log with "
            "timestamps, received positions; use the protocol 'paper', or read the log with its "
            "timestamps"
        )
    if events.num_events == 0:
        _check_train(0, events, protocol)
    # events with the timestamp of the cut are all held out, so that no basket is split
    held_out = [
        round(events.num_events * protocol.held_out_share),
        round(events.num_events * (protocol.test_share or 0.0)),
    ]
    ordered = np.sort(events.times)
    after_all = int(ordered[-1]) + 1
    validation_from, test_from = (int(ordered[-n]) if n else after_all for n in held_out)
    if protocol.validation_share and validation_from == test_from:
        raise ValueError(
            f"the validation period is empty: both cuts fall on the timestamp {test_from}, because "
            f"the log's {events.num_events} events are few or share timestamps; "
            "use larger shares, or a longer log"
        )
    return validation_from, test_from


def _check_train(num_events: int, events: Events, protocol: Protocol) -> None:
    if num_events == 0:
        raise ValueError(
            f"protocol {protocol.name!r}: expected at least one training event, received none of "
            f"the log's {events.num_events}; lower min_item_events or min_user_events, or use a "
            "log that covers more time"
        )


def _first_at(events: Events, time: int) -> IntArray:
    """The position of each user's first event at ``time`` or later, ``[U]``."""
    earlier = np.concatenate([[0], np.cumsum(events.times < time, dtype=np.int64)])
    position: IntArray = events.offsets[:-1] + np.diff(earlier[events.offsets])
    return position


def _segments(
    users: IntArray, first: IntArray, stop: IntArray, window: int | None
) -> TrainSegments:
    """Training segments of ``users``; ``first`` and ``stop`` are of all users, ``[U]``."""
    users = users[stop[users] > first[users]]
    first, stop = first[users], stop[users]
    if window is None:
        return TrainSegments(users, first, stop, first)
    # a history of two windows or more is split into windows from its end, each with an initial
    # state; a shorter history is one segment (LRURec's code, sliding windows)
    length = stop - first
    count = np.where(length >= 2 * window, length // window, 1)
    row = np.repeat(np.arange(len(users)), count)
    windows_after = np.cumsum(count)[row] - np.arange(len(row)) - 1
    segment_stop = stop[row] - windows_after * window
    label_start = np.maximum(segment_stop - window, first[row])
    # in a single segment, the event before the first label is read, so that it has an input
    with_context = np.maximum(label_start - 1, first[row])
    start = np.where(count[row] > 1, label_start, with_context)
    return TrainSegments(users[row], start, segment_stop, label_start)


def _targets(
    users: IntArray, first: IntArray, stop: IntArray, end: IntArray, protocol: Protocol
) -> Targets:
    """Targets of the ``users`` that have any; the other arrays are of all users, ``[U]``."""
    users = users[end[users] > stop[users]]
    first, stop, end = first[users], stop[users], end[users]
    if protocol.window is not None:
        first = np.maximum(first, stop - protocol.window)
    if protocol.max_targets is not None:
        end = np.minimum(end, stop + protocol.max_targets)
    return Targets(users, first, stop, end)


def _drop_repeats(events: Events, protocol: Protocol) -> tuple[Events, dict[str, int]]:
    """Drops immediate repeats if the protocol says so, and counts them."""
    if not protocol.drop_immediate_repeats or events.num_events == 0:
        return events, {"immediate_repeats": 0}
    fresh = np.ones(events.num_events, dtype=np.bool_)
    fresh[1:] = events.items[1:] != events.items[:-1]
    starts = events.offsets[:-1][events.lengths > 0]
    fresh[starts] = True
    return _keep(events, fresh), {"immediate_repeats": int((~fresh).sum())}


def _keep(events: Events, mask: NDArray[np.bool_]) -> Events:
    """The events where ``mask [N]`` is true; user rows are unchanged."""
    if mask.all():
        return events
    kept_before = np.concatenate([[0], np.cumsum(mask, dtype=np.int64)])
    return replace(
        events,
        items=events.items[mask],
        times=events.times[mask],
        fields={name: values[mask] for name, values in events.fields.items()},
        offsets=kept_before[events.offsets],
    )


def _restrict(events: Events, catalogue: NDArray[np.bool_]) -> Events:
    """The events of items where ``catalogue [I]`` is true; items are renumbered."""
    if catalogue.all():
        return events
    kept = _keep(events, catalogue[events.items])
    row = (np.cumsum(catalogue) - 1).astype(np.int32)
    return replace(
        kept,
        items=row[kept.items],
        item_ids=IdMap.from_values(events.item_ids.ids(np.flatnonzero(catalogue))),
    )
