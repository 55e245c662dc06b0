"""Losses of rankers against their definitions."""

import math

import pytest
import torch

from everlong.ops.sets import Sets
from everlong.training.ranker_losses import (
    listwise_loss,
    pairwise_loss,
    pointwise_loss,
    ranker_loss,
)

NAN = math.nan
OFFSETS = torch.tensor([0, 3, 3, 4, 8])
LABELS = torch.tensor([1.0, 0.0, NAN, 1.0, 1.0, 0.5, 0.0, NAN], dtype=torch.float64)
LOGITS = torch.tensor([0.3, -1.0, 9.0, 2.0, 0.1, 0.4, -0.2, 5.0], dtype=torch.float64)

POINT, PAIR, LIST = {"pointwise": 1.0}, {"pairwise": 1.0}, {"listwise": 1.0}
MIX = {"pointwise": 1.0, "pairwise": 2.0, "listwise": 3.0}


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_pointwise_is_the_mean_log_loss_of_what_is_labelled() -> None:
    known = [(float(x), float(y)) for x, y in zip(LOGITS, LABELS, strict=True) if y == y]
    expected = sum(softplus(x) - y * x for x, y in known) / len(known)
    assert float(pointwise_loss(LOGITS, LABELS, Sets.of(OFFSETS))) == pytest.approx(expected)


def test_pairwise_is_the_mean_over_requests_of_the_mean_over_pairs() -> None:
    first = softplus(-1.3)
    last = (softplus(0.3) + softplus(-0.3) + softplus(-0.6)) / 3
    expected = (first + last) / 2
    assert float(pairwise_loss(LOGITS, LABELS, Sets.of(OFFSETS))) == pytest.approx(expected)


def test_listwise_is_the_cross_entropy_to_shares_of_the_labels() -> None:
    def chances(*logits: float) -> list[float]:
        total = sum(math.exp(x) for x in logits)
        return [math.log(math.exp(x) / total) for x in logits]

    first = -chances(0.3, -1.0)[0]
    a, b, _ = chances(0.1, 0.4, -0.2)
    expected = (first - (a / 1.5 + 0.5 * b / 1.5)) / 2
    sets = Sets.of(OFFSETS)
    assert float(listwise_loss(LOGITS, LABELS, sets)) == pytest.approx(expected)
    moved = LOGITS + torch.tensor([5.0, 5, 5, -2, 7, 7, 7, 7])
    assert float(listwise_loss(moved, LABELS, sets)) == pytest.approx(expected)


@pytest.mark.parametrize("shares", [POINT, PAIR, LIST, MIX])
def test_what_is_not_labelled_has_no_gradient(shares: dict[str, float]) -> None:
    logits = LOGITS.clone().requires_grad_()
    ranker_loss(logits, LABELS, OFFSETS, shares).backward()
    assert logits.grad is not None
    assert bool((logits.grad[LABELS.isnan()] == 0).all())
    assert bool(logits.grad.isfinite().all())
    assert bool((logits.grad[[0, 1, 4, 6]] != 0).all())


@pytest.mark.parametrize("labels", [[0.0, 0.0], [1.0, 1.0], [NAN, NAN], [NAN, 1.0]])
def test_requests_that_say_nothing_of_an_order_are_nothing(labels: list[float]) -> None:
    logits = torch.tensor([1.0, -1.0], requires_grad=True)
    values, offsets = torch.tensor(labels), torch.tensor([0, 2])
    loss = ranker_loss(logits, values, offsets, PAIR)
    assert float(loss) == 0
    mixed = ranker_loss(logits, values, offsets, MIX)
    mixed.backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected logits and labels \[P\]"):
        ranker_loss(LOGITS, LABELS[:2], OFFSETS, POINT)
    with pytest.raises(ValueError, match="received offsets up to 7"):
        ranker_loss(LOGITS, LABELS, torch.tensor([0, 7]), POINT)
    with pytest.raises(ValueError, match="of at least 0 and one above, received"):
        ranker_loss(LOGITS, LABELS, OFFSETS, {"pairwise": 0.0})
    with pytest.raises(ValueError, match="expected shares of pointwise"):
        ranker_loss(LOGITS, LABELS, OFFSETS, {"hinge": 1.0})
    with pytest.raises(ValueError, match="labels from 0 to 1"):
        ranker_loss(LOGITS, LABELS * 5, OFFSETS, POINT)
