from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from everlong.ops import pointwise_attention as module
from everlong.ops.pointwise_attention import (
    Blocks,
    RelativeBias,
    dense_attention,
    elapsed_bucket,
    pointwise_attention,
    reference_attention,
)

Attention = Callable[..., Tensor]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


@pytest.fixture(params=["fused", "torch"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Attention:
    """The form for CPU, and the one for every other device, which runs here too."""
    if request.param == "torch":
        monkeypatch.setattr(module, "_fused", lambda scores: False)
    return pointwise_attention


class Case(NamedTuple):
    """Inputs of one call."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: list[Blocks]
    bias: RelativeBias | None

    def leaves(self) -> list[Tensor]:
        found = [self.query, self.key, self.value]
        return found if self.bias is None else [*found, self.bias.distance, self.bias.elapsed]


def random_plan(generator: torch.Generator, queries: int, keys: int, groups: int) -> list[Blocks]:
    """Blocks of random rows; each query is valid once at most, keys come again and again."""

    def whole(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    left, mask = torch.randperm(queries, generator=generator), []
    for _ in range(groups):
        number, wide, columns = (int(whole(1, high, 1)) for high in (4, 5, 9))
        taken, left = left[: number * wide], left[number * wide :]
        valid = torch.zeros(number * wide, dtype=torch.bool)
        valid[: len(taken)] = True
        rows = whole(0, max(queries, 1), number * wide)
        rows[: len(taken)] = taken
        first = whole(0, columns + 1, number, wide)
        mask.append(
            Blocks(
                rows.view(number, wide),
                whole(0, keys, number, columns),
                first,
                # some see nothing
                (first + whole(-1, columns + 1, number, wide)).clamp(max=columns),
                valid.view(number, wide),
            )
        )
    return mask


def make(
    seed: int, *, queries: int, keys: int, groups: int, biased: bool, dtype: torch.dtype
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    heads, size = (int(torch.randint(1, 4, (1,), generator=generator)) for _ in range(2))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    bias = None
    if biased:
        distances = int(torch.randint(1, 9, (1,), generator=generator))
        times = [(torch.rand(n, generator=generator) * 30).exp2().long() for n in (queries, keys)]
        bias = RelativeBias(normal(distances), normal(64), *times)
    case = Case(
        normal(queries, heads, size),
        normal(keys, heads, size),
        normal(keys, heads, size),
        random_plan(generator, queries, keys, groups),
        bias,
    )
    for leaf in case.leaves():
        leaf.requires_grad_()
    return case


def outcome(form: Attention, case: Case, weights: Tensor) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    output = form(case.query, case.key, case.value, case.mask, case.bias)
    found = torch.autograd.grad(
        (output * weights).sum() + 0 * sum(leaf.sum() for leaf in case.leaves()), case.leaves()
    )
    return [output.detach(), *found]


cases = st.builds(
    make,
    st.integers(0, 10_000),
    queries=st.integers(1, 20),
    keys=st.integers(1, 12),
    groups=st.integers(0, 4),
    biased=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)


@settings(max_examples=80)
@given(case=cases, chunk=st.sampled_from([1, 50, 1 << 19]), fused=st.booleans())
def test_all_forms_agree_in_values_and_gradients(case: Case, chunk: int, fused: bool) -> None:
    weights = torch.randn(case.query.shape, dtype=torch.float64).to(case.query.dtype)
    expected = outcome(reference_attention, case, weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_SCORES", chunk)
        if not fused:
            patch.setattr(module, "_fused", lambda scores: False)
        found = outcome(pointwise_attention, case, weights)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        scale = 1 + (theirs.abs().max() if theirs.numel() else 0)
        gap = (ours - theirs).abs().max() if theirs.numel() else 0
        assert gap <= TOLERANCE[case.query.dtype] * scale


def causal(length: int, block: int = 4) -> list[Blocks]:
    """One history, ``block`` queries at a time."""
    mask = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        rows = torch.arange(start, stop)[None]
        mask.append(
            Blocks(rows, torch.arange(stop)[None], rows * 0, rows + 1, torch.ones_like(rows).bool())
        )
    return mask


def test_the_published_form_agrees(attention: Attention) -> None:
    case = make(1, queries=11, keys=11, groups=0, biased=True, dtype=torch.float64)
    assert case.bias is not None
    place = torch.arange(11)
    bias = RelativeBias(case.bias.distance, case.bias.elapsed, place * 60, place * 60)
    distance = (place[:, None] - place).clamp(0, bias.distance.numel() - 1)
    table = bias.distance[distance] + bias.elapsed[elapsed_bucket(60 * (place[:, None] - place))]
    visible = place[:, None] >= place
    expected = dense_attention(case.query, case.key, case.value, visible, table)
    found = attention(case.query, case.key, case.value, causal(11), bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_by_hand(attention: Attention) -> None:
    """Two keys, scores 1 and 2, and a bias of 0.5 on the nearer."""
    query, key = torch.ones(1, 1, 1).double(), torch.tensor([1.0, 2.0]).view(2, 1, 1).double()
    value = torch.tensor([10.0, 100.0]).view(2, 1, 1).double()
    rows = torch.zeros(1, 1, dtype=torch.int64)
    mask = [Blocks(rows, torch.tensor([[0, 1]]), rows, rows + 2, rows == 0)]
    distance = torch.tensor([0.5, 0.0]).double()
    times = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    bias = RelativeBias(distance, torch.zeros(64).double(), *times)
    silu = lambda x: x / (1 + math.exp(-x))
    expected = (silu(1.0) * 10 + silu(2.5) * 100) / 2
    assert float(attention(query, key, value, mask, bias)) == pytest.approx(expected, rel=1e-12)


def test_gradients_by_differences(attention: Attention) -> None:
    case = make(3, queries=6, keys=5, groups=3, biased=True, dtype=torch.float64)
    assert case.bias is not None
    times = case.bias.query_times, case.bias.key_times

    def run(query: Tensor, key: Tensor, value: Tensor, distance: Tensor, elapsed: Tensor) -> Tensor:
        return attention(query, key, value, case.mask, RelativeBias(distance, elapsed, *times))

    assert torch.autograd.gradcheck(run, case.leaves())


def test_buckets_of_elapsed_times() -> None:
    edges = {0: 0, 1: 2, 2: 3, 3: 4, 4: 4, 5: 5, 6: 5, 7: 6, -5: 0, 1 << 62: 63}
    seconds = torch.tensor(list(edges))
    assert elapsed_bucket(seconds).tolist() == list(edges.values())
    rising = elapsed_bucket(torch.arange(100_000))
    assert (rising.diff() >= 0).all()
    # two an octave
    assert (
        int(elapsed_bucket(torch.tensor(86_400 * 2 + 1)) - elapsed_bucket(torch.tensor(86_400)))
        == 2
    )


def test_the_fused_loop_has_the_same_buckets() -> None:
    """A table that holds its own index, read at every edge of a bucket and beside it."""
    edges = torch.cat([(1 << torch.arange(33)), 3 << torch.arange(32)])
    seconds = torch.cat([edges - 2, edges - 1, edges]).clamp(min=0)
    number = seconds.numel()
    one = torch.zeros(number, 1, dtype=torch.int64)
    rows = torch.arange(number)[:, None]
    mask = [Blocks(rows, one, one, one + 1, one == 0)]
    bias = RelativeBias(
        torch.zeros(1), 100.0 + torch.arange(64.0), seconds, torch.zeros(1, dtype=torch.int64)
    )
    zero, value = torch.zeros(number, 1, 1), torch.ones(1, 1, 1)
    found = pointwise_attention(zero, value * 0, value, mask, bias)
    assert (found.flatten() - 100).round().long().equal(elapsed_bucket(seconds))


def test_queries_without_visible_keys_are_zero_without_gradient(attention: Attention) -> None:
    case = make(5, queries=4, keys=3, groups=0, biased=True, dtype=torch.float32)
    rows = torch.tensor([[0, 1]])
    mask = [
        Blocks(rows, torch.tensor([[0, 1, 2]]), rows * 0 + 2, rows * 0 + 2, torch.ones(1, 2).bool())
    ]
    for blocks in ([], mask):
        output = attention(case.query, case.key, case.value, blocks, case.bias)
        assert not output.any()
        (gradient,) = torch.autograd.grad(output.sum(), case.query)
        assert not gradient.any()


def test_large_scores_saturate_and_nan_passes_through(attention: Attention) -> None:
    rows = torch.arange(4)[:, None]
    mask = [Blocks(rows, rows, rows * 0, rows * 0 + 1, rows >= 0)]
    query = torch.tensor([1e4, -1e4, 1e30, float("nan")]).view(4, 1, 1).requires_grad_()
    one = torch.ones(4, 1, 1)
    output = attention(query, one, one, mask)
    assert output[:3].flatten().tolist() == pytest.approx([1e4, 0.0, 1e30], rel=1e-6, abs=1e-30)
    assert output[3].isnan().all()
    (gradient,) = torch.autograd.grad(output[:3].sum(), query)
    assert gradient[:3].flatten().tolist() == pytest.approx([1.0, 0.0, 1.0], abs=1e-6)


def test_exponentials_are_exact_to_float32() -> None:
    scores = torch.cat([torch.linspace(-80, 80, 20_001), torch.linspace(-1, 1, 2_001)])
    rows = torch.arange(scores.numel())[:, None]
    mask = [Blocks(rows, rows * 0, rows * 0, rows * 0 + 1, rows >= 0)]
    one = torch.ones(1, 1, 1)
    found = pointwise_attention(scores.view(-1, 1, 1), one, one, mask).flatten().double()
    expected = scores.double() * scores.double().sigmoid()
    assert ((found - expected).abs() <= 4e-7 * expected.abs() + 1e-37).all()


def test_narrow_inputs_are_computed_wide(attention: Attention) -> None:
    case = make(7, queries=9, keys=9, groups=0, biased=False, dtype=torch.float32)
    narrow = [x.detach().bfloat16().requires_grad_() for x in case.leaves()]
    output = attention(*narrow, causal(9))
    assert output.dtype == torch.float32
    wide = attention(*(x.float() for x in narrow), causal(9))
    torch.testing.assert_close(output, wide, rtol=0, atol=0)
    gradients = torch.autograd.grad(output.sum(), narrow)
    assert {g.dtype for g in gradients} == {torch.bfloat16}


def test_autocast_changes_nothing(attention: Attention) -> None:
    case = make(8, queries=9, keys=9, groups=0, biased=True, dtype=torch.float32)
    weights = torch.ones_like(case.query)
    plain = outcome(attention, case._replace(mask=causal(9)), weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = outcome(attention, case._replace(mask=causal(9)), weights)
    for a, b in zip(plain, cast, strict=True):
        assert torch.equal(a, b)


def test_equal_bits_again_and_with_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.fused, "PARALLEL_SCORES", 0)
    case = make(9, queries=60, keys=60, groups=0, biased=True, dtype=torch.float32)
    case = case._replace(mask=causal(60))
    weights = torch.ones_like(case.query)
    threads, found = numba.get_num_threads(), []
    for number in (1, 1, min(2, numba.config.NUMBA_NUM_THREADS)):
        numba.set_num_threads(number)
        found.append(outcome(pointwise_attention, case, weights))
    numba.set_num_threads(threads)
    for again in found[1:]:
        for a, b in zip(found[0], again, strict=True):
            assert torch.equal(a, b)


def largest_saved(length: int) -> int:
    """Numbers in the largest tensor that waits for the backward pass."""
    sizes = [0]

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    q, k, v = (torch.randn(length, 2, 4, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        pointwise_attention(q, k, v, causal(length, 32))
    return max(sizes)


def test_saved_memory_is_linear_in_the_length() -> None:
    assert largest_saved(128) == 128 * 8
    assert largest_saved(512) == 512 * 8


ROWS = torch.zeros(1, 1, dtype=torch.int64)
BIAS = RelativeBias(torch.zeros(2), torch.zeros(64), torch.zeros(3).long(), torch.zeros(2).long())


@pytest.mark.parametrize(
    ("shapes", "bias", "message"),
    [
        (((3, 2, 4), (2, 2, 4), (3, 2, 4)), None, "key and value \\[Nk, H, E\\]; received"),
        (((3, 2, 4), (2, 1, 4), (2, 1, 4)), None, "query \\[Nq, H, E\\]"),
        (((3, 8), (2, 8), (2, 8)), None, "query \\[Nq, H, E\\]"),
        (((4, 2, 4), (2, 2, 4), (2, 2, 4)), BIAS, "query_times \\[4\\]"),
        (((3, 2, 4), (2, 2, 4), (2, 2, 4)), BIAS._replace(elapsed=torch.zeros(9)), "elapsed"),
        (((3, 2, 4), (2, 2, 4), (2, 2, 4)), BIAS._replace(distance=torch.zeros(0)), "distance"),
    ],
)
def test_invalid_shapes_are_refused(
    shapes: Sequence[tuple[int, ...]], bias: RelativeBias | None, message: str
) -> None:
    tensors = [torch.zeros(shape) for shape in shapes]
    mask = [Blocks(ROWS, ROWS, ROWS, ROWS + 1, ROWS == 0)]
    for form in (pointwise_attention, reference_attention):
        with pytest.raises(ValueError, match=message):
            form(*tensors, mask, bias)


def test_mixed_dtypes_are_refused() -> None:
    one = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="of one dtype"):
        pointwise_attention(one.double(), one, one, [])
