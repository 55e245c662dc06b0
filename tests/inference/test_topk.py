"""Lists and ranks against python's own sort, with ties everywhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from everlong.inference.topk import mask_items, rank_of, top_k, top_k_items

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


@settings(deadline=None, max_examples=200)
@given(tables(), st.integers(1, 12))
def test_top_k_is_the_stable_sort(table: list[list[float]], k: int) -> None:
    values, items = top_k(torch.tensor(table), k)
    for row, got_values, got_items in zip(table, values.tolist(), items.tolist(), strict=True):
        assert list(zip(got_values, got_items, strict=True)) == expected_list(row, k)


@settings(deadline=None, max_examples=200)
@given(tables(), st.data())
def test_rank_counts_ties_against_us(table: list[list[float]], data: st.DataObject) -> None:
    target = [data.draw(st.integers(0, len(row) - 1)) for row in table]
    ranks = rank_of(torch.tensor(table), torch.tensor(target)).tolist()
    for row, item, rank in zip(table, target, ranks, strict=True):
        assert rank == sum(score >= row[item] for score in row)


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
    assert top_k_items(torch.empty(0, 2), torch.ones(5, 2), torch.ones(5), 3)[1].shape == (0, 3)


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


def whole(user: Tensor, weight: Tensor, bias: Tensor, pairs: Tensor) -> Tensor:
    return mask_items(torch.addmm(bias, user, weight.T), pairs[:, 0], pairs[:, 1])


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 3000), st.integers(1, 2000))
def test_blocks_do_not_change_the_list(seed: int, users: int, items: int, k: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    # small whole numbers: ties everywhere, and sums exact in any order
    user = torch.randint(-2, 3, (users, 3), generator=draw).float()
    weight = torch.randint(-2, 3, (items, 3), generator=draw).float()
    bias = torch.randint(-1, 2, (items,), generator=draw).float()
    pairs = torch.stack(
        [
            torch.randint(users, (4 * items,), generator=draw),
            torch.randint(items, (4 * items,), generator=draw),
        ],
        dim=1,
    )
    expected = top_k(whole(user, weight, bias, pairs), k)
    received = top_k_items(
        user, weight, bias, k, exclude=(pairs[:, 0], pairs[:, 1]), scores_per_batch=2048
    )
    torch.testing.assert_close(received, expected, rtol=0, atol=0)


def test_nothing_excluded() -> None:
    user, weight, bias = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2)
    assert top_k_items(user, weight, bias, 1)[1].tolist() == [[0], [1]]
