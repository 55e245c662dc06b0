"""Softmax attention with rotary positions: the two forms, positions, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from everlong.ops import softmax_attention as module
from everlong.ops.attention_mask import MaskRuns, block_mask
from everlong.ops.pointwise_attention import Blocks
from everlong.ops.softmax_attention import (
    reference_softmax_attention,
    rotated,
    softmax_attention,
)

FREQUENCIES = torch.tensor([1.0, 0.1], dtype=torch.float64)


def random_blocks(generator: torch.Generator, queries: int, keys: int) -> list[Blocks]:
    """Each query in one place at most; some places are padding, some see nothing."""
    order, mask = torch.randperm(queries, generator=generator), []
    while order.numel():
        rows, width, columns = (
            int(torch.randint(1, most, (), generator=generator)) for most in (4, 4, 7)
        )
        taken, order = order[: rows * width], order[rows * width :]
        place = torch.zeros(rows * width, dtype=torch.int64)
        place[: taken.numel()] = taken
        valid = torch.arange(rows * width) < taken.numel()
        first = torch.randint(0, columns + 1, (rows, width), generator=generator)
        extra = torch.randint(-1, columns + 1, (rows, width), generator=generator)
        mask.append(
            Blocks(
                place.view(rows, width),
                torch.randint(0, keys, (rows, columns), generator=generator),
                first,
                (first + extra).clamp(0, columns),
                valid.view(rows, width),
            )
        )
    return mask


@settings(max_examples=40)
@example(503, (4, 4), 1)  # no query sees anything
@given(st.integers(0, 10_000), st.sampled_from([(4, 4), (4, 2), (3, 1)]), st.sampled_from([1, 40]))
def test_agrees_with_the_reference_in_values_and_gradients(
    seed: int, heads: tuple[int, int], chunk: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = random_blocks(generator, 9, 7)
    leaves = [
        torch.randn(n, h, 4, generator=generator, dtype=torch.float64).requires_grad_()
        for n, h in ((9, heads[0]), (7, heads[1]), (7, heads[1]))
    ]
    before, module.CHUNK_SCORES = module.CHUNK_SCORES, chunk
    try:
        found = softmax_attention(*leaves, mask, FREQUENCIES)
    finally:
        module.CHUNK_SCORES = before
    expected = reference_softmax_attention(*leaves, mask, FREQUENCIES)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    weight = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), leaves),
        # where no query sees anything, keys and values are in no product
        torch.autograd.grad((expected * weight).sum(), leaves, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def causal_plan(length: int) -> list[Blocks]:
    zero = torch.zeros(1, dtype=torch.int64)
    spans = MaskRuns(zero, zero, zero + length, zero, zero)
    return block_mask(spans, lambda owner, column: column + owner)


def test_is_the_dense_form_on_one_history() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(6, 2, 4, generator=generator).double() for _ in range(3))
    place = torch.arange(6)
    turned = [rotated(part, place, FREQUENCIES).transpose(0, 1) for part in (query, key)]
    dense = functional.scaled_dot_product_attention(*turned, value.transpose(0, 1), is_causal=True)
    found = softmax_attention(query, key, value, causal_plan(6), FREQUENCIES)
    torch.testing.assert_close(found, dense.transpose(0, 1))


def test_outputs_depend_only_on_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 4, generator=generator, dtype=torch.float64) for _ in range(2))

    def product(x: int, y: int) -> Tensor:
        turned = (rotated(v, torch.tensor(n), FREQUENCIES) for v, n in ((a, x), (b, y)))
        return (next(turned) * next(turned)).sum()

    torch.testing.assert_close(product(3, 1), product(1003, 1001))
    assert not torch.allclose(product(3, 1), product(3, 2))


def test_no_queries_and_no_gradients() -> None:
    nothing = torch.zeros(0, 2, 4)
    assert softmax_attention(nothing, nothing, nothing, [], FREQUENCIES).shape == (0, 2, 4)
    query = torch.ones(2, 2, 4)
    assert torch.equal(softmax_attention(query, query, query, [], FREQUENCIES), query * 0)


@pytest.mark.parametrize(
    ("shapes", "frequencies"),
    [(((2, 3, 4), (2, 2, 4)), 2), (((2, 2, 4), (2, 2, 6)), 2), (((2, 2, 4), (2, 2, 4)), 3)],
)
def test_invalid_shapes_are_refused(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], frequencies: int
) -> None:
    query, key = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match="expect"):
        softmax_attention(query, key, key, [], torch.ones(frequencies))
