"""Events: a log as flat arrays, grouped by user, each user's events oldest first."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import polars as pl

from everlong.data.ids import IdMap
from everlong.data.reading import Source, describe, read_table
from everlong.data.times import TimeUnit, UnixTimes, parse_times, to_unix_times

Ties = Literal["stable", "random"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EventFacts:
    """How a log was read; part of every result record.

    Attributes:
        source: the files, or the type of the frame.
        rows_read: rows of the source.
        rows_skipped: number of skipped rows by reason.
        time_unit: unit of the timestamps of the source.
        ties: order of a user's events with equal timestamps: as in the source, or shuffled.
        seed: seed of that shuffle.
        finer_pairs: adjacent pairs within one second that fractions of the second order.
        messages: what the reader detected or noticed, for the user.
    """

    source: str = ""
    rows_read: int = 0
    rows_skipped: Mapping[str, int] = field(default_factory=dict)
    time_unit: TimeUnit = "s"
    ties: Ties = "stable"
    seed: int = 0
    finer_pairs: int = 0
    messages: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Events:
    """``N`` events of ``U`` users; user ``u`` owns ``offsets[u]:offsets[u + 1]``, oldest first.

    Attributes:
        items: ``[N]`` int32, item rows.
        times: ``[N]`` int64, Unix seconds, or positions if ``facts.time_unit == "position"``.
        offsets: ``[U + 1]`` int64, from 0 to N, non-decreasing.
        fields: event fields by name, ``[N]`` int64 or float32 each.
        user_ids: external user id <-> user row.
        item_ids: external item id <-> item row.
        facts: how the log was read.
    """

    items: np.ndarray
    times: np.ndarray
    offsets: np.ndarray
    fields: Mapping[str, np.ndarray] = field(default_factory=dict)
    user_ids: IdMap
    item_ids: IdMap
    facts: EventFacts = field(default_factory=EventFacts)

    def __post_init__(self) -> None:
        for name, array, dtype in (
            ("items", self.items, np.int32),
            ("times", self.times, np.int64),
            ("offsets", self.offsets, np.int64),
        ):
            if array.dtype != dtype or array.ndim != 1:
                raise ValueError(
                    f"{name}: expected one axis of {np.dtype(dtype)}, "
                    f"received shape {array.shape} of {array.dtype}"
                )
        for name, array in {"times": self.times, **self.fields}.items():
            if array.shape != self.items.shape:
                raise ValueError(
                    f"{name}: expected one value per event {self.items.shape}, "
                    f"received {array.shape}"
                )
        offsets = self.offsets
        if len(offsets) != len(self.user_ids) + 1:
            raise ValueError(
                f"offsets: expected {len(self.user_ids) + 1} for {len(self.user_ids)} users, "
                f"received {len(offsets)}"
            )
        if offsets[0] != 0 or offsets[-1] != len(self.items) or (np.diff(offsets) < 0).any():
            raise ValueError(
                f"offsets: expected to rise from 0 to {len(self.items)} events, "
                f"received {offsets[0]} to {offsets[-1]}"
            )

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def num_events(self) -> int:
        return len(self.items)

    @property
    def lengths(self) -> np.ndarray:
        """``[U]`` int64, events of each user."""
        return np.diff(self.offsets)

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 (hex) of items, times, offsets and ids: it identifies the training data."""
        digest = hashlib.sha256()
        for array in (self.items, self.times, self.offsets):
            digest.update(np.ascontiguousarray(array).data)
        digest.update((self.user_ids.fingerprint + self.item_ids.fingerprint).encode())
        return digest.hexdigest()

    def user_slice(self, row: int) -> slice:
        """The slice of one user's events in ``items``, ``times`` and ``fields``.

        Raises:
            IndexError: if the row is not between 0 and ``num_users - 1``.
        """
        if not 0 <= row < self.num_users:
            raise IndexError(f"user rows are 0..{self.num_users - 1}, received {row}")
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))


def read_events(
    source: Source,
    *,
    user_id: str = "user_id",
    item_id: str = "item_id",
    timestamp: str | None = "timestamp",
    fields: Sequence[str] = (),
    ties: Ties = "stable",
    seed: int = 0,
    time_unit: TimeUnit | Literal["auto"] = "auto",
) -> Events:
    """Reads a log: sorts its events by user and time and maps ids to rows.

    Rows with a null id or a null, NaN or infinite timestamp are skipped, counted and reported.
    Duplicate rows are kept. Other columns are ignored.

    Args:
        source: a path to .csv, .tsv or .parquet, a list of paths, or a polars, pandas or Arrow
            frame.
        user_id: the column of user ids.
        item_id: the column of item ids.
        timestamp: the column of timestamps, or None if the rows of each user are in order already.
        fields: numeric columns to keep as event fields.
        ties: a user's events with equal timestamps stay in the order of the source (``"stable"``)
            or are shuffled by ``seed`` (``"random"``).
        seed: the seed of that shuffle.
        time_unit: the unit of the timestamps; ``"auto"`` detects it and adds a message to
            ``facts.messages``.

    Raises:
        ValueError: if columns are missing, no row is usable, or timestamps are invalid.
        FileNotFoundError: if a file does not exist.
    """
    _check_choices(ties, time_unit)
    columns = _wanted(user_id, item_id, timestamp, fields)
    frame = read_table(source, columns)
    rows_read = frame.height
    if timestamp is not None:
        frame = frame.with_columns(parse_times(frame[timestamp]))
    frame, skipped = _skip(frame, user_id, item_id, timestamp)
    notes = [_skip_note(skipped, rows_read)] if skipped else []
    if frame.height == 0:
        reason = f": {notes[0]}" if notes else ", it has no rows"
        raise ValueError(f"no events in {describe(source)}{reason}; expected at least one row")
    # columns are popped one by one, so that each is freed after its use
    series = {column.name: column for column in frame}
    del frame
    user_ids, users = _map_ids(series.pop(user_id))
    item_ids, items = _map_ids(series.pop(item_id))
    stamps = _unix_times(series.pop(timestamp) if timestamp else None, len(users), time_unit)
    if stamps.message:
        notes.append(stamps.message)
    order = _order(users, stamps.keys, ties, seed)
    offsets = np.zeros(len(user_ids) + 1, dtype=np.int64)
    np.cumsum(np.bincount(users, minlength=len(user_ids)), out=offsets[1:])
    del users
    if timestamp is None:
        times, finer_pairs = _positions(offsets), 0
    else:
        times = stamps.times[order]
        finer_pairs = _finer_pairs(stamps.keys[order], times, offsets)
    unit = stamps.unit
    del stamps
    carried = {name: _field(series.pop(name), notes)[order] for name in fields}
    for note in notes:
        logger.warning(note) if note.startswith("skipped") else logger.info(note)
    return Events(
        items=items[order],
        times=times,
        offsets=offsets,
        fields=carried,
        user_ids=user_ids,
        item_ids=item_ids,
        facts=EventFacts(
            source=describe(source),
            rows_read=rows_read,
            rows_skipped=skipped,
            time_unit=unit,
            ties=ties,
            seed=seed,
            finer_pairs=finer_pairs,
            messages=tuple(notes),
        ),
    )


def _check_choices(ties: str, time_unit: str) -> None:
    for name, value, allowed in (
        ("ties", ties, get_args(Ties)),
        ("time_unit", time_unit, ("auto", *get_args(TimeUnit))),
    ):
        if value not in allowed:
            raise ValueError(f"{name}: expected one of {allowed}, received {value!r}")


def _wanted(
    user_id: str, item_id: str, timestamp: str | None, fields: Sequence[str]
) -> dict[str, str]:
    """The columns to read, each with the advice of its error if it is missing."""
    if isinstance(fields, str):
        raise ValueError(f"fields: expected a list of columns, received {fields!r}; use [...]")
    time_advice = 'pass timestamp="{name}", or timestamp=None if the rows are in order already'
    named = [
        (user_id, 'pass user_id="{name}"'),
        (item_id, 'pass item_id="{name}"'),
        *([] if timestamp is None else [(timestamp, time_advice)]),
        *((name, 'name it in fields=["{name}"]') for name in fields),
    ]
    columns = dict(named)
    if len(columns) < len(named):
        raise ValueError(
            f"each column can be used once, received {[name for name, _ in named]}; "
            "give different columns for user_id, item_id, timestamp and fields"
        )
    return columns


def _skip(
    frame: pl.DataFrame, user_id: str, item_id: str, timestamp: str | None
) -> tuple[pl.DataFrame, dict[str, int]]:
    """The usable rows, and the number of skipped rows by their first fault."""
    faults: list[tuple[str, pl.Series]] = []
    for name in (user_id, item_id, timestamp):
        if name is None:
            continue
        column = frame[name]
        if column.null_count():
            faults.append((f"null {name}", column.is_null()))
        if column.dtype.is_float() and not column.is_finite().all():
            faults.append((f"NaN or infinite {name}", ~column.is_finite().fill_null(True)))
    skipped: dict[str, int] = {}
    usable = pl.repeat(True, frame.height, dtype=pl.Boolean, eager=True)
    for reason, faulty in faults:
        count = int((usable & faulty).sum())
        if count:
            skipped[reason] = count
        usable &= ~faulty
    return (frame.filter(usable) if skipped else frame), skipped


def _skip_note(skipped: Mapping[str, int], rows_read: int) -> str:
    reasons = ", ".join(f"{count} with {reason}" for reason, count in skipped.items())
    return f"skipped {sum(skipped.values())} of {rows_read} rows: {reasons}"


def _map_ids(column: pl.Series) -> tuple[IdMap, np.ndarray]:
    """The id map of a column, and the row of each of its values, ``[N]`` int32."""
    try:
        ids = IdMap.from_values(column)
        return ids, ids.rows(column).astype(np.int32)
    except ValueError as error:
        raise ValueError(f"column {column.name!r}: {error}") from error


def _unix_times(column: pl.Series | None, rows: int, unit: TimeUnit | Literal["auto"]) -> UnixTimes:
    """The timestamps of a column; without a column, the row numbers as positions."""
    if column is not None:
        return to_unix_times(column, unit)
    if unit not in ("auto", "position"):
        raise ValueError(
            f'timestamp=None means positions: expected time_unit="position" or "auto", '
            f"received {unit!r}"
        )
    index = np.arange(rows)
    return UnixTimes(index, index, "position", "no timestamp column: rows are in order already")


def _order(users: np.ndarray, keys: np.ndarray, ties: Ties, seed: int) -> np.ndarray:
    """The permutation that sorts rows by user, then timestamp, then the tie rule."""
    if ties == "stable":
        return np.lexsort((keys, users))
    shuffled = np.random.default_rng(seed).integers(2**32, size=len(users), dtype=np.uint32)
    return np.lexsort((shuffled, keys, users))


def _positions(offsets: np.ndarray) -> np.ndarray:
    """Positions 0, 1, 2, ... within each user."""
    within: np.ndarray = np.arange(offsets[-1]) - np.repeat(offsets[:-1], np.diff(offsets))
    return within


def _finer_pairs(keys: np.ndarray, times: np.ndarray, offsets: np.ndarray) -> int:
    """Counts adjacent events of a user within one second that fractions of it order."""
    finer = (times[1:] == times[:-1]) & (keys[1:] != keys[:-1])
    finer[offsets[1:-1] - 1] = False
    return int(finer.sum())


def _field(column: pl.Series, notes: list[str]) -> np.ndarray:
    """Converts a field to int64, or to float32 if it has fractions or nulls."""
    name, nulls = column.name, column.null_count()
    if column.dtype == pl.String:
        numbers = column.cast(pl.Float64, strict=False)
        if numbers.null_count() > nulls:
            wrong = column.filter(numbers.is_null() & column.is_not_null())
            raise ValueError(
                f"field {name!r}: expected numbers, received text, e.g. {wrong[0]!r}; "
                "encode it as integers first, or leave it out of fields"
            )
        column = numbers
    if not (column.dtype.is_numeric() or column.dtype in (pl.Boolean, pl.Null)):
        raise ValueError(
            f"field {name!r}: expected numbers, received {column.dtype}; "
            "encode it as numbers first, or leave it out of fields"
        )
    if nulls:
        notes.append(f"field {name!r} is null in {nulls} rows: kept as NaN")
    elif column.dtype.is_integer() or column.dtype == pl.Boolean:
        return column.cast(pl.Int64).to_numpy()
    return column.cast(pl.Float32).fill_null(float("nan")).to_numpy()


def restrict_to_catalogue(events: Events, item_ids: IdMap) -> tuple[Events, int]:
    """Keeps the events whose items are in a catalogue, and counts the others.

    Args:
        events: a log.
        item_ids: the catalogue.

    Returns:
        The events, with item rows of the catalogue, and the number of events left out.
    """
    catalogue_rows = item_ids.rows(events.item_ids.ids(np.arange(events.num_items)))
    rows = catalogue_rows[events.items]
    keep = rows >= 0
    kept_before = np.concatenate([[0], np.cumsum(keep)])
    known = Events(
        items=rows[keep].astype(np.int32),
        times=events.times[keep],
        offsets=kept_before[events.offsets],
        fields={name: values[keep] for name, values in events.fields.items()},
        user_ids=events.user_ids,
        item_ids=item_ids,
        facts=events.facts,
    )
    return known, int((~keep).sum())
