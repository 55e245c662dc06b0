"""The product of a library that is quicker is the plain one."""

from __future__ import annotations

import runpy

import pytest
import torch
from torch.nn import functional

from everlong.ops import product
from everlong.ops.product import ROWS, linear


@pytest.mark.parametrize("rows", [0, 1, ROWS - 1, ROWS, ROWS + 1, 1_000])
@pytest.mark.parametrize(("width", "outputs"), [(1, 1), (7, 13), (64, 256), (256, 64)])
def test_the_product_equals_the_plain_product(rows: int, width: int, outputs: int) -> None:
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


def test_gradients_and_other_precisions_have_the_plain_product() -> None:
    torch.manual_seed(0)
    values, weight, bias = torch.randn(ROWS, 3), torch.randn(2, 3), torch.randn(2)
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(linear(values, weight, bias).sum(), weight)
    torch.testing.assert_close(gradient, values.sum(0).expand(2, -1))
    with torch.no_grad():
        wide = values.double(), weight.double(), bias.double()
        assert torch.equal(linear(*wide), functional.linear(*wide))
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(values, weight, bias).dtype == torch.bfloat16


def test_without_onednn_there_is_the_plain_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> torch.Tensor:
        raise AttributeError("no such operator")

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", missing, raising=False)
    # the module looks once for the operator: a fresh one looks again
    fresh = runpy.run_path(product.__file__)["linear"]
    values, weight, bias = torch.randn(ROWS, 3), torch.randn(2, 3), torch.randn(2)
    with torch.no_grad():
        assert torch.equal(fresh(values, weight, bias), functional.linear(values, weight, bias))
