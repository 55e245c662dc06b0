import logging
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.data.events import Events, read_events
from everlong.data.ids import IdMap

ROWS = st.lists(
    st.tuples(
        st.sampled_from(["u1", "u2", "u3"]), st.integers(-2, 3), st.integers(10**9, 10**9 + 3)
    ),
    min_size=1,
    max_size=30,
)


def frame_of(rows):
    schema = {"user_id": pl.String, "item_id": pl.Int64, "timestamp": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row").with_row_index("row")


def rows_of(events: Events) -> list[tuple]:
    """Every event with its own ids, read back the slow way."""
    users, items = events.user_ids.ids, events.item_ids.ids
    found = []
    for row in range(events.num_users):
        own = events.user_slice(row)
        user = users([row])[0]
        names = items(events.items[own]).to_list()
        found += [(user, *event) for event in zip(names, events.times[own].tolist(), strict=True)]
    return found


@settings(max_examples=50)
@given(ROWS)
def test_stable_order_is_user_then_time_then_row(rows):
    events = read_events(frame_of(rows), fields=["row"])
    expected = sorted(rows, key=lambda row: (row[0], row[2]))
    assert rows_of(events) == expected
    order = sorted(range(len(rows)), key=lambda i: (rows[i][0], rows[i][2]))
    assert events.fields["row"].tolist() == order
    assert events.num_events == len(rows)
    assert events.lengths.tolist() == [
        sum(r[0] == u for r in rows) for u in sorted({r[0] for r in rows})
    ]


@settings(max_examples=30)
@given(ROWS, st.integers(0, 5))
def test_random_ties_keep_timestamps_and_are_reproducible_by_seed(rows, seed):
    one, two = (read_events(frame_of(rows), ties="random", seed=seed) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    assert sorted(rows_of(one)) == sorted(rows)
    assert [(user, time) for user, _, time in rows_of(one)] == sorted((r[0], r[2]) for r in rows)


def test_random_ties_are_uniform_and_differ_by_seed():
    n = 2_000
    tied = frame_of([(f"u{i:04}", item, 10**9) for i in range(n) for item in range(3)])
    events = read_events(tied, ties="random", seed=1)
    orders, counts = np.unique(events.items.reshape(n, 3), axis=0, return_counts=True)
    assert len(orders) == 6
    # each of six orders: mean 333, standard deviation 17
    assert np.abs(counts - n / 6).max() < 85
    assert events.fingerprint != read_events(tied, ties="random", seed=2).fingerprint
    assert events.facts.seed == 1


def test_fractions_of_a_second_order_events_before_they_are_dropped():
    frame = frame_of([("u", 1, 0), ("u", 2, 0), ("u", 3, 0)])
    frame = frame.with_columns(timestamp=pl.Series([1.5e9 + 0.9, 1.5e9 + 0.5, 1.5e9 + 0.5]))
    for ties in ("stable", "random"):
        events = read_events(frame, ties=ties, seed=3)
        assert events.item_ids.ids(events.items).to_list()[2] == 1
        assert events.times.tolist() == [1_500_000_000] * 3
        assert events.facts.finer_pairs == 1
    milliseconds = frame.with_columns(
        timestamp=pl.Series([1_500_000_000_002, 1_500_000_000_001, 0])
    )
    assert read_events(milliseconds).items.tolist() == [2, 1, 0]


def test_without_a_timestamp_column_the_order_of_rows_is_the_order_of_events():
    frame = frame_of([("b", 1, 9), ("a", 2, 8), ("b", 3, 7)])
    events = read_events(frame, timestamp=None, ties="random")
    assert rows_of(events) == [("a", 2, 0), ("b", 1, 0), ("b", 3, 1)]
    assert events.facts.time_unit == "position"
    with pytest.raises(ValueError, match="timestamp=None means positions"):
        read_events(frame, timestamp=None, time_unit="s")


def test_every_source_gives_the_same_events(tmp_path):
    frame = frame_of([("007", 5, 10**9 + 2), ("7", -4, 10**9 + 1), ("007", 5, 10**9)])
    frame.write_csv(tmp_path / "log.csv")
    frame.write_parquet(tmp_path / "log.parquet")
    iso = frame.with_columns(pl.from_epoch("timestamp").dt.strftime("%Y-%m-%dT%H:%M:%SZ"))
    pandas = pd.DataFrame(frame.to_dict(as_series=False))
    dated = pandas.assign(timestamp=pd.to_datetime(pandas["timestamp"], unit="s"))
    expected = read_events(frame)
    assert rows_of(expected)[0] == ("007", 5, 10**9)
    for source in (tmp_path / "log.csv", tmp_path / "log.parquet", iso, pandas, dated):
        events = read_events(source)
        assert events.fingerprint == expected.fingerprint
        assert events.items.dtype == np.int32
        assert events.times.dtype == np.int64


def test_unusable_rows_are_skipped_counted_and_reported(caplog):
    frame = pl.DataFrame(
        {
            "user_id": [1.0, None, 3.0, 4.0, float("nan"), 6.0],
            "item_id": ["a", None, None, "d", "e", "f"],
            "timestamp": [1.5e9, 1.5e9, 1.5e9, float("inf"), None, float("nan")],
        }
    )
    with caplog.at_level(logging.WARNING, logger="everlong"):
        events = read_events(frame)
    assert rows_of(events) == [(1, "a", 1_500_000_000)]
    assert events.facts.rows_read == 6
    assert events.facts.rows_skipped == {
        "null user_id": 1,
        "NaN or infinite user_id": 1,
        "null item_id": 1,
        "NaN or infinite timestamp": 2,
    }
    assert "skipped 5 of 6 rows" in caplog.text
    assert "skipped 5 of 6 rows" in events.facts.messages[0]


@pytest.mark.parametrize("rows", [[], [(None, 1, 1)]])
def test_a_log_without_events_is_an_error(rows):
    with pytest.raises(ValueError, match="no events in polars DataFrame"):
        read_events(frame_of(rows))


def test_one_event_and_repeated_rows_are_kept():
    assert read_events(frame_of([("u", -7, 10**9)])).num_events == 1
    assert read_events(frame_of([("u", -7, 10**9)] * 3)).num_events == 3


def test_fields_are_integers_or_floats():
    frame = frame_of([("u", 1, 10**9 + 1), ("u", 1, 10**9)]).with_columns(
        label=pl.Series([True, False]),
        rating=pl.Series([3.5, 4.0]),
        holes=pl.Series([None, 2]),
        text=pl.Series(["1.5", "2"]),
    )
    events = read_events(frame, fields=["label", "rating", "holes", "text"])
    assert [events.fields[n].dtype for n in events.fields] == [np.int64, *[np.float32] * 3]
    assert events.fields["label"].tolist() == [0, 1]
    assert events.fields["rating"].tolist() == [4.0, 3.5]
    np.testing.assert_array_equal(events.fields["holes"], np.float32([2, np.nan]))
    assert any("'holes' is null in 1 rows" in note for note in events.facts.messages)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"user_id": "userid"}, 'pass user_id="user_id"'),
        ({"timestamp": "time"}, "timestamp=None if the rows are in order"),
        ({"fields": ["rating"]}, "no column 'rating'"),
        ({"fields": "row"}, "list of columns"),
        ({"fields": ["name"]}, "received text, e.g. 'x'"),
        ({"fields": ["day"]}, "received Date"),
        ({"fields": ["item_id"]}, "used once"),
        ({"item_id": "user_id"}, "used once"),
        ({"user_id": "flag"}, "column 'flag': expected ids that are .*, received Boolean"),
        ({"ties": "sorted"}, "ties: expected one of"),
        ({"time_unit": "minutes"}, "time_unit: expected one of"),
        ({"timestamp": "mixed"}, "expected one unit"),
    ],
    ids=str,
)
def test_invalid_input_raises_an_error_that_names_the_fault(options, message):
    frame = frame_of([("u", 1, 10**9), ("v", 1, 10**9)]).with_columns(
        name=pl.lit("x"),
        day=pl.lit(datetime(2024, 1, 1, tzinfo=UTC)).dt.date(),
        flag=pl.lit(True),
        mixed=pl.Series([1_600_000_000, 1_600_000_000_000]),
    )
    with pytest.raises(ValueError, match=message):
        read_events(frame, **options)


def test_the_fingerprint_depends_on_users_items_times_and_order():
    rows = [("u", 1, 10**9), ("u", 2, 10**9 + 1), ("v", 1, 10**9)]
    logs = [
        rows,
        rows[:2],
        [("u", 3, 10**9), *rows[1:]],
        [("w", 1, 10**9), ("w", 2, 10**9 + 1), ("x", 1, 10**9)],
        [("u", 1, 10**9), ("u", 2, 10**9 + 2), ("v", 1, 10**9)],
        [("u", 1, 10**9), ("v", 2, 10**9 + 1), ("v", 1, 10**9)],
    ]
    prints = [read_events(frame_of(log)).fingerprint for log in logs]
    assert len(set(prints)) == len(logs)
    assert read_events(frame_of(rows[::-1])).fingerprint == prints[0]


def test_arrays_of_other_shapes_or_types_are_refused():
    events = read_events(frame_of([("u", 1, 10**9), ("v", 2, 10**9)]))
    for change, message in (
        ({"items": events.items.astype(np.int64)}, "items: expected one axis of int32"),
        ({"times": events.times[:1]}, "times: expected one value per event"),
        ({"fields": {"x": np.zeros(3)}}, "x: expected one value per event"),
        ({"offsets": np.array([0, 2])}, "expected 3 for 2 users"),
        ({"offsets": np.array([0, 3, 2])}, "expected to rise from 0 to 2"),
        ({"user_ids": IdMap.from_values(["u"])}, "expected 2 for 1 users"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(events, **change)
    with pytest.raises(IndexError, match=r"user rows are 0\.\.1"):
        events.user_slice(-1)
