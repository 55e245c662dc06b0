"""Protocols, and how each cuts a log into training segments and evaluation targets.

A protocol is data, not code: its settings are written into every result. Two are named,
``PAPER`` (as LRURec's code) and ``TEMPORAL`` (a cut in time, without any look into the future).
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
        name: what results call it.
        kind: ``last-out``: of each user the last event is the test, the one before it the
            validation. ``time-cut``: everything from a point in time on is held out.
        window: events read before a target and labels of a training segment; None = all.
        min_item_events: items with fewer events go, before users (one pass, 0 = off). A
            ``time-cut`` counts training events only.
        min_user_events: users with fewer remaining events go. A ``time-cut`` only keeps them
            out of training.
        drop_immediate_repeats: an event of the same item as the user's event before it goes,
            before anything is counted.
        seen: ``mask``: items of the history that is read cannot be recommended.
        validation_share: ``time-cut``: share of the events in the validation period.
        test_share: ``time-cut``: share of the events in the test period.
        max_targets: ``time-cut``: at most so many first events a user and period; None = all.
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
                    "a time-cut needs validation_share and test_share with a sum between 0 and 1, "
                    f"received {shares[0]} and {shares[1]}; 0.1 and 0.1 are usual"
                )
        elif shares != (None, None) or self.max_targets is not None:
            raise ValueError(
                "validation_share, test_share and max_targets belong to kind 'time-cut', "
                "received them with 'last-out'; leave them out"
            )
        return self

    @property
    def held_out_share(self) -> float:
        """The share of the events that is not for training (0 for ``last-out``)."""
        return (self.validation_share or 0.0) + (self.test_share or 0.0)

    def replace(self, changes: Mapping[str, object]) -> Protocol:
        """The same protocol with some settings changed, as in ``PAPER.replace({"window": 50})``.

        Raises:
            ValueError: if a setting is unknown, or its value is not possible.
        """
        fields = type(self).model_fields
        for key in changes:
            if key not in fields:
                near = get_close_matches(key, fields, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(fields)}"
                raise ValueError(f"a protocol has no setting {key!r}; {hint}")
        return Protocol.model_validate({**self.model_dump(), **changes})


# LRURec's code filters only its raw ML-1M file (5 events an item, then 5 a user) and takes the
# others as they come, so the filter is off here; its window is 50 for the Amazon files
PAPER = Protocol(name="paper", kind="last-out", window=200, drop_immediate_repeats=True)
TEMPORAL = Protocol(
    name="temporal", kind="time-cut", validation_share=0.1, test_share=0.1, max_targets=20
)


class TrainSegments(NamedTuple):
    """Pieces of histories to train on, ``[S]`` int64 each; positions count in ``Events.items``.

    Events ``start .. stop`` are read from a fresh state, ``label_start .. stop`` are labels.
    """

    user: IntArray
    start: IntArray
    stop: IntArray
    label_start: IntArray


class Targets(NamedTuple):
    """Events to predict, ``[Q]`` int64 each; positions count in ``Events.items``.

    Events ``start .. stop`` are the history; ``stop .. end`` are predicted one by one, in order.
    """

    user: IntArray
    start: IntArray
    stop: IntArray
    end: IntArray


@dataclass(frozen=True, kw_only=True)
class Split:
    """A log ready to train on and to evaluate.

    Attributes:
        events: the log, its item rows exactly the training catalogue; user rows as before.
        facts: counts of events, targets and of whatever was left out.
    """

    protocol: Protocol
    events: Events
    train: TrainSegments
    validation: Targets
    test: Targets
    facts: Mapping[str, int]

    def record(self) -> dict[str, object]:
        """Protocol and facts as plain values for JSON; every result carries them."""
        return {"protocol": self.protocol.model_dump(mode="json"), "split": dict(self.facts)}


def split(events: Events, protocol: Protocol) -> Split:
    """A log cut as a protocol says.

    Raises:
        ValueError: if nothing is left to train on, or a time-cut meets a log without times.
    """
    if protocol.kind == "time-cut":
        return _time_cut(events, protocol)
    return _last_out(events, protocol)


def whole_histories(events: Events, *, window: int | None = None) -> TrainSegments:
    """Every user's whole history as training segments, for a final fit on all events."""
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
    # users with fewer than three events cannot give both targets: they train only
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

    # the catalogue and its filter see nothing after the cut
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
    """First second of the validation period and of the test period."""
    if events.facts.time_unit == "position":
        raise ValueError(
            f"protocol {protocol.name!r} cuts the log at a point in time, but this log has only "
            "positions, no times; use the protocol 'paper', or read the log with its timestamps"
        )
    if events.num_events == 0:
        _check_train(0, events, protocol)
    # events that share the cut's time all come after it, so a basket is never split
    held_out = [
        round(events.num_events * protocol.held_out_share),
        round(events.num_events * (protocol.test_share or 0.0)),
    ]
    ordered = np.sort(events.times)
    after_all = int(ordered[-1]) + 1
    validation_from, test_from = (int(ordered[-n]) if n else after_all for n in held_out)
    if protocol.validation_share and validation_from == test_from:
        raise ValueError(
            f"the validation period is empty: both cuts fall on the time {test_from}, because "
            f"the log's {events.num_events} events are few or share their times; "
            "use larger shares, or a longer log"
        )
    return validation_from, test_from


def _check_train(num_events: int, events: Events, protocol: Protocol) -> None:
    if num_events == 0:
        raise ValueError(
            f"protocol {protocol.name!r} leaves nothing to train on: expected at least one "
            f"training event of the log's {events.num_events}; "
            "lower min_item_events or min_user_events, or use a log that covers more time"
        )


def _first_at(events: Events, time: int) -> IntArray:
    """``[U]`` position of each user's first event at ``time`` or later."""
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
    # a history of two windows or more becomes windows, counted from its end, each a fresh
    # start; a shorter one is used once (LRURec's code, sliding windows)
    length = stop - first
    count = np.where(length >= 2 * window, length // window, 1)
    row = np.repeat(np.arange(len(users)), count)
    windows_after = np.cumsum(count)[row] - np.arange(len(row)) - 1
    segment_stop = stop[row] - windows_after * window
    label_start = np.maximum(segment_stop - window, first[row])
    # used once, its first label still has the event before it to be predicted from
    with_context = np.maximum(label_start - 1, first[row])
    start = np.where(count[row] > 1, label_start, with_context)
    return TrainSegments(users[row], start, segment_stop, label_start)


def _targets(
    users: IntArray, first: IntArray, stop: IntArray, end: IntArray, protocol: Protocol
) -> Targets:
    """Targets of those ``users`` who have any; the other arrays are of all users, ``[U]``."""
    users = users[end[users] > stop[users]]
    first, stop, end = first[users], stop[users], end[users]
    if protocol.window is not None:
        first = np.maximum(first, stop - protocol.window)
    if protocol.max_targets is not None:
        end = np.minimum(end, stop + protocol.max_targets)
    return Targets(users, first, stop, end)


def _drop_repeats(events: Events, protocol: Protocol) -> tuple[Events, dict[str, int]]:
    """The log without immediate repeats, if the protocol drops them, and how many there were."""
    if not protocol.drop_immediate_repeats or events.num_events == 0:
        return events, {"immediate_repeats": 0}
    fresh = np.ones(events.num_events, dtype=np.bool_)
    fresh[1:] = events.items[1:] != events.items[:-1]
    starts = events.offsets[:-1][events.lengths > 0]
    fresh[starts] = True
    return _keep(events, fresh), {"immediate_repeats": int((~fresh).sum())}


def _keep(events: Events, mask: NDArray[np.bool_]) -> Events:
    """The events where ``mask [N]`` holds; users keep their rows."""
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
    """The events of items where ``catalogue [I]`` holds, item rows counted among these."""
    if catalogue.all():
        return events
    kept = _keep(events, catalogue[events.items])
    row = (np.cumsum(catalogue) - 1).astype(np.int32)
    return replace(
        kept,
        items=row[kept.items],
        item_ids=IdMap.from_values(events.item_ids.ids(np.flatnonzero(catalogue))),
    )
