"""Linear attention: the fast form against the matrix of all pairs, and the algebra of its sums."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from everlong.ops import linear_attention_cpu
from everlong.ops.attention_types import Asked, History, Sums
from everlong.ops.linear_attention import (
    add_events,
    add_one_each,
    linear_attention,
    merged,
    reference_attention,
)

HEADS, WIDTH, DEPTH = 2, 4, 3
NEVER_AND_DAY = torch.tensor([0.0, 1 / 86_400], dtype=torch.float64)


def empty(users: int, rates: Tensor, dtype: torch.dtype = torch.float64) -> Sums:
    shape = (users, HEADS, rates.numel(), WIDTH)
    weighted, mass = torch.zeros(*shape, DEPTH, dtype=dtype), torch.zeros(shape, dtype=dtype)
    return Sums(weighted, mass, torch.zeros(users, dtype=torch.int64))


def history_of(
    lengths: list[int], generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> History:
    total = sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    gaps = torch.randint(0, 40_000, (total,), generator=generator).cumsum(0)
    first = torch.cat([gaps, gaps.new_zeros(1)])[offsets[:-1].clamp(max=total)]
    owner = torch.arange(len(lengths)).repeat_interleave(offsets.diff())
    return History(
        torch.rand(total, HEADS, WIDTH, generator=generator, dtype=torch.float64).to(dtype) + 0.01,
        torch.randn(total, HEADS, DEPTH, generator=generator, dtype=torch.float64).to(dtype),
        1_600_000_000 + gaps - first[owner],
        offsets,
    )


def requests_of(history: History, generator: torch.Generator, most: int = 4) -> Asked:
    """Some requests a user at random cuts, each with some candidates, some with none."""
    user, cut, at = [], [], []
    for row, (start, stop) in enumerate(pairwise(history.offsets.tolist())):
        number = int(torch.randint(0, most, (1,), generator=generator))
        cuts = torch.randint(0, stop - start + 1, (number,), generator=generator).sort().values
        for place in cuts.tolist():
            before = (
                history.times[start + place - 1]
                if place
                else history.times.new_tensor(1_500_000_000)
            )
            user.append(row)
            cut.append(place)
            at.append(int(before) + int(torch.randint(0, 10**5, (1,), generator=generator)))
    candidates = torch.randint(0, 4, (len(user),), generator=generator)
    offsets = torch.cat([candidates.new_zeros(1), candidates.cumsum(0)])
    whole = torch.int64
    return Asked(
        torch.tensor(user, dtype=whole), torch.tensor(cut, dtype=whole),
        torch.tensor(at, dtype=whole), offsets,
    )  # fmt: skip


def queries_for(asked: Asked, generator: torch.Generator) -> Tensor:
    shape = (int(asked.offsets[-1]), HEADS, WIDTH)
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def carried(users: int, rates: Tensor, generator: torch.Generator) -> Sums:
    past = history_of([3] * users, generator)
    return add_events(empty(users, rates), past._replace(times=past.times - 300_000_000), rates)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("rates", [NEVER_AND_DAY[:1], NEVER_AND_DAY])
@pytest.mark.parametrize("seed", range(3))
def test_fast_form_equals_the_reference_in_values_and_gradients(
    rates: Tensor,
    seed: int,
    dtype: torch.dtype,
    parallel: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear_attention_cpu, "PARALLEL_NUMBERS", 0 if parallel else 1 << 60)
    generator = torch.Generator().manual_seed(seed)
    history = history_of([7, 0, 1, 12], generator)
    asked = requests_of(history, generator, most=5)
    queries, before = queries_for(asked, generator), carried(4, rates, generator)
    found = []
    for attend in (linear_attention, reference_attention):
        leaves = [
            tensor.to(dtype).clone().requires_grad_()
            for tensor in (history.features, history.values, queries, before.weighted, before.mass)
        ]
        read, mass = attend(
            history._replace(features=leaves[0], values=leaves[1]),
            leaves[2],
            asked,
            rates,
            Sums(leaves[3], leaves[4], before.at),
        )
        weights = torch.Generator().manual_seed(9)
        loss = (read * torch.randn(read.shape, generator=weights)).sum()
        loss = loss + (mass * torch.randn(mass.shape, generator=weights)).sum()
        found.append((read, mass, *torch.autograd.grad(loss, leaves)))
    for name, fast, slow in zip(
        ("read", "mass", "features", "values", "queries", "weighted", "mass before"),
        *found,
        strict=True,
    ):
        tolerance = 1e-10 if dtype == torch.float64 else 2e-5
        assert torch.allclose(fast, slow, rtol=tolerance, atol=tolerance), name


def test_gradients_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    history = history_of([3, 2], generator)
    whole = torch.int64
    asked = Asked(
        torch.tensor([0, 0, 1]), torch.tensor([1, 3, 2]),
        torch.tensor([1_600_000_100, 1_600_200_000, 1_600_200_000]), torch.tensor([0, 1, 2, 4]),
    )  # fmt: skip
    assert asked.offsets.dtype == whole
    queries = queries_for(asked, generator).requires_grad_()
    before = carried(2, NEVER_AND_DAY, generator)

    def attend(f: Tensor, v: Tensor, q: Tensor, w: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        changed = history._replace(features=f, values=v)
        return linear_attention(changed, q, asked, NEVER_AND_DAY, Sums(w, z, before.at))

    inputs = (history.features, history.values, queries, before.weighted, before.mass)
    leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
    assert torch.autograd.gradcheck(attend, leaves)


def test_quotient_is_row_normalised_attention() -> None:
    generator = torch.Generator().manual_seed(1)
    history = history_of([9], generator)
    asked = Asked(
        torch.tensor([0]), torch.tensor([9]), history.times[-1:] + 5, torch.tensor([0, 4])
    )
    queries, rates = queries_for(asked, generator), NEVER_AND_DAY[:1]
    read, mass = linear_attention(history, queries, asked, rates, empty(1, rates))
    weights = torch.einsum("phf,nhf->hpn", queries, history.features)
    weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.einsum("hpn,nhe->phe", weights, history.values)
    assert torch.allclose(read[:, :, 0] / mass[..., 0, None], expected, atol=1e-12)
    assert bool((mass > 0).all())


def test_constant_features_are_mean_pooling_and_one_event_is_its_value() -> None:
    generator = torch.Generator().manual_seed(2)
    history = history_of([6], generator)
    history = history._replace(features=torch.ones_like(history.features))
    rates = NEVER_AND_DAY[:1]
    for cut, expected in ((6, history.values.mean(0)), (1, history.values[0])):
        asked = Asked(
            torch.tensor([0]), torch.tensor([cut]), history.times[-1:], torch.tensor([0, 3])
        )
        read, mass = linear_attention(
            history, queries_for(asked, generator), asked, rates, empty(1, rates)
        )
        assert torch.allclose(read[:, :, 0] / mass[..., 0, None], expected.expand(3, -1, -1))


def test_events_after_the_cut_change_nothing() -> None:
    generator = torch.Generator().manual_seed(3)
    history = history_of([8, 5], generator)
    asked = requests_of(history, generator, most=4)
    asked = Asked(asked.user, asked.cut.clamp(max=4), asked.at, asked.offsets)
    queries = queries_for(asked, generator)
    before = empty(2, NEVER_AND_DAY)
    features, values = history.features.clone(), history.values.clone()
    later = torch.tensor([4, 5, 6, 7, 12])
    features[later], values[later] = 99.0, -99.0
    changed = history._replace(features=features, values=values)
    a = linear_attention(history, queries, asked, NEVER_AND_DAY, before)
    b = linear_attention(changed, queries, asked, NEVER_AND_DAY, before)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4), seed=st.integers(0, 999))
def test_sums_are_a_commutative_group(lengths: list[int], seed: int) -> None:
    generator, rates = torch.Generator().manual_seed(seed), NEVER_AND_DAY
    history, users = history_of(lengths, generator), len(lengths)
    total = add_events(empty(users, rates), history, rates)

    # one by one, the last first: every event but the first is late
    now = empty(users, rates)
    for place in reversed(range(max(lengths))):
        rows = torch.tensor([u for u, n in enumerate(lengths) if n > place], dtype=torch.int64)
        at = history.offsets[rows] + place
        part = History(
            history.features[at], history.values[at], history.times[at], torch.arange(len(at) + 1)
        )
        new = add_one_each(Sums(*(x[rows] for x in now)), part, rates)
        now = Sums(*(x.index_copy(0, rows, y) for x, y in zip(now, new, strict=True)))
    same(total, now)

    # in two halves, merged
    half = torch.rand(sum(lengths), generator=generator) < 0.5
    parts = [
        add_events(empty(users, rates), chosen(history, mask), rates) for mask in (half, ~half)
    ]
    same(total, merged(*parts, rates))
    # and one half taken out again
    left = add_events(total, chosen(history, half), rates, sign=-1)
    same(left._replace(at=total.at), moved(parts[1], total.at, rates))


def chosen(history: History, mask: Tensor) -> History:
    counts = torch.stack([mask[a:b].sum() for a, b in pairwise(history.offsets.tolist())])
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return History(history.features[mask], history.values[mask], history.times[mask], offsets)


def moved(sums: Sums, at: Tensor, rates: Tensor) -> Sums:
    zero = Sums(torch.zeros_like(sums.weighted), torch.zeros_like(sums.mass), at)
    return merged(sums, zero, rates)


def same(a: Sums, b: Sums) -> None:
    assert torch.equal(a.at, b.at)
    assert torch.allclose(a.weighted, b.weighted, atol=1e-12)
    assert torch.allclose(a.mass, b.mass, atol=1e-12)


def test_wrong_shapes_and_orders_are_named() -> None:
    generator, rates = torch.Generator().manual_seed(0), NEVER_AND_DAY
    history = history_of([4, 4], generator)
    good = Asked(
        torch.tensor([0, 1]), torch.tensor([2, 4]), history.times[[3, 7]], torch.tensor([0, 2, 3])
    )
    queries, before = queries_for(good, generator), empty(2, rates)
    with pytest.raises(ValueError, match=r"expects before\.mass \(2, 2, 1, 4\)"):
        linear_attention(history, queries, good, rates[:1], before._replace(weighted=before.weighted[:, :, :1]))  # noqa: E501  # fmt: skip
    with pytest.raises(ValueError, match="number of queries"):
        linear_attention(history, queries[:2], good, rates, before)
    wrong = Asked(good.user.flip(0), good.cut, good.at, good.offsets)
    with pytest.raises(ValueError, match="order of user"):
        linear_attention(history, queries, wrong, rates, before)
    wrong = Asked(good.user, good.cut + 1, good.at, good.offsets)
    with pytest.raises(ValueError, match="its cut is outside"):
        linear_attention(history, queries, wrong, rates, before)
