import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.data.dataset import Dataset
from everlong.data.events import Events, read_events
from everlong.data.split import PAPER, TEMPORAL, Protocol, split, whole_histories

DATA = Path(__file__).parents[2] / "../shared/data"


def log(rows: list[tuple[int, int, int]], timestamp: str | None = "timestamp") -> Events:
    """Events of (user, item, day) rows."""
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "day"], orient="row")
    seconds = 1_600_000_000 + 86_400 * pl.col("day").cast(pl.Int64)
    return read_events(frame.with_columns(timestamp=seconds), timestamp=timestamp)


def histories(lengths: list[int]) -> Events:
    """Users with histories of these lengths, of which no item repeats at once."""
    return log([(user, n % 7, n) for user, length in enumerate(lengths) for n in range(length)])


def plain(events: Events) -> dict[object, list[tuple[object, int]]]:
    """External user id -> [(external item id, time)]."""
    users = events.user_ids.ids(np.arange(events.num_users)).to_list()
    items = events.item_ids.ids(events.items).to_list()
    return {
        user: list(zip(items[low:high], events.times[low:high].tolist(), strict=True))
        for user, (low, high) in zip(users, pairwise(events.offsets), strict=True)
    }


days = st.lists(
    st.tuples(st.integers(0, 4), st.integers(0, 6), st.integers(0, 25)), min_size=1, max_size=60
)


def published_windows(length: int, window: int) -> list[tuple[int, int, int]]:
    """(start, label start, stop) of a training history, straight from LRURec's description."""
    if length < 2 * window:
        labels = list(range(length))[-window:]
        tokens = list(range(length - 1))[-window:]
        first = min(labels + tokens)
        return [(first, labels[0], length)]
    return [(stop - window, stop - window, stop) for stop in range(length, window - 1, -window)]


@settings(max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 9))
def test_paper_segments_are_the_published_windows(lengths: list[int], window: int) -> None:
    events = histories(lengths)
    done = split(events, PAPER.replace({"window": window}))
    for user, length in enumerate(lengths):
        mine = done.train.user == user
        base = events.offsets[user]
        found = {
            (start - base, label_start - base, stop - base)
            for start, stop, label_start in zip(
                done.train.start[mine],
                done.train.stop[mine],
                done.train.label_start[mine],
                strict=True,
            )
        }
        train_length = length - 2 if length >= 3 else length
        assert found == set(published_windows(train_length, window))
        assert mine.sum() == len(found)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 9) | st.none())
def test_paper_targets_are_the_last_two_events(lengths: list[int], window: int | None) -> None:
    events = histories(lengths)
    done = split(events, PAPER.replace({"window": window}))
    evaluated = [user for user, length in enumerate(lengths) if length >= 3]
    for targets, from_end in ((done.validation, 2), (done.test, 1)):
        assert targets.user.tolist() == evaluated
        for row, user in enumerate(evaluated):
            end = events.offsets[user + 1] - from_end
            first = events.offsets[user] if window is None else end - window
            assert targets.stop[row] == end
            assert targets.end[row] == end + 1
            assert targets.start[row] == max(events.offsets[user], first)
    assert done.facts["users_without_targets"] == len(lengths) - len(evaluated)


def test_paper_filters_repeats_then_items_then_users_once() -> None:
    rows = [(0, 1), (0, 1), (0, 2), (0, 3), (1, 2), (1, 9), (1, 3), (2, 2), (2, 8), (0, 2)]
    events = log([(user, item, day) for day, (user, item) in enumerate(rows)])
    done = split(events, PAPER.replace({"min_item_events": 2, "min_user_events": 2}))
    # user 0 loses a repeat, so item 1 is left with one event and goes; items 8 and 9 go;
    # user 2 keeps one event and goes; the emptied places of users stay
    assert {user: [item for item, _ in h] for user, h in plain(done.events).items()} == {
        0: [2, 3, 2],
        1: [2, 3],
        2: [],
    }
    assert done.events.item_ids.ids([0, 1]).to_list() == [2, 3]
    assert done.facts == {
        "immediate_repeats": 1,
        "rare_item_events": 3,
        "short_user_events": 1,
        "items_left_out": 3,
        "users_without_targets": 1,
    }


def test_paper_keeps_repeats_across_users_and_aligns_fields() -> None:
    frame = pl.DataFrame(
        {
            "user_id": [0, 0, 0, 1, 1],
            "item_id": [5, 5, 6, 6, 7],
            "timestamp": [1_600_000_000 + n for n in range(5)],
            "price": [0, 1, 2, 3, 4],
        }
    )
    done = split(read_events(frame, fields=["price"]), PAPER)
    assert done.events.fields["price"].tolist() == [0, 2, 3, 4]
    assert done.events.offsets.tolist() == [0, 2, 4]


cuts = TEMPORAL.replace({"validation_share": 0.2, "test_share": 0.3, "max_targets": 3})


@settings(max_examples=80)
@given(days, st.integers(0, 3))
def test_temporal_equals_brute_force_and_has_no_leaks(
    rows: list[tuple[int, int, int]], min_item_events: int
) -> None:
    events = log(rows)
    protocol = cuts.replace({"min_item_events": min_item_events})
    ordered = sorted(events.times.tolist())
    held_out, tested = (round(share * len(ordered)) for share in (0.5, 0.3))
    first_cut = ordered[-held_out] if held_out else ordered[-1] + 1
    known_items = Counter(item for _, item, day in rows if 1_600_000_000 + 86_400 * day < first_cut)
    if first_cut == (ordered[-tested] if tested else ordered[-1] + 1):
        with pytest.raises(ValueError, match="validation period is empty"):
            split(events, protocol)
        return
    if max(known_items.values(), default=0) < max(1, min_item_events):
        with pytest.raises(ValueError, match="at least one training event"):
            split(events, protocol)
        return
    done = split(events, protocol)
    assert done.facts["validation_from"] == first_cut
    second_cut = done.facts["test_from"]
    everything = plain(events)
    flat = [event for history in everything.values() for event in history]
    for cut, share in ((first_cut, 0.5), (second_cut, 0.3)):
        # the cut is the latest time that has the share at or after it
        assert sum(time >= cut for _, time in flat) >= round(share * len(flat))
        assert sum(time > cut for _, time in flat) < max(round(share * len(flat)), 1)
    assert first_cut < second_cut

    trained = [item for item, time in flat if time < first_cut]
    catalogue = {item for item in trained if trained.count(item) >= max(1, min_item_events)}
    rows_of_catalogue = np.arange(done.events.num_items)
    assert set(done.events.item_ids.ids(rows_of_catalogue).to_list()) == catalogue
    known = {
        user: [event for event in history if event[0] in catalogue]
        for user, history in everything.items()
    }
    assert plain(done.events) == known

    # no event at or after the cut is ever read or learnt in training, every one before it is
    read = [n for a, b in zip(done.train.start, done.train.stop, strict=True) for n in range(a, b)]
    assert sorted(read) == np.flatnonzero(done.events.times < first_cut).tolist()
    for targets, low, high in (
        (done.validation, first_cut, second_cut),
        (done.test, second_cut, float("inf")),
    ):
        found = {}
        users = done.events.user_ids.ids(targets.user).to_list()
        for user, start, stop, end in zip(users, *targets[1:], strict=True):
            history = done.events.times[start:stop]
            assert (history < low).all()
            found[user] = (stop - start, done.events.times[stop:end].tolist())
        expected = {
            user: (
                sum(time < low for _, time in history),
                [time for _, time in history if low <= time < high][:3],
            )
            for user, history in known.items()
            if any(low <= time < high for _, time in history)
        }
        assert found == expected


def test_temporal_counts_what_it_leaves_out() -> None:
    old = [(user, item, day) for user in range(2) for day, item in enumerate([1, 2, 1, 2, 1, 2])]
    late = [(0, 1, 10), (0, 9, 10), (1, 1, 10), (2, 2, 11), (2, 2, 11), (3, 9, 20), (3, 1, 20)]
    late += [(1, 2, 21)]
    done = split(
        log(old + late),
        TEMPORAL.replace({"validation_share": 0.25, "test_share": 0.15, "max_targets": 1}),
    )
    assert done.facts | {"validation_from": 0, "test_from": 0} == {
        "immediate_repeats": 0,
        "validation_from": 0,
        "test_from": 0,
        "items_left_out": 1,
        "unknown_item_train_events": 0,
        "unknown_item_history_events": 1,
        "unknown_item_validation_targets": 1,
        "unknown_item_test_targets": 1,
        "short_users": 0,
        "validation_targets_over_limit": 1,
        "test_targets_over_limit": 0,
        "new_users_validation": 1,
        "new_users_test": 1,
    }
    assert done.validation.user.tolist() == [0, 1, 2]
    assert done.test.user.tolist() == [1, 3]


def test_temporal_never_splits_a_basket_and_keeps_short_users_out_of_training() -> None:
    baskets = [(user, item, day) for user in range(3) for day in range(6) for item in range(3)]
    done = split(log([*baskets, (3, 0, 0)]), cuts.replace({"min_user_events": 4}))
    held_out = done.events.times >= done.facts["validation_from"]
    assert len(np.unique(done.events.times[held_out])) + len(
        np.unique(done.events.times[~held_out])
    ) == len(np.unique(done.events.times))
    assert set(done.train.user) == {0, 1, 2}
    assert done.facts["short_users"] == 1


def test_temporal_without_a_test_or_validation_period() -> None:
    events = log([(0, n % 3, n) for n in range(20)])
    no_test = split(events, TEMPORAL.replace({"test_share": 0.0}))
    assert len(no_test.test.user) == 0
    assert no_test.validation.stop.tolist() == [18]
    no_validation = split(events, TEMPORAL.replace({"validation_share": 0.0}))
    assert len(no_validation.validation.user) == 0
    assert no_validation.test.stop.tolist() == [18]
    assert no_validation.train.stop.tolist() == [18]


def test_errors_name_the_next_step() -> None:
    with pytest.raises(ValueError, match="use the protocol 'paper'"):
        split(log([(0, 1, 0), (0, 2, 1)], timestamp=None), TEMPORAL)
    with pytest.raises(ValueError, match="both cuts fall on the timestamp"):
        split(log([(0, n, 0) for n in range(3)] + [(0, n, 1) for n in range(9)]), TEMPORAL)
    with pytest.raises(ValueError, match="at least one training event"):
        split(log([(0, n, 0) for n in range(9)]), TEMPORAL.replace({"validation_share": 0}))
    with pytest.raises(ValueError, match="lower min_item_events"):
        split(log([(0, 1, 0), (0, 2, 1)]), PAPER.replace({"min_item_events": 5}))
    with pytest.raises(ValueError, match="did you mean 'window'"):
        PAPER.replace({"windows": 50})
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        PAPER.replace({"window": 0})
    with pytest.raises(ValueError, match="belong to kind 'time-cut'"):
        PAPER.replace({"max_targets": 3})
    with pytest.raises(ValueError, match=r"0\.1 and 0\.1 are usual"):
        TEMPORAL.replace({"test_share": None})
    with pytest.raises(ValueError, match=r"0\.1 and 0\.1 are usual"):
        TEMPORAL.replace({"test_share": 0.5, "validation_share": 0.5})


def test_a_record_is_json_and_restores_the_protocol() -> None:
    record = json.loads(json.dumps(split(histories([5, 1, 9]), PAPER).record()))
    assert Protocol.model_validate(record["protocol"]) == PAPER
    assert record["split"]["users_without_targets"] == 1


def test_all_events_of_whole_histories_are_labels() -> None:
    events = split(
        log([(0, 1, 0), (0, 2, 1), (1, 9, 0), (2, 1, 5), (2, 2, 6)]),
        PAPER.replace({"min_item_events": 2}),
    ).events
    segments = whole_histories(events)
    assert segments.user.tolist() == [0, 2]
    assert segments.label_start.tolist() == segments.start.tolist() == [0, 2]
    assert segments.stop.tolist() == [2, 4]
    assert len(whole_histories(events, window=1).start) == 4


@pytest.mark.skipif(not DATA.exists(), reason="the public data sets are not beside the project")
def test_paper_fingerprint_on_ml_1m() -> None:
    events = read_events(DATA / "ml-1m/interactions.parquet", timestamp="order")
    done = split(events, PAPER)
    assert (events.num_users, events.num_items, events.num_events) == (6040, 3416, 999_611)
    assert len(done.train.user) == 7077
    assert Dataset(done.events, done.train).num_labels == 859_309
    assert len(done.validation.user) == len(done.test.user) == 6040
    # the filter of the published code is already in the file
    assert done.events is events
    assert (
        split(events, PAPER.replace({"min_item_events": 5, "min_user_events": 5})).events is events
    )


@pytest.mark.skipif(not DATA.exists(), reason="the public data sets are not beside the project")
def test_temporal_on_baskets() -> None:
    events = read_events(DATA / "online-retail/interactions.parquet")
    done = split(events, TEMPORAL)
    cut = done.facts["test_from"]
    assert 0.1 <= (events.times >= cut).mean() < 0.102
    assert (done.events.times[done.test.stop] >= cut).all()
    assert (done.test.end - done.test.stop).max() == 20
