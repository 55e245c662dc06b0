"""HSTU (Zhai et al., ICML 2024, arXiv 2402.17152): pointwise attention over a window of events.

State: that of ``ring``, 206 KB at W = 200.

Scores are cosines of user and item vectors by a temperature. Departures from the published code,
each stated at its line: the divisor of the attention, the time of the request, the initial weights
and the absence of absolute positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from everlong.models.backbone import AttentionMask, Backbone, BackboneConfig, Layer
from everlong.models.ring import Ring, RingConfig
from everlong.ops.dropout import Dropout
from everlong.ops.pointwise_attention import (
    ELAPSED_BUCKETS,
    RelativeBias,
    pointwise_attention,
)


@dataclass(frozen=True, kw_only=True)
class HSTUBackboneConfig(BackboneConfig):
    """Architecture of a stack of HSTU layers; a temperature of 0.05 is published.

    Attributes:
        relative_bias: add learned biases by distance and by elapsed time to the scores of the
            attention; without them, learned positions are added to the embeddings instead. They
            count from the beginning of a history (PerSRec: of a segment) and share one vector from
            the last position on: of a history longer than its window HSTU then knows no order.
    """

    relative_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.heads:
            raise ValueError(
                f"heads share the width evenly: expected dim a multiple of heads={self.heads}, "
                f"received dim={self.dim}"
            )


@dataclass(frozen=True, kw_only=True)
class HSTUConfig(HSTUBackboneConfig, RingConfig):
    """Architecture of HSTU with a window."""


class HSTULayer(Layer):
    """One HSTU block: ``X + W_o (U * norm(A V)) + b_o`` with ``A = silu(Q K^T + bias) / n``."""

    def __init__(self, config: HSTUBackboneConfig, reach: int) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False)
        # published: one product for U, V, Q and K; two let queries and keys be of different events
        self.ask = nn.Linear(config.dim, 2 * config.dim, bias=False)
        self.offer = nn.Linear(config.dim, 2 * config.dim, bias=False)
        self.mixed_norm = nn.LayerNorm(config.dim, eps=1e-6, elementwise_affine=False)
        self.leave = nn.Linear(config.dim, config.dim)
        self.dropout = Dropout(config.dropout)
        self.distance_bias = self.elapsed_bias = None
        if config.relative_bias:
            self.distance_bias = nn.Parameter(torch.empty(reach))
            self.elapsed_bias = nn.Parameter(torch.empty(ELAPSED_BUCKETS))
            nn.init.normal_(self.distance_bias, std=0.02)
            nn.init.normal_(self.elapsed_bias, std=0.02)
        for linear in (self.ask, self.offer, self.leave):
            # published: N(0, 0.02) for U, V, Q and K, which makes A V so small at first that the
            # eps of the norm after it, and not A V, decides what leaves
            nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(self.leave.bias)

    def remember(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[N, D]`` of events, from the input of the layer ``[N, D]``."""
        offered = self.offer(self.norm(values)).to(values.dtype)
        key, value = functional.silu(offered).chunk(2, dim=-1)
        return key, value

    def forward(self, values: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
        """The output ``[N, D]`` for inputs ``[N, D]`` that look at keys and values ``[M, D]``."""
        asked = self.ask(self.norm(values)).to(values.dtype)
        gate, query = functional.silu(asked).chunk(2, dim=-1)
        bias = None
        if self.distance_bias is not None and self.elapsed_bias is not None:
            times = mask.query_times, mask.key_times
            bias = RelativeBias(self.distance_bias, self.elapsed_bias, *times)
        heads = (self.heads, values.shape[-1] // self.heads)
        query, key, value = (part.view(len(part), *heads) for part in (query, key, value))
        mixed = pointwise_attention(query, key, value, mask.blocks, bias).flatten(1)
        left: Tensor = self.leave(self.dropout(gate * self.mixed_norm(mixed)))
        return values + left

    def alone(self, values: Tensor) -> Tensor:
        """The output for inputs ``[.., D]`` that see nothing."""
        # the norm of no attention is zero, so that only the last bias is left
        return values + self.leave.bias


class HSTUBackbone(Backbone):
    """HSTU layers.

    Args:
        config: architecture.
        reach: columns that a query may see at most, which is how many distances have a bias.
        num_positions: positions that have a vector where there is no bias.
    """

    def __init__(self, config: HSTUBackboneConfig, *, reach: int, num_positions: int) -> None:
        super().__init__(config)
        self.scale = math.sqrt(config.dim)
        # published code: always; the bias already tells the order, and without a limit of length
        self.positions = None
        if not config.relative_bias:
            self.positions = nn.Parameter(torch.empty(num_positions, config.dim))
            nn.init.trunc_normal_(self.positions, std=0.02, a=-0.04, b=0.04)
        self.layers = nn.ModuleList(HSTULayer(config, reach) for _ in range(config.layers))

    def enter(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """First layer's inputs ``[N, D]`` of item vectors ``[N, D]`` at positions ``[N]``."""
        values = vectors * self.scale
        if self.positions is not None:
            values = values + self.positions[positions.clamp(max=self.positions.shape[0] - 1)]
        entered: Tensor = self.dropout(values)
        return entered


class HSTU(Ring):
    """HSTU on packed histories; each event sees the last W events, itself included.

    Published: the time of a query is that of the next event in every layer (see ``Ring``).
    """

    config: HSTUConfig
    backbone: HSTUBackbone

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__(
            config, HSTUBackbone(config, reach=config.window, num_positions=config.window)
        )
