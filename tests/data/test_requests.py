"""Requests: whose candidates they are, and that no history holds anything of its own request."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.data.events import Events, read_events
from everlong.data.requests import (
    RequestDataset,
    Requests,
    read_requests,
    requests_from_events,
    split_requests,
)

Row = tuple[int, int, int, float]


def log_of(rows: Sequence[Row]) -> Events:
    frame = pl.DataFrame(
        rows,
        schema={
            "user_id": pl.Int64,
            "item_id": pl.Int64,
            "timestamp": pl.Int64,
            "label": pl.Float64,
        },
        orient="row",
    )
    return read_events(frame, fields=["label"], time_unit="s")


exposures = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.integers(0, 5),
        st.integers(0, 40).map(lambda n: 10**9 + 300 * n),
        st.sampled_from([0.0, 1.0, float("nan")]),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60)
@given(rows=exposures)
def test_requests_are_sessions_and_their_histories_end_strictly_before_them(
    rows: list[Row],
) -> None:
    events = log_of(rows)
    found = requests_from_events(events, gap_s=1_000)
    seen = set()
    for number in range(found.num_requests):
        user, time = found.user[number], found.time[number]
        start, end = events.offsets[user], events.offsets[user + 1]
        times = events.times[start:end]
        assert found.stop[number] - start == (times < time).sum()
        # the session: from its time until the next pause
        later = np.flatnonzero(times >= time)
        pauses = np.flatnonzero(np.diff(times[later]) > 1_000)
        last = later[pauses[0]] if len(pauses) else later[-1]
        inside = slice(start + later[0], start + last + 1)
        items = found.items[found.offsets[number] : found.offsets[number + 1]]
        labels = found.labels[found.offsets[number] : found.offsets[number + 1]]
        assert sorted(items) == sorted(set(events.items[inside].tolist()))
        for item, label in zip(items, labels, strict=True):
            mine = events.fields["label"][inside][events.items[inside] == item]
            expected = np.nan if np.isnan(mine).all() else np.nanmax(mine)
            np.testing.assert_equal(label, np.float32(expected))
        seen |= set(range(inside.start, inside.stop))
    assert seen == set(range(events.num_events))
    assert found.facts.duplicates == events.num_events - found.num_candidates


@settings(max_examples=40)
@given(rows=exposures, budget=st.integers(1, 60), seed=st.integers(0, 5))
def test_every_label_is_in_one_batch_with_its_own_history(
    rows: list[Row], budget: int, seed: int
) -> None:
    events = log_of(rows)
    requests = requests_from_events(events, gap_s=1_000)
    dataset = RequestDataset(events, requests)
    batches = list(dataset.batches(budget, seed=seed, epoch=0))
    assert len(batches) == dataset.num_batches(budget, seed=seed, epoch=0)
    came = []
    for batch in batches:
        assert (batch.user.diff() >= 0).all()
        for place in range(batch.user.numel()):
            row = int(batch.rows[place])
            came.append(row)
            start = int(batch.events.offsets[batch.user[place]])
            history = batch.events.items[start : start + int(batch.cut[place])]
            user = requests.user[row]
            expected = events.items[events.offsets[user] : requests.stop[row]]
            assert history.tolist() == expected.tolist()
            a, b = batch.offsets[place : place + 2].tolist()
            c, d = requests.offsets[row : row + 2]
            assert batch.items[a:b].tolist() == requests.items[c:d].tolist()
            assert int(batch.times[place]) == requests.time[row]
    known = ~np.isnan(requests.labels)
    labelled = [r for r in range(requests.num_requests) if known[requests.request_rows == r].any()]
    assert sorted(came) == labelled
    assert dataset.num_labels == known.sum()
    again = [batch.rows.tolist() for batch in dataset.batches(budget, seed=seed, epoch=0)]
    assert again == [batch.rows.tolist() for batch in batches]
    rest = [
        batch.rows.tolist()
        for batch in dataset.batches(budget, seed=seed, epoch=0, start=min(1, len(again)))
    ]
    assert rest == again[1:]


@settings(max_examples=40)
@given(rows=exposures, change=st.integers(0, 39))
def test_events_at_or_after_a_request_are_not_in_its_history(rows: list[Row], change: int) -> None:
    events = log_of(rows)
    requests = requests_from_events(events, gap_s=1_000)
    place = change % events.num_events
    items = events.items.copy()
    items[place] = (items[place] + 1) % max(events.num_items, 2)
    owner = np.searchsorted(events.offsets, place, side="right") - 1
    for number in range(requests.num_requests):
        start, stop = events.offsets[requests.user[number]], requests.stop[number]
        same = (items[start:stop] == events.items[start:stop]).all()
        after = events.times[place] >= requests.time[number]
        if after or requests.user[number] != owner:
            assert same


def test_request_ids_replace_sessions() -> None:
    events = log_of([(0, 1, 10**9, 1.0), (0, 2, 10**9 + 5, 0.0), (0, 3, 10**9 + 9, 0.0)])
    numbered = replace(events, fields={**events.fields, "request": np.array([7, 7, 8])})
    found = requests_from_events(numbered, request="request")
    assert found.offsets.tolist() == [0, 2, 3]
    assert found.time.tolist() == [10**9, 10**9 + 9]
    assert found.stop.tolist() == [0, 2]


def test_a_table_of_requests_is_joined_with_the_log() -> None:
    events = log_of([(1, 5, 10**9, 1.0), (1, 6, 10**9 + 60, 1.0), (2, 5, 10**9, 0.0)])
    table = pl.DataFrame(
        {
            "request_id": ["b", "b", "a", "a", "c", "a"],
            "user_id": [1, 1, 2, 2, 9, 2],
            "item_id": [6, 5, 6, 77, 5, 6],
            "timestamp": [10**9 + 61, 10**9 + 60, 10**9 + 5, 10**9 + 5, 10**9, 10**9 + 6],
            "label": [None, 1.0, 0.0, 1.0, 1.0, 1.0],
        }
    )
    found = read_requests(table, events)
    # b is asked at the time of its earliest row, when the event of that second is not history
    assert events.item_ids.ids(found.items).to_list() == [6, 5, 6]
    assert found.time.tolist() == [10**9 + 60, 10**9 + 5]
    assert found.stop.tolist() == [1, 3]
    np.testing.assert_equal(found.labels, np.array([np.nan, 1, 1], np.float32))
    assert found.facts == (1, 1, 1, 1, 0)
    with pytest.raises(ValueError, match="expected one user"):
        read_requests(table.with_columns(request_id=pl.lit("a")), events)


def test_invalid_input_raises_an_error_that_names_the_fault() -> None:
    events = log_of([(0, 1, 10**9, 1.0), (0, 2, 10**9, 0.0)])
    with pytest.raises(ValueError, match="expected events with a field 'click', received label"):
        requests_from_events(events, label="click")
    stars = replace(events, fields={"label": np.array([3.0, 5.0])})
    with pytest.raises(ValueError, match=r"labels from 0 to 1, received 3\.0 to 5\.0"):
        requests_from_events(stars)
    found = requests_from_events(events)
    with pytest.raises(ValueError, match="a budget of at least 1"):
        RequestDataset(events, found).num_batches(0, seed=0, epoch=0)
    with pytest.raises(ValueError, match="expected requests in training, validation and test"):
        split_requests(found)


def test_requests_with_one_candidate_or_no_or_equal_labels_are_kept() -> None:
    nan = float("nan")
    events = log_of(
        [(0, 1, 10**9, 1.0), (0, 2, 2 * 10**9, nan), (0, 3, 3 * 10**9, 1.0), (0, 1, 3 * 10**9, 1.0)]
    )
    requests = requests_from_events(events)
    assert np.diff(requests.offsets).tolist() == [1, 1, 2]
    dataset = RequestDataset(events, requests)
    assert dataset.rows.tolist() == [0, 2]  # what is not labelled teaches nothing


@pytest.mark.parametrize("seed", range(5))
def test_all_labels_of_a_part_precede_the_next_part(seed: int) -> None:
    random = np.random.default_rng(seed)
    rows = [
        (
            int(random.integers(6)),
            int(random.integers(9)),
            10**9 + 300 * int(random.integers(90)),
            1.0,
        )
        for _ in range(120)
    ]
    requests = requests_from_events(log_of(rows), gap_s=600)
    parts = split_requests(requests, validation_share=0.3, test_share=0.3)
    assert parts.train.end.max() < parts.validation.time.min()
    assert parts.validation.end.max() < parts.test.time.min()
    assert sum(part.num_requests for part in parts) > 0.5 * requests.num_requests


def test_a_request_that_crosses_a_cut_is_in_no_part() -> None:
    rows = [(0, n, 10**9 + 1_000 * n, 1.0) for n in range(10)]
    # the validation begins at 7,000: of these two sessions one ends before and one after
    rows += [(1, 20, 10**9 + 5_900, 1.0), (1, 21, 10**9 + 6_100, 1.0)]
    rows += [(2, 20, 10**9 + 6_900, 1.0), (2, 21, 10**9 + 7_000, 1.0)]
    requests = requests_from_events(log_of(rows), gap_s=600)
    assert requests.num_requests == 12
    parts = split_requests(requests, validation_share=1 / 14, test_share=2 / 14)
    starts = [(part.time - 10**9).tolist() for part in parts]
    assert sorted(starts[0]) == [0, 1_000, 2_000, 3_000, 4_000, 5_000, 5_900, 6_000]
    assert [sorted(part) for part in starts[1:]] == [[7_000], [8_000, 9_000]]


def test_select_keeps_the_candidates_of_requests_together() -> None:
    events = log_of([(0, n % 4, 10**9 + 5_000 * (n // 3), float(n % 2)) for n in range(12)])
    requests: Requests = requests_from_events(events)
    picked = requests.select(np.array([3, 1]))
    assert picked.time.tolist() == requests.time[[3, 1]].tolist()
    assert picked.items.tolist() == [
        *requests.items[requests.offsets[3] : requests.offsets[4]],
        *requests.items[requests.offsets[1] : requests.offsets[2]],
    ]


@settings(max_examples=40)
@given(rows=exposures, budget=st.integers(1, 60))
def test_batches_hold_all_labels_and_only_events_of_histories(rows: list[Row], budget: int) -> None:
    events = log_of(rows)
    requests = requests_from_events(events, gap_s=1_000)
    dataset = RequestDataset(events, requests)
    batches = list(dataset.in_order(budget))
    owners = [requests.user[row] for batch in batches for row in batch.rows.tolist()]
    assert owners == sorted(owners)
    for batch in batches:
        sees = [int(batch.cut[batch.user == row].max()) for row in range(batch.events.num_users)]
        assert batch.events.lengths.tolist() == sees
        size = batch.events.num_events + batch.items.numel()
        assert size <= budget or batch.events.num_users == 1
        for place, row in enumerate(batch.rows.tolist()):
            a, b = batch.offsets[place : place + 2].tolist()
            c, d = requests.offsets[row : row + 2]
            np.testing.assert_equal(batch.labels[a:b].numpy(), requests.labels[c:d])
    owner = np.repeat(np.arange(events.num_users), events.lengths)
    mine = owner[None] == requests.user[:, None]
    lengths = (mine & (events.times[None] < requests.time[:, None])).sum(axis=1).tolist()
    assert requests.history_lengths(events).tolist() == lengths


@settings(max_examples=40)
@given(rows=exposures, data=st.data())
def test_histories_do_not_depend_on_later_events(rows: list[Row], data: st.DataObject) -> None:
    # the numbers of rows are not those of ids, so histories are compared by id
    asked = pl.DataFrame(
        {"request_id": ["a"], "user_id": [rows[0][0]], "item_id": [rows[0][1]], "label": [1.0]}
    ).with_columns(timestamp=pl.lit(10**9 + 300 * data.draw(st.integers(0, 41))))
    time = asked["timestamp"][0]
    other = []
    for user, item, when, label in rows[1:]:
        change = "keep" if when < time else data.draw(st.sampled_from(["keep", "remove", "change"]))
        if change != "remove":
            other.append((user, (item + (change == "change")) % 6, when, label))

    def history(log: list[Row]) -> list[int]:
        events = log_of(log)
        found = read_requests(asked, events, time_unit="s")
        start, stop = events.offsets[found.user[0]], found.stop[0]
        ids: list[int] = events.item_ids.ids(events.items[start:stop]).to_list()
        return ids

    assert history(rows) == history([rows[0], *other])


def test_a_pause_equal_to_the_gap_separates_nothing_and_a_known_label_wins() -> None:
    nan = float("nan")
    events = log_of([(0, 1, 10**9, nan), (0, 1, 10**9 + 60, 0.0), (0, 2, 10**9 + 121, 1.0)])
    found = requests_from_events(events, gap_s=60)
    assert found.offsets.tolist() == [0, 1, 2]
    assert found.labels.tolist() == [0.0, 1.0]


def test_order_depends_on_seed_and_epoch_and_start_is_checked() -> None:
    events = log_of([(user, 1, 10**9, 1.0) for user in range(20)])
    dataset = RequestDataset(events, requests_from_events(events))

    def order(seed: int, epoch: int) -> list[int]:
        return [r for b in dataset.batches(5, seed=seed, epoch=epoch) for r in b.rows.tolist()]

    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert sorted(order(0, 0)) == sorted(order(1, 1))
    assert not list(dataset.batches(5, seed=0, epoch=0, start=4))
    with pytest.raises(ValueError, match="start between 0 and 4"):
        dataset.batches(5, seed=0, epoch=0, start=5)


def test_a_batch_moves_all_its_tensors_to_a_device() -> None:
    events = log_of([(0, n, 10**9 + 5_000 * n, 1.0) for n in range(3)])
    (batch,) = RequestDataset(events, requests_from_events(events)).in_order(100)
    moved = batch.to("meta")
    assert moved.events.items.device.type == "meta"
    for name in ("user", "cut", "times", "offsets", "items", "labels", "rows"):
        assert getattr(moved, name).device.type == "meta"


def test_shares_count_labels_and_must_leave_a_training_part() -> None:
    requests = requests_from_events(
        log_of([(0, n % 4, 10**9 + 5_000 * n, float(n % 2)) for n in range(20)])
    )
    parts = split_requests(requests, validation_share=0.1, test_share=0.3)
    assert [part.num_requests for part in parts] == [12, 2, 6]
    for shares in ((0.6, 0.6), (0.0, 0.1), (-0.1, 0.1)):
        with pytest.raises(ValueError, match="two shares above 0 with a sum below 1"):
            split_requests(requests, validation_share=shares[0], test_share=shares[1])


def test_other_timestamp_units_are_refused_and_incomplete_rows_counted() -> None:
    events = log_of([(1, 5, 10**9, 1.0), (1, 6, 10**9 + 60, 1.0)])
    nan = float("nan")
    table = pl.DataFrame(
        {
            "request_id": ["a", "a", "b"],
            "user_id": [1, 1, 1],
            "item_id": [6, 5, 6],
            "timestamp": [10.0**9 + 61, nan, 10.0**9 + 61],
            "label": [1.0, 0.0, 0.0],
        }
    )
    found = read_requests(table, events)
    assert (found.num_candidates, found.facts.incomplete_rows) == (2, 1)
    with pytest.raises(ValueError, match="timestamps like those of the log"):
        read_requests(table.with_columns(timestamp=pl.lit(5)), events)
    with pytest.raises(ValueError, match="expected labels from 0 to 1, received 'yes'"):
        read_requests(table.with_columns(label=pl.lit("yes")), events)
    with pytest.raises(ValueError, match="received none among 0 rows"):
        read_requests(table.head(0), events)
    order = read_events(
        pl.DataFrame({"user_id": [1, 1], "item_id": [1, 2], "label": [1.0, 0.0]}),
        timestamp=None,
        fields=["label"],
    )
    with pytest.raises(ValueError, match="expected a log with timestamps"):
        requests_from_events(order)
