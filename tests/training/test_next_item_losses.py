import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from everlong.models.user_model import ItemEmbeddings
from everlong.training.next_item_losses import (
    Negatives,
    NegativeSampler,
    full_softmax,
    infonce,
    reference_softmax,
    sampled_softmax,
)

ITEMS, DIM = 37, 6


class Case:
    """Vectors, an item head and targets, with gradients."""

    def __init__(self, events: int, dtype: torch.dtype = torch.float64, items: int = ITEMS) -> None:
        random = torch.Generator().manual_seed(events)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=dtype).requires_grad_()

        self.vectors, self.weight, self.bias = draw(events, DIM), draw(items, DIM), draw(items)
        self.targets = torch.randint(items, (events,), generator=random)

    @property
    def head(self) -> ItemEmbeddings:
        return ItemEmbeddings(self.weight, self.bias)

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.vectors, self.weight, self.bias))

    def reference(self) -> Tensor:
        return reference_softmax(self.vectors, self.head, self.targets)


def chunk(rows: int, dtype: torch.dtype, items: int = ITEMS) -> int:
    return rows * items * dtype.itemsize


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)]
)
@pytest.mark.parametrize("events", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("rows", [1, 16, 17, 49, 50, 1000])
def test_full_softmax_equals_the_whole_table(
    dtype: torch.dtype, tolerance: float, events: int, rows: int
) -> None:
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    case = Case(events, wide)
    loss = full_softmax(
        case.vectors, case.head, case.targets, dtype=dtype, chunk_bytes=chunk(rows, dtype)
    )
    expected = case.reference()
    assert loss.dtype == wide
    torch.testing.assert_close(loss, expected, atol=tolerance, rtol=tolerance)
    for ours, theirs in zip(case.gradients(loss), case.gradients(expected), strict=True):
        assert ours.dtype == wide
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def test_the_gradient_of_what_follows_the_loss_passes_through() -> None:
    case = Case(40)
    loss = full_softmax(case.vectors * 2, case.head, case.targets, chunk_bytes=1)
    expected = reference_softmax(case.vectors * 2, case.head, case.targets)
    for ours, theirs in zip(
        case.gradients(loss.square()), case.gradients(expected.square()), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kept", ["vectors", "weight", "bias"])
def test_one_input_alone_may_need_a_gradient(kept: str) -> None:
    case = Case(20)
    parts = {
        name: getattr(case, name) if name == kept else getattr(case, name).detach()
        for name in ("vectors", "weight", "bias")
    }
    head = ItemEmbeddings(parts["weight"], parts["bias"])
    loss = full_softmax(parts["vectors"], head, case.targets)
    expected = reference_softmax(parts["vectors"], head, case.targets)
    (ours,), (theirs,) = (torch.autograd.grad(x, [parts[kept]]) for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_a_second_derivative_is_refused_instead_of_wrong() -> None:
    case = Case(20)
    loss = full_softmax(case.vectors, case.head, case.targets).square()
    (first,) = torch.autograd.grad(loss, [case.vectors], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


@pytest.mark.parametrize("gap", [50.0, 88.0, 95.0, 103.0, 110.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_target_whose_chance_underflows_has_its_loss(gap: float, dtype: torch.dtype) -> None:
    bias = torch.zeros(3)
    bias[0] = -gap
    head = ItemEmbeddings(torch.zeros(3, 2), bias.requires_grad_())
    targets = torch.tensor([0, 1, 0])
    loss = full_softmax(torch.ones(3, 2), head, targets, dtype=dtype)
    expected = reference_softmax(torch.ones(3, 2), head, targets)
    torch.testing.assert_close(
        loss, expected, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=0
    )
    (ours,), (theirs,) = (torch.autograd.grad(x, [bias]) for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_what_is_not_finite_is_not_hidden() -> None:
    case = Case(20, torch.float32)
    with torch.no_grad():
        case.vectors[3, 2] = math.nan
    assert full_softmax(case.vectors, case.head, case.targets).isnan()


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return result


def test_the_table_of_scores_never_exists() -> None:
    events, items, rows = 600, 200, 32
    case = Case(events, torch.float32, items)
    sampler = NegativeSampler(torch.ones(items), 2000)
    negatives = sampler.draw(torch.Generator().manual_seed(0))
    limit = chunk(rows, torch.float32, items)

    def largest(run) -> int:  # type: ignore[no-untyped-def]
        with Largest() as mode:
            case.gradients(run())
        return mode.numbers

    few = max(events * DIM, items * DIM, rows * items)
    full = largest(lambda: full_softmax(case.vectors, case.head, case.targets, chunk_bytes=limit))
    sampled = largest(
        lambda: sampled_softmax(case.vectors, case.head, case.targets, negatives, chunk_bytes=limit)
    )
    against = largest(
        lambda: infonce(case.vectors, case.head, case.targets, negatives.items, chunk_bytes=limit)
    )
    assert full <= few
    assert sampled <= few
    assert against <= few
    # the measure sees the table where there is one
    assert largest(case.reference) == events * items


def all_items(items: int = ITEMS) -> Negatives:
    nothing = torch.zeros(items, dtype=torch.float64)
    return Negatives(torch.arange(items), nothing, nothing)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)]
)
@pytest.mark.parametrize("rows", [1, 17, 1000])
def test_with_every_item_drawn_sampled_is_full(
    dtype: torch.dtype, tolerance: float, rows: int
) -> None:
    case = Case(50, torch.float32 if dtype == torch.bfloat16 else dtype)
    loss = sampled_softmax(
        case.vectors,
        case.head,
        case.targets,
        all_items(),
        dtype=dtype,
        chunk_bytes=chunk(rows, dtype),
    )
    expected = case.reference()
    torch.testing.assert_close(loss, expected, atol=tolerance, rtol=tolerance)
    for ours, theirs in zip(case.gradients(loss), case.gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


def brute_force(case: Case, negatives: Negatives) -> Tensor:
    """The sampled loss event by event, from its definition."""
    losses = []
    for vector, target in zip(case.vectors, case.targets.tolist(), strict=True):
        scores = [vector @ case.weight[target] + case.bias[target]]
        scores[0] = scores[0] - negatives.target_log_expected[target]
        for item, expected in zip(negatives.items, negatives.log_expected, strict=True):
            if item != target:
                scores.append(vector @ case.weight[item] + case.bias[item] - expected)
        losses.append(torch.stack(scores).logsumexp(0) - scores[0])
    return torch.stack(losses).mean()


@settings(max_examples=15)
@given(
    events=st.integers(1, 30),
    counts=st.lists(st.integers(0, 500), min_size=2, max_size=25),
    number=st.integers(1, 60),
    power=st.sampled_from([0.0, 0.75, 1.0]),
)
def test_a_negative_that_is_the_target_does_not_count(
    events: int, counts: list[int], number: int, power: float
) -> None:
    case = Case(events, items=len(counts))
    sampler = NegativeSampler(torch.tensor(counts), number, power)
    negatives = sampler.draw(torch.Generator().manual_seed(number))
    expected = brute_force(case, negatives)
    loss = sampled_softmax(case.vectors, case.head, case.targets, negatives, chunk_bytes=1)
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
    ours = torch.autograd.grad(loss, (case.vectors, case.weight, case.bias))
    theirs = torch.autograd.grad(
        expected, (case.vectors, case.weight, case.bias), materialize_grads=True
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_the_correction_turns_the_mean_gradient_towards_the_full_one() -> None:
    items, events, draws = 60, 64, 150
    counts = (4000 / torch.arange(1, items + 1) ** 1.5).long()
    case = Case(events, items=items)
    with torch.no_grad():
        for part in (case.vectors, case.weight, case.bias):
            part.mul_(0.5)
    random = torch.Generator().manual_seed(0)
    case.targets = torch.multinomial(counts + 1.0, events, replacement=True, generator=random)
    sampler = NegativeSampler(counts, 40, power=1.0)
    full = torch.cat([g.flatten() for g in case.gradients(case.reference())[1:]])

    def direction(corrected: bool) -> float:
        total = torch.zeros_like(full)
        random = torch.Generator().manual_seed(1)
        for _ in range(draws):
            negatives = sampler.draw(random)
            if not corrected:
                nothing = torch.zeros(items)
                negatives = Negatives(negatives.items, nothing[negatives.items], nothing)
            loss = sampled_softmax(case.vectors, case.head, case.targets, negatives)
            total += torch.cat([g.flatten() for g in case.gradients(loss)[1:]])
        return float(torch.nn.functional.cosine_similarity(total, full, dim=0))

    with_correction, without = direction(True), direction(False)
    assert with_correction > 0.985
    assert without < 0.95


def test_expected_counts_are_those_of_a_simulation() -> None:
    counts = torch.tensor([0, 1, 3, 10, 40, 200, 1000])
    sampler = NegativeSampler(counts, 12)
    random = torch.Generator().manual_seed(0)
    draws, seen = 1500, torch.zeros(len(counts))
    for _ in range(draws):
        negatives = sampler.draw(random)
        assert (negatives.items.diff() > 0).all()
        assert torch.equal(negatives.log_expected, negatives.target_log_expected[negatives.items])
        seen[negatives.items] += 1
    chance = negatives.target_log_expected.exp()
    deviation = (chance * (1 - chance) / draws).sqrt()
    assert ((seen / draws - chance).abs() <= 4.5 * deviation + 1e-6).all()
    # by hand: share of the last item, and the chance that twelve draws miss it
    share = (counts + 1.0) ** 0.75
    assert chance[-1] == pytest.approx(1 - (1 - float(share[-1] / share.sum())) ** 12, rel=1e-5)


def test_draws_follow_the_generator() -> None:
    sampler = NegativeSampler(torch.arange(100), 20)
    first, again, other = (
        sampler.draw(torch.Generator().manual_seed(seed)).items for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_catalogue_of_one_item_has_loss_zero() -> None:
    case = Case(3, items=1)
    negatives = NegativeSampler(torch.tensor([5]), 4).draw()
    for loss in (
        full_softmax(case.vectors, case.head, case.targets),
        sampled_softmax(case.vectors, case.head, case.targets, negatives),
    ):
        assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)
        assert all((g.abs() < 1e-12).all() for g in case.gradients(loss))


def nce_by_hand(case: Case, items: Tensor, same: float) -> Tensor:
    """``infonce`` from the whole table of scores, from its definition."""
    scores = case.vectors @ case.weight.T + case.bias
    weight = case.weight.detach()
    alike = cosine_similarity(weight[case.targets].unsqueeze(1), weight[items], dim=2) > same
    alike |= case.targets.unsqueeze(1) == items
    answers = scores.gather(1, case.targets.unsqueeze(1))
    others = scores[:, items].masked_fill(alike, -torch.inf)
    return (torch.cat([answers, others], dim=1).logsumexp(1) - answers.squeeze(1)).mean()


def test_nce_of_three_items_by_hand() -> None:
    # items 0 and 1 at a right angle, item 2 between them: its cosine with each is 0.6 or 0.8
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.6, 0.8]], dtype=torch.float64)
    bias = torch.tensor([0.0, 0.5, -1.0], dtype=torch.float64)
    vectors = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    targets, items = torch.tensor([0, 1]), torch.tensor([2, 0, 2])
    # scores of items 0, 1, 2: the first event 1, 4.5, 1.2; the second 0, 2.5, -0.2
    first = -math.log(math.exp(1) / (math.exp(1) + 2 * math.exp(1.2)))
    second = -math.log(math.exp(2.5) / (math.exp(2.5) + math.exp(0) + 2 * math.exp(-0.2)))
    loss = infonce(vectors, ItemEmbeddings(weight, bias), targets, items)
    assert float(loss) == pytest.approx((first + second) / 2, rel=1e-12)
    # the second event's target is too much like item 2 for this bound, the first one's is not
    second = -math.log(math.exp(2.5) / (math.exp(2.5) + math.exp(0)))
    loss = infonce(vectors, ItemEmbeddings(weight, bias), targets, items, same=0.7)
    assert float(loss) == pytest.approx((first + second) / 2, rel=1e-12)


@pytest.mark.parametrize(("degrees", "counts"), [(7.0, False), (9.0, True)])
def test_a_negative_much_like_the_target_does_not_count(degrees: float, counts: bool) -> None:
    # cos 7 = 0.9925, cos 9 = 0.9877; lengths do not matter
    angle = math.radians(degrees)
    near = [3 * math.cos(angle), 3 * math.sin(angle)]
    head = ItemEmbeddings(torch.tensor([[1.0, 0.0], near, [0.0, 1.0]]), torch.zeros(3))
    vectors, targets = torch.ones(1, 2), torch.tensor([0])
    with_it = infonce(vectors, head, targets, torch.tensor([1, 2]))
    without = infonce(vectors, head, targets, torch.tensor([2]))
    assert bool(with_it > without) is counts
    assert counts or torch.equal(with_it, without)


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_nce_of_equal_scores_is_the_log_of_their_number(scale: float) -> None:
    # vectors of zeros have no direction to compare; the target is then known by its row
    head = ItemEmbeddings(scale * torch.eye(12), torch.full((12,), 0.3))
    vectors, targets = torch.zeros(4, 12), torch.tensor([0, 3, 3, 11])
    for items, others in ((torch.arange(4, 11), 7), (torch.arange(12), 11)):
        loss = infonce(vectors, head, targets, items)
        assert float(loss) == pytest.approx(math.log(others + 1), rel=1e-6)


@settings(max_examples=30)
@given(
    events=st.integers(1, 40),
    items=st.integers(1, 20),
    negatives=st.lists(st.integers(0, 1000), min_size=1, max_size=60),
    same=st.sampled_from([-0.5, 0.3, 0.9, 0.99]),
)
def test_nce_is_that_of_the_whole_table(
    events: int, items: int, negatives: list[int], same: float
) -> None:
    case = Case(events, items=items)
    drawn = torch.tensor(negatives) % items
    expected = nce_by_hand(case, drawn, same)
    loss = infonce(case.vectors, case.head, case.targets, drawn, same=same, chunk_bytes=1)
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
    for ours, theirs in zip(case.gradients(loss), case.gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_nce_in_bfloat16_is_near_that_in_float32() -> None:
    case, drawn = Case(50, torch.float32), torch.arange(0, ITEMS, 2)
    loss = infonce(case.vectors, case.head, case.targets, drawn, dtype=torch.bfloat16)
    expected = infonce(case.vectors, case.head, case.targets, drawn)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=5e-2, rtol=5e-2)
    for ours, theirs in zip(case.gradients(loss), case.gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_nce_without_any_negative_that_counts_is_zero(dtype: torch.dtype) -> None:
    case = Case(20, torch.float64 if dtype == torch.float64 else torch.float32)
    # every cosine is above this
    loss = infonce(
        case.vectors, case.head, case.targets, torch.arange(ITEMS), same=-2.0, dtype=dtype
    )
    assert float(loss.detach()) == 0.0
    for gradient in case.gradients(loss):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_nce_refuses_impossible_negatives() -> None:
    case = Case(5)
    with pytest.raises(ValueError, match="needs negatives: expected at least one"):
        infonce(case.vectors, case.head, case.targets, torch.arange(0))
    with pytest.raises(ValueError, match=rf"negatives are item rows 0 \.\. {ITEMS - 1}, received"):
        infonce(case.vectors, case.head, case.targets, torch.tensor([3, ITEMS]))


@pytest.mark.parametrize("loss", ["full", "sampled", "infonce"])
def test_impossible_input_is_refused(loss: str) -> None:
    case = Case(5)

    def run(vectors: Tensor, targets: Tensor) -> Tensor:
        if loss == "full":
            return full_softmax(vectors, case.head, targets)
        if loss == "infonce":
            return infonce(vectors, case.head, targets, torch.arange(ITEMS))
        return sampled_softmax(vectors, case.head, targets, all_items())

    with pytest.raises(ValueError, match="received 0 vectors and 0 targets"):
        run(case.vectors[:0], case.targets[:0])
    with pytest.raises(ValueError, match="received 5 vectors and 4 targets"):
        run(case.vectors, case.targets[:4])
    with pytest.raises(ValueError, match=rf"0 \.\. {ITEMS - 1}, received 0 \.\. {ITEMS}"):
        run(case.vectors[:2], torch.tensor([0, ITEMS]))
    with pytest.raises(ValueError, match=r"received -1 \.\. 2"):
        run(case.vectors[:2], torch.tensor([-1, 2]))


def test_an_impossible_sampler_is_refused() -> None:
    with pytest.raises(ValueError, match="number=0"):
        NegativeSampler(torch.ones(3), 0)
    with pytest.raises(ValueError, match="smallest count -2"):
        NegativeSampler(torch.tensor([1, -2]), 3)
