"""Lists and ranks against python's own sort, with ties everywhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.inference.topk import mask_items, rank_of, top_k

INF = float("inf")

# few distinct values, so that ties are everywhere
TIED = st.sampled_from([-INF, -1.0, -0.0, 0.0, 0.5, 2.0, INF])


def expected_list(row: list[float], k: int) -> list[tuple[float, int]]:
    ordered = sorted(range(len(row)), key=lambda item: (-row[item], item))[:k]
    return [(row[item], item if row[item] > -INF else -1) for item in ordered]


@st.composite
def tables(draw: st.DrawFn) -> list[list[float]]:
    width = draw(st.integers(1, 9))
    return draw(st.lists(st.lists(TIED, min_size=width, max_size=width), min_size=1, max_size=5))


@settings(max_examples=200)
@given(tables(), st.integers(1, 12))
def test_top_k_is_the_stable_sort(table: list[list[float]], k: int) -> None:
    values, items = top_k(torch.tensor(table), k)
    for row, got_values, got_items in zip(table, values.tolist(), items.tolist(), strict=True):
        assert list(zip(got_values, got_items, strict=True)) == expected_list(row, k)


@settings(max_examples=200)
@given(tables(), st.data())
def test_rank_is_the_place_in_the_list(table: list[list[float]], data: st.DataObject) -> None:
    target = [data.draw(st.integers(0, len(row) - 1)) for row in table]
    ranks = rank_of(torch.tensor(table), torch.tensor(target)).tolist()
    for row, item, rank in zip(table, target, ranks, strict=True):
        order = [place for _, place in expected_list(row, len(row))]
        assert rank == (order.index(item) + 1 if item in order else len(row))


def test_ties_straddling_the_last_place_take_the_lowest_items() -> None:
    scores = torch.zeros(3, 10_000)
    scores[:, 9_999] = 1.0
    assert top_k(scores, 4)[1].tolist() == [[9_999, 0, 1, 2]] * 3


def test_masked_target_ranks_last() -> None:
    scores = mask_items(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([0]), torch.tensor([0]))
    assert rank_of(scores, torch.tensor([0])).tolist() == [3]
    assert rank_of(scores, torch.tensor([1])).tolist() == [1]


def test_mask_leaves_its_input_alone_even_if_expanded() -> None:
    counts = torch.tensor([5.0, 4.0, 3.0])
    masked = mask_items(counts.expand(2, 3), torch.tensor([1, 1]), torch.tensor([0, 0]))
    assert masked.tolist() == [[5.0, 4.0, 3.0], [-INF, 4.0, 3.0]]
    assert counts.tolist() == [5.0, 4.0, 3.0]


def test_more_places_than_items() -> None:
    values, items = top_k(torch.tensor([[1.0, 2.0]]), 10)
    assert (values.tolist(), items.tolist()) == ([[2.0, 1.0]], [[1, 0]])


def test_no_users() -> None:
    values, items = top_k(torch.empty(0, 5), 3)
    assert values.shape == items.shape == (0, 3)
    assert rank_of(torch.empty(0, 5), torch.empty(0, dtype=torch.int64)).shape == (0,)


def test_bad_input() -> None:
    scores = torch.tensor([[1.0, float("nan")]])
    with pytest.raises(ValueError, match="received NaN"):
        top_k(scores, 1)
    with pytest.raises(ValueError, match="received NaN"):
        rank_of(scores, torch.tensor([0]))
    with pytest.raises(ValueError, match="expected k >= 1, received 0"):
        top_k(torch.zeros(1, 2), 0)
    with pytest.raises(ValueError, match="one target per row"):
        rank_of(torch.zeros(2, 2), torch.tensor([0]))
