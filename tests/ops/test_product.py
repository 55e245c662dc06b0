"""The product of a library that is quicker is the plain one."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from everlong.ops import product
from everlong.ops.product import ROWS, linear


def test_it_is_there() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    assert product._is_there()


@pytest.mark.parametrize("rows", [0, 1, ROWS - 1, ROWS, ROWS + 1, 1_000])
@pytest.mark.parametrize(("width", "outputs"), [(1, 1), (7, 13), (64, 256), (256, 64)])
def test_it_is_the_plain_product(rows: int, width: int, outputs: int) -> None:
    torch.manual_seed(0)
    values, weight, bias = (
        torch.randn(rows, width),
        torch.randn(outputs, width),
        torch.randn(outputs),
    )
    expected = functional.linear(values.double(), weight.double(), bias.double()).float()
    with torch.no_grad():
        found = linear(values, weight, bias)
        # as a slice of something larger, and as a matrix that was turned
        turned = linear(values, weight.T.contiguous().T, bias)
        wide = torch.randn(rows, 2 * width)
        part = linear(wide[:, width:], weight, bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(turned, expected, rtol=1e-5, atol=1e-4)
    plain = functional.linear(wide[:, width:], weight, bias)
    torch.testing.assert_close(part, plain, rtol=1e-5, atol=1e-4)


def test_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[int]()
    monkeypatch.setattr(product, "_is_there", lambda: bool(asked.append(1)))
    values, weight, bias = torch.randn(ROWS, 3), torch.randn(2, 3), torch.randn(2)
    # with gradients, in other precisions, and for a few rows it is the plain one at once
    weight.requires_grad_()
    linear(values, weight, bias).sum().backward()
    assert weight.grad is not None
    with torch.no_grad():
        linear(values.double(), weight.double(), bias.double())
        linear(values[:3], weight, bias)
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(values, weight, bias).dtype == torch.bfloat16
        assert not asked
        linear(values, weight, bias)
    assert asked


def test_without_it_there_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> torch.Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", missing, raising=False)
    product._is_there.cache_clear()
    values, weight, bias = torch.randn(ROWS, 3), torch.randn(2, 3), torch.randn(2)
    try:
        with torch.no_grad():
            assert torch.equal(
                linear(values, weight, bias), functional.linear(values, weight, bias)
            )
        assert not product._is_there()
    finally:
        product._is_there.cache_clear()
