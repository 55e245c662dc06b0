"""Feature maps of linear attention: from keys and queries to vectors whose products are weights.

The weight of an event for a candidate is the product of their features, which no map lets become
negative. What the softmax weighs by ``exp(q . k)``, a map can only approach: see the planted-match
probe of ``benchmarks/planted_match.py`` for what each recovers.

* ``elu``: ``elu(x) + 1``, as in Katharopoulos et al. 2020 (arXiv 2006.16236), width d.
* ``exp``: ``exp(x)`` and ``exp(-x)``, as in Hedgehog (arXiv 2402.04347), width 2 d.
* ``taylor``: ``1, x, x x^T / sqrt(2)``, so that the weight is ``1 + q.k + (q.k)^2 / 2 > 0``, the
  exponential to second order (arXiv 2402.18668), width ``1 + d + d^2``.
* ``random``: positive random features (Choromanski et al. 2021, arXiv 2009.14794), width 4 d, whose
  weight is ``exp(q.k)`` in the mean over projections; these are drawn once and kept.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

MapName = Literal["elu", "exp", "taylor", "random"]

LARGEST = 8.0
"""Exponents are bounded here, so that sums over a million events stay far from overflow."""


def feature_width(name: MapName, depth: int) -> int:
    """Features of a head whose keys have ``depth`` numbers."""
    return {"elu": depth, "exp": 2 * depth, "taylor": 1 + depth + depth**2, "random": 4 * depth}[
        name
    ]


class FeatureMap(nn.Module):
    """A feature map for heads of a width.

    Args:
        name: which map.
        depth: width d of keys and queries, as the head has them.
        seed: of the random projections.
    """

    projection: Tensor  # [R, d], empty but for the map "random"

    def __init__(self, name: MapName, depth: int, *, seed: int = 0) -> None:
        super().__init__()
        self.name, self.depth = name, depth
        rows = 4 * depth if name == "random" else 0
        generator = torch.Generator().manual_seed(seed)
        # blocks of orthogonal directions: less variance than independent ones (section 3.1 there)
        blocks = [
            torch.linalg.qr(torch.randn(depth, depth, generator=generator)).Q
            for _ in range(rows // depth)
        ]
        lengths = torch.randn(rows, depth, generator=generator).norm(dim=1, keepdim=True)
        directions = torch.cat(blocks) if blocks else torch.empty(0, depth)
        self.register_buffer("projection", lengths * directions)

    def forward(self, values: Tensor) -> Tensor:
        """Features ``[.., F]`` of keys or queries ``[.., d]``."""
        if self.name == "elu":
            return functional.elu(values) + 1
        if self.name == "exp":
            bounded = values.clamp(-LARGEST, LARGEST)
            return torch.cat([bounded.exp(), (-bounded).exp()], dim=-1)
        # both approach exp(q.k / sqrt(d)), the weight of the softmax
        scaled = values * self.depth**-0.25
        if self.name == "taylor":
            pairs = (scaled.unsqueeze(-1) * scaled.unsqueeze(-2)).flatten(-2) / math.sqrt(2)
            return torch.cat([torch.ones_like(scaled[..., :1]), scaled, pairs], dim=-1)
        exponent = scaled @ self.projection.T - scaled.square().sum(-1, keepdim=True) / 2
        features: Tensor = exponent.clamp(max=LARGEST).exp()
        return features / math.sqrt(self.projection.shape[0])
