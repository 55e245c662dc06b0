"""Products with a weight matrix where no gradient is asked for.

What the plain product calls takes instructions of 512 bits on processors of one maker alone.
oneDNN, which comes with the same library, takes them wherever they are: twice as fast on those of
another. It is reached by an operator that is not promised to stay, so it is tried once and else
left alone.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

ROWS = 128
"""Rows from which on a call of oneDNN costs less than it saves."""


def linear(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``values [N, I] @ weight [O, I]^T + bias [O]``, as ``torch.nn.functional.linear``.

    The two agree to the last bits of float32.
    """
    if _suits(values, weight) and _is_there():
        found: Tensor = torch.ops.mkldnn._linear_pointwise(values, weight, bias, "none", [], "")
        return found
    return functional.linear(values, weight, bias)


def _suits(values: Tensor, weight: Tensor) -> bool:
    return (
        not torch.is_grad_enabled()
        and values.is_cpu
        and values.dtype == weight.dtype == torch.float32
        and values.ndim == 2
        and len(values) >= ROWS
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def _is_there() -> bool:
    """Whether oneDNN can be reached, and says what the plain product says."""
    one = torch.linspace(-1.0, 1.0, 2 * ROWS).view(ROWS, 2)
    weight, bias = torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 0.25]]), torch.arange(3.0)
    try:
        found = torch.ops.mkldnn._linear_pointwise(one, weight, bias, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(found, functional.linear(one, weight, bias), atol=1e-5)
