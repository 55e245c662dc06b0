"""Conversion of timestamp columns of any type and unit to Unix seconds."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import polars as pl

TimeUnit = Literal["s", "ms", "us", "ns", "datetime", "position"]

PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
UNIT_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
# the smallest number that is read as each unit: March 1973. Current timestamps are far above it,
# and a thousand times the number is the threshold of the next unit
SMALLEST = {"s": 10**8, "ms": 10**11, "us": 10**14, "ns": 10**17}
FIRST_SECOND = -62_135_596_800  # year 1
LAST_SECOND = 253_402_300_799  # year 9999
ISO = r"^\s*[+-]?\d{4,}-\d{2}-\d{2}([T ]\d{2}:\d{2}.*)?$"


class UnixTimes(NamedTuple):
    """The timestamps of a log, converted to Unix seconds.

    Attributes:
        keys: ``[N]`` int64 or float64, the sort keys: timestamps at the resolution of the log.
        times: ``[N]`` int64, Unix seconds rounded down, or positions.
        unit: the unit of the log's timestamps.
        message: how the unit was detected, for the user; empty if it was given.
    """

    keys: np.ndarray
    times: np.ndarray
    unit: TimeUnit
    message: str


def parse_times(column: pl.Series) -> pl.Series:
    """Parses a column of timestamps to Int64, Float64 or Datetime; text as numbers or ISO 8601.

    Raises:
        ValueError: if the type of the column cannot hold timestamps, or a text is not one.
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
            raise ValueError(
                f"column {column.name!r}: expected timestamps that fit in 64 bits, received larger "
                "numbers; name the column of timestamps"
            )
        return numbers
    if dtype.is_numeric():
        return column.cast(pl.Float64)
    if dtype == pl.Null:
        return column.cast(pl.Int64)
    raise ValueError(
        f"column {column.name!r} is of type {dtype}: expected numbers, dates or ISO 8601 text"
    )


def to_unix_times(column: pl.Series, unit: TimeUnit | Literal["auto"]) -> UnixTimes:
    """Converts the result of ``parse_times``, without nulls and infinities, to Unix seconds.

    Raises:
        ValueError: if the unit does not fit the column, or timestamps are outside the years 1 to
            9999.
    """
    if isinstance(column.dtype, pl.Datetime):
        return _read_datetime(column, column.dtype, unit)
    if unit == "datetime":
        raise ValueError(
            f'column {column.name!r}: time_unit="datetime" expects dates, received numbers; '
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
    # year first only: 01/02/2024 is the 1st of February in Europe and the 2nd of January in the US
    dated = column.str.contains(ISO)
    times = column.str.strip_chars().str.to_datetime(
        time_unit="us", time_zone="UTC", strict=False, ambiguous="null"
    )
    wrong = column.filter((times.is_null() & column.is_not_null()) | ~dated)
    if len(wrong):
        raise ValueError(
            f"column {column.name!r}: expected numbers or ISO 8601 such as 2024-01-31T12:30:00Z, "
            f"all of one form, received {len(wrong)} of {len(column)} timestamps in another form, "
            f"e.g. {wrong[:3].to_list()}"
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
    """Detects the unit of numeric timestamps by their size; also returns a message about it."""
    low, high = keys.min().item(), keys.max().item()
    largest = max(abs(low), abs(high))
    if largest < SMALLEST["s"]:
        return "position", (
            f"column {name!r} holds small numbers ({low:g} to {high:g}): read as positions, "
            'not as timestamps; pass time_unit="s" if they are seconds'
        )
    unit: TimeUnit = "s"
    for candidate in ("ms", "us", "ns"):
        if largest >= SMALLEST[candidate]:
            unit = candidate
    # a number below the threshold of the detected unit must have a coarser unit
    strange = (np.abs(keys) >= SMALLEST["s"]) & (np.abs(keys) < SMALLEST[unit])
    if strange.any():
        raise ValueError(
            f"column {name!r}: expected one unit, received {int(strange.sum())} of {len(keys)} "
            f"timestamps that look coarser than {UNIT_NAMES[unit]}, e.g. {keys[strange][0]} beside "
            f"{high}; convert them to one unit, or pass time_unit= if they are right"
        )
    return unit, (
        f"column {name!r} read as {UNIT_NAMES[unit]} by its size ({low} to {high}); "
        "pass time_unit= to override this"
    )


def _check_range(times: np.ndarray, name: str, unit: str) -> None:
    low, high = times.min(), times.max()
    if low < FIRST_SECOND or high > LAST_SECOND:
        raise ValueError(
            f"column {name!r} read as {unit!r}: expected the years 1 to 9999, received "
            f"{low} to {high} seconds; check the column or pass another time_unit"
        )
