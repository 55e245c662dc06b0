"""The clock of a log: any column of times, read as Unix seconds."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import polars as pl

TimeUnit = Literal["s", "ms", "us", "ns", "datetime", "position"]

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
# a number of each unit that lies in March 1973; a clock of today is far above it, and a
# thousand times above it is the next unit
SMALLEST = {"s": 10**8, "ms": 10**11, "us": 10**14, "ns": 10**17}
FIRST_SECOND = -62_135_596_800  # year 1
LAST_SECOND = 253_402_300_799  # year 9999
ISO = r"^\s*[+-]?\d{4,}-\d{2}-\d{2}([T ]\d{2}:\d{2}.*)?$"


class UnixTimes(NamedTuple):
    """Times of a log.

    Attributes:
        keys: ``[N]`` int64 or float64, what events are ordered by, at full resolution.
        times: ``[N]`` int64, Unix seconds rounded down, or positions.
        unit: what the numbers of the log were.
        message: how the unit was found, in plain words; empty if it was given.
    """

    keys: np.ndarray
    times: np.ndarray
    unit: TimeUnit
    message: str


def parse_times(column: pl.Series) -> pl.Series:
    """The column as Int64, Float64 or Datetime; text is read as numbers or as ISO 8601.

    Raises:
        ValueError: if the type or a text is not a time.
    """
    dtype = column.dtype
    if dtype in (pl.Categorical, pl.Enum):
        return parse_times(column.cast(pl.String))
    if dtype == pl.String:
        return _parse_text(column)
    if dtype == pl.Date:
        return column.cast(pl.Datetime("ms"))
    if isinstance(dtype, pl.Datetime):
        return column
    if dtype.is_integer():
        numbers = column.cast(pl.Int64, strict=False)
        if numbers.null_count() > column.null_count():
            raise ValueError(f"column {column.name!r} has times too large for any clock")
        return numbers
    if dtype.is_numeric():
        return column.cast(pl.Float64)
    if dtype == pl.Null:
        return column.cast(pl.Int64)
    raise ValueError(
        f"column {column.name!r} is of type {dtype}: expected numbers, dates or ISO 8601 text"
    )


def to_unix_times(column: pl.Series, unit: TimeUnit | Literal["auto"]) -> UnixTimes:
    """The clock of a column that went through ``parse_times``, without nulls and infinities.

    Raises:
        ValueError: if the unit does not fit the column or times are absurd.
    """
    if isinstance(column.dtype, pl.Datetime):
        return _read_datetime(column, column.dtype, unit)
    if unit == "datetime":
        raise ValueError(
            f"column {column.name!r} holds numbers, not dates; "
            'pass time_unit="s", "ms", "us", "ns" or "position"'
        )
    keys = column.to_numpy()
    message = ""
    if unit == "auto":
        unit, message = _detect(keys, column.name)
    times = keys if unit == "position" else keys // PER_SECOND[unit]
    if unit != "position":
        _check_range(times, column.name, unit)
    if times.dtype != np.int64:
        times = np.floor(times).astype(np.int64)
    return UnixTimes(keys, times, unit, message)


def _parse_text(column: pl.Series) -> pl.Series:
    for dtype in (pl.Int64, pl.Float64):
        numbers = column.str.strip_chars().cast(dtype, strict=False)
        if numbers.null_count() == column.null_count():
            return numbers
    # only year first: 01/02/2024 is two different days on two sides of an ocean
    dated = column.str.contains(ISO)
    times = column.str.strip_chars().str.to_datetime(
        time_unit="us", time_zone="UTC", strict=False, ambiguous="null"
    )
    wrong = column.filter((times.is_null() & column.is_not_null()) | ~dated)
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} of {len(column)} times in column {column.name!r} are not times, "
            f"e.g. {wrong[:3].to_list()}; expected numbers or ISO 8601 such as "
            "2024-01-31T12:30:00Z, all of one form"
        )
    return times


def _read_datetime(column: pl.Series, dtype: pl.Datetime, unit: str) -> UnixTimes:
    if unit not in ("auto", "datetime"):
        raise ValueError(
            f"column {column.name!r} holds dates, so time_unit={unit!r} does not fit; "
            'pass time_unit="datetime" or leave it out'
        )
    keys = column.to_physical().to_numpy()
    times = keys // PER_SECOND[dtype.time_unit]
    _check_range(times, column.name, "datetime")
    zone = "with a time zone" if dtype.time_zone else "without a time zone, taken as UTC"
    message = f"column {column.name!r} holds dates {zone}" if unit == "auto" else ""
    return UnixTimes(keys, times, "datetime", message)


def _detect(keys: np.ndarray, name: str) -> tuple[TimeUnit, str]:
    """The unit of plain numbers, from their size, and a sentence that says so."""
    low, high = keys.min().item(), keys.max().item()
    largest = max(abs(low), abs(high))
    if largest < SMALLEST["s"]:
        return "position", (
            f"column {name!r} holds small numbers ({low:g} to {high:g}): read as positions, "
            'not as a clock; pass time_unit="s" if they are seconds'
        )
    unit: TimeUnit = "s"
    for candidate in ("ms", "us", "ns"):
        if largest >= SMALLEST[candidate]:
            unit = candidate
    # finer units leave a gap below them in which only numbers of a coarser unit fall
    strange = (np.abs(keys) >= SMALLEST["s"]) & (np.abs(keys) < SMALLEST[unit])
    if strange.any():
        raise ValueError(
            f"column {name!r} seems to mix units: {int(strange.sum())} of {len(keys)} times look "
            f"coarser than {UNIT_NAMES[unit]}, e.g. {keys[strange][0]} beside {high}; "
            "bring them to one unit, or pass time_unit= if they are right"
        )
    return unit, (
        f"column {name!r} read as {UNIT_NAMES[unit]} by its size ({low} to {high}); "
        "pass time_unit= to say otherwise"
    )


def _check_range(times: np.ndarray, name: str, unit: str) -> None:
    low, high = times.min(), times.max()
    if low < FIRST_SECOND or high > LAST_SECOND:
        raise ValueError(
            f"column {name!r} read as {unit!r} reaches outside of the years 1 to 9999 "
            f"({low} to {high} seconds); check the column or pass another time_unit"
        )
