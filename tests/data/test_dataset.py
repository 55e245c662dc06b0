import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.data.dataset import Dataset, gather, plan_batches
from everlong.data.events import Events, read_events
from everlong.data.split import PAPER, TrainSegments, split, whole_histories


def histories(lengths: list[int]) -> Events:
    """Users with histories of these lengths; item and time tell user and place."""
    rows = [
        (user, 100 * user + n, 1_600_000_000 + 60 * n, n / 4)
        for user, length in enumerate(lengths)
        for n in range(length)
    ]
    names = ["user_id", "item_id", "timestamp", "weight"]
    return read_events(pl.DataFrame(rows, schema=names, orient="row"), fields=["weight"])


lengths_of_users = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@settings(max_examples=60)
@given(lengths_of_users, st.integers(1, 40), st.integers(1, 8) | st.none(), st.integers(0, 3))
def test_each_label_is_in_one_batch_and_chunks_join_to_whole_histories(
    lengths: list[int], budget: int, window: int | None, seed: int
) -> None:
    done = split(histories(lengths), PAPER.replace({"window": window}))
    dataset = Dataset(done.events, done.train)
    labels: list[int] = []
    segments: list[list[int]] = []
    last_was_whole_batch = continues = False
    for batch in dataset.batches(budget, seed=seed, epoch=1):
        assert batch.events.num_events <= budget
        assert (batch.events.lengths > 0).all()
        offsets = batch.events.offsets.tolist()
        rows = [batch.events.items[low:high].tolist() for low, high in pairwise(offsets)]
        assert batch.carried == continues
        continues = batch.continues
        if batch.carried:
            assert last_was_whole_batch
            segments[-1] += rows.pop(0)
        segments += rows
        labels += batch.events.items[batch.labels].tolist()
        last_was_whole_batch = batch.events.num_events == budget and len(offsets) == 2
    assert not continues
    items = done.events.items
    expected = [items[a:b].tolist() for a, b in zip(done.train.start, done.train.stop, strict=True)]
    assert sorted(segments) == sorted(expected)
    wanted = [
        items[n]
        for a, b in zip(done.train.label_start, done.train.stop, strict=True)
        for n in range(a, b)
    ]
    assert sorted(labels) == sorted(wanted)
    assert dataset.num_labels == len(wanted)
    assert dataset.num_events == sum(map(len, expected))
    counts = dataset.item_counts(done.events.num_items)
    assert counts.tolist() == np.bincount(wanted, minlength=done.events.num_items).tolist()


@settings(max_examples=60)
@given(st.lists(st.integers(0, 30), max_size=15), st.integers(1, 20))
def test_batches_are_filled_greedily(lengths: list[int], budget: int) -> None:
    expected: list[list[tuple[int, int, int]]] = []
    room = 0
    for row, length in enumerate(lengths):
        for begin in range(0, length, budget):
            end = min(begin + budget, length)
            if end - begin > room:
                expected.append([])
                room = budget
            expected[-1].append((row, begin, end))
            room -= end - begin
    plan = plan_batches(np.array(lengths, dtype=np.int64), budget)
    found = list(zip(plan.row, plan.begin, plan.end, strict=True))
    assert [found[low:high] for low, high in pairwise(plan.batch_offsets)] == expected
    assert plan.num_batches == len(expected)


def test_epochs_have_different_orders_that_the_seed_reproduces() -> None:
    events = histories([5] * 20)
    dataset = Dataset(events, whole_histories(events))

    def order(seed: int, epoch: int) -> list[int]:
        batches = dataset.batches(12, seed=seed, epoch=epoch)
        return [item for batch in batches for item in batch.events.items.tolist()]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert sorted(order(0, 0)) == sorted(order(1, 7))


def test_start_skips_batches_without_changing_the_others() -> None:
    events = histories([5, 40, 3, 9, 9, 2, 1])
    dataset = Dataset(events, whole_histories(events))
    everything = list(dataset.batches(8, seed=3, epoch=2))
    assert dataset.num_batches(8, seed=3, epoch=2) == len(everything)
    assert any(batch.carried for batch in everything)
    for start in range(len(everything) + 1):
        rest = list(dataset.batches(8, seed=3, epoch=2, start=start))
        assert len(rest) == len(everything) - start
        for found, expected in zip(rest, everything[start:], strict=True):
            assert torch.equal(found.events.items, expected.events.items)
            assert torch.equal(found.events.offsets, expected.events.offsets)
            assert torch.equal(found.labels, expected.labels)
            assert (found.carried, found.continues) == (expected.carried, expected.continues)


@settings(max_examples=40)
@given(lengths_of_users, st.data())
def test_gather_copies_any_ranges(lengths: list[int], data: st.DataObject) -> None:
    events = histories(lengths)
    bounds = st.tuples(*[st.integers(0, events.num_events)] * 2).map(sorted)
    ranges = np.array(data.draw(st.lists(bounds, max_size=6)), dtype=np.int64).reshape(-1, 2)
    batch = gather(events, ranges[:, 0], ranges[:, 1])
    positions = [n for low, high in ranges for n in range(low, high)]
    assert batch.items.tolist() == events.items[positions].tolist()
    assert batch.times.tolist() == events.times[positions].tolist()
    assert batch.fields["weight"].tolist() == events.fields["weight"][positions].tolist()
    assert batch.lengths.tolist() == (ranges[:, 1] - ranges[:, 0]).tolist()
    assert batch.items.dtype == batch.times.dtype == batch.offsets.dtype == torch.int64


def test_a_dataset_reads_memory_mapped_arrays(tmp_path: Path) -> None:
    events = histories([4, 6])
    for name in ("items", "times", "offsets"):
        np.save(tmp_path / f"{name}.npy", getattr(events, name))
    mapped = Events(
        **{
            name: np.load(tmp_path / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("items", "times", "offsets")
        },
        user_ids=events.user_ids,
        item_ids=events.item_ids,
        facts=events.facts,
    )
    (batch,) = Dataset(mapped, whole_histories(mapped)).batches(100, seed=0, epoch=0)
    assert sorted(batch.events.items.tolist()) == sorted(events.items.tolist())
    # the batch is a copy of its own: writing to it cannot reach the file
    batch.events.items.zero_()
    assert mapped.items.tolist() == events.items.tolist()


def test_a_million_segments_are_planned_without_a_loop_over_them() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, size=1_000_000)
    began = time.process_time()
    plan = plan_batches(lengths, 50)
    assert time.process_time() - began < 3  # a loop over events would take far longer
    assert (plan.end - plan.begin).max() == 50
    assert np.bincount(plan.row, weights=plan.end - plan.begin).astype(int).tolist() == list(
        lengths
    )


def test_errors_name_the_next_step() -> None:
    events = histories([5, 3])
    dataset = Dataset(events, whole_histories(events))
    with pytest.raises(ValueError, match="at least 1 event"):
        dataset.batches(0, seed=0, epoch=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        dataset.batches(10, seed=0, epoch=0, start=2)
    with pytest.raises(ValueError, match="catalogue of 3"):
        dataset.item_counts(3)


def test_segments_without_labels_are_left_out() -> None:
    events = histories([5, 3])
    ends = np.array([5, 8])
    segments = TrainSegments(np.arange(2), np.array([0, 5]), ends, np.array([5, 6]))
    dataset = Dataset(events, segments)
    assert (dataset.num_events, dataset.num_labels) == (3, 2)
    empty = Dataset(events, TrainSegments(*(values[:0] for values in segments)))
    assert list(empty.batches(4, seed=0, epoch=0)) == []
    assert empty.num_batches(4, seed=0, epoch=0) == 0
