from datetime import UTC, date, datetime, timedelta, timezone

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.data.times import PER_SECOND, parse_times, to_unix_times

MOMENT = datetime(2024, 1, 31, 12, 30, 5, tzinfo=UTC)
SECONDS = int(MOMENT.timestamp())


def clock(values, unit="auto", dtype=None):
    return to_unix_times(parse_times(pl.Series("when", values, dtype=dtype)), unit)


@settings(max_examples=60)
@given(
    st.lists(st.integers(200_000_000, 4_000_000_000), min_size=1, max_size=5),
    st.sampled_from(list(PER_SECOND)),
    st.data(),
)
def test_the_unit_is_detected_by_size(seconds, unit, data):
    scale = PER_SECOND[unit]
    values = [s * scale + data.draw(st.integers(0, scale - 1)) for s in seconds]
    found = clock(values)
    assert found.unit == unit
    assert found.times.tolist() == seconds
    assert found.keys.tolist() == values
    assert "by its size" in found.message


@pytest.mark.parametrize(
    "values",
    [
        pl.Series("when", [MOMENT.replace(tzinfo=None)], dtype=pl.Datetime("ns")),
        pl.Series("when", [MOMENT], dtype=pl.Datetime("ms", "Europe/Berlin")),
        pl.Series("when", ["2024-01-31T12:30:05Z"]),
        pl.Series("when", ["2024-01-31 12:30:05"]),
        pl.Series("when", ["2024-01-31T13:30:05.250+01:00"]),
        pl.Series("when", ["2024-01-31 12:30:05"], dtype=pl.Categorical),
    ],
    ids=str,
)
def test_dates_of_all_forms_are_the_same_second(values):
    found = to_unix_times(parse_times(values), "auto")
    assert found.unit == "datetime"
    assert found.times.tolist() == [SECONDS]


def test_days_dates_before_1970_and_fractions_round_down():
    assert clock([date(1970, 1, 2), date(1969, 12, 31)]).times.tolist() == [86_400, -86_400]
    before = datetime(1969, 12, 31, 23, 59, 59, 500_000)
    assert clock([before]).times.tolist() == [-1]
    found = clock([1.5e9 + 0.75, 1.5e9 + 0.25])
    assert found.times.tolist() == [1_500_000_000] * 2
    assert found.keys.tolist() == [1.5e9 + 0.75, 1.5e9 + 0.25]
    assert clock(["1500000000.5"]).times.tolist() == [1_500_000_000]
    assert clock([-300_000_000, 1_500_000_000]).unit == "s"


def test_small_numbers_are_positions_unless_a_unit_is_given():
    found = clock([5, 0, 2276])
    assert found.unit == "position"
    assert found.times.tolist() == [5, 0, 2276]
    assert "positions" in found.message
    assert clock([5, 0], "s").unit == "s"
    assert clock([5, 0], "s").message == ""
    huge = 2**62 + 1
    assert clock([huge], "position").times.tolist() == [huge]
    assert clock(np.array([3], dtype=np.uint64)).times.dtype == np.int64


@pytest.mark.parametrize(
    ("values", "unit", "message"),
    [
        ([1_600_000_000, 1_600_000_000_000], "auto", "expected one unit"),
        ([1_600_000_000_000, 1_600_000_000_000_000_000], "auto", "expected one unit"),
        (["2024-01-31", "soon"], "auto", "soon"),
        (["31/01/2024"], "auto", "ISO 8601"),
        ([2**63], "auto", "fit in 64 bits"),
        ([1e300], "auto", "years 1 to 9999"),
        ([1_600_000_000_000], "s", "years 1 to 9999"),
        ([-(2**62)], "s", "years 1 to 9999"),
        ([1_600_000_000], "datetime", "expects dates, received numbers"),
        ([MOMENT], "s", "does not fit"),
        ([timedelta(days=1)], "auto", "of type Duration"),
        ([True], "auto", "of type Boolean"),
    ],
    ids=str,
)
def test_invalid_timestamps_raise_an_error_that_names_the_column(values, unit, message):
    with pytest.raises(ValueError, match=message) as caught:
        clock(values, unit)
    assert "'when'" in str(caught.value)


def test_null_timestamps_stay_null():
    assert parse_times(pl.Series("when", ["2024-01-31", None])).null_count() == 1
    assert parse_times(pl.Series("when", ["5", None])).to_list() == [5, None]
    assert parse_times(pl.Series("when", [None])).dtype == pl.Int64


def test_timestamps_with_time_zones_are_converted_to_utc():
    berlin = datetime(2024, 1, 31, 13, 30, 5, tzinfo=timezone(timedelta(hours=1)))
    found = clock([berlin.isoformat(), MOMENT.isoformat()])
    assert found.times.tolist() == [SECONDS, SECONDS]
