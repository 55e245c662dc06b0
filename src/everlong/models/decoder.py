"""A decoder of the Llama family (Touvron et al., arXiv 2302.13971) that reads item vectors.

Root-mean-square norms before each half of a layer, rotary positions, fewer heads for keys and
values than for queries (arXiv 2305.13245), and a gated feed-forward network:

    X' = X + W_o softmax(Q K^T / sqrt(E)) V,    Q, K, V from rms(X)
    Y  = X' + W_down (silu(W_gate rms(X')) * W_up rms(X'))

It computes what ``transformers`` computes from the same weights (tested), on packed histories and
from kept keys and values alike. Keys are kept before they are turned to their positions, which are
those of the columns that a query sees: a kept summary moves with the stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from everlong.models.backbone import AttentionMask, Backbone, BackboneConfig, Layer
from everlong.ops.dropout import Dropout
from everlong.ops.softmax_attention import softmax_attention


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(BackboneConfig):
    """Architecture of a decoder; the published temperature is learned from 0.07.

    Attributes:
        kv_heads: heads of keys and values, a divisor of ``heads``; None = as many.
        head_dim: width E of a head, None = ``dim / heads``.
        inner: width of the feed-forward network, None = 8/3 of ``dim``, up to a multiple of 8.
        attention_bias: whether queries, keys and values have biases, as in Qwen2.
        theta: base of the rotary frequencies.
        norm_eps: of the norms.
    """

    kv_heads: int | None = None
    head_dim: int | None = None
    inner: int | None = None
    attention_bias: bool = False
    theta: float = 10_000.0
    norm_eps: float = 1e-6
    temperature: float = 0.07
    learn_temperature: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(
                f"heads share the width evenly: expected dim a multiple of heads={self.heads}, "
                f"received dim={self.dim}; or set head_dim"
            )
        if self.depth < 2 or self.depth % 2:
            raise ValueError(
                "positions turn pairs of numbers: expected heads of an even width, received "
                f"{self.depth}"
            )
        if self.groups_of_heads < 1 or self.heads % self.groups_of_heads:
            raise ValueError(
                f"expected kv_heads a divisor of heads={self.heads}, received {self.kv_heads}"
            )
        if self.inner is not None and self.inner < 1:
            raise ValueError(f"expected inner >= 1, received {self.inner}")

    @property
    def depth(self) -> int:
        """Width E of a head."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def groups_of_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def width(self) -> int:
        """Of the feed-forward network."""
        return -(-self.dim * 8 // 24) * 8 if self.inner is None else self.inner

    @property
    def memory(self) -> int:
        """Width M of the keys, and of the values, that a layer keeps of an event."""
        return self.groups_of_heads * self.depth


class DecoderLayer(Layer):
    """One layer of the decoder."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        dim, bias = config.dim, config.attention_bias
        self.shape = (config.heads, config.groups_of_heads, config.depth)
        self.attention_norm = nn.RMSNorm(dim, eps=config.norm_eps)
        self.query = nn.Linear(dim, config.heads * config.depth, bias=bias)
        self.key = nn.Linear(dim, config.memory, bias=bias)
        self.value = nn.Linear(dim, config.memory, bias=bias)
        self.leave = nn.Linear(config.heads * config.depth, dim, bias=False)
        self.inner_norm = nn.RMSNorm(dim, eps=config.norm_eps)
        self.gate = nn.Linear(dim, config.width, bias=False)
        self.widen = nn.Linear(dim, config.width, bias=False)
        self.narrow = nn.Linear(config.width, dim, bias=False)
        self.dropout = Dropout(config.dropout)
        frequencies = config.theta ** -(torch.arange(0, config.depth, 2) / config.depth)
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies)
        for linear in self.modules():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def remember(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, not turned yet, and values ``[N, M]`` of events, from inputs ``[N, D]``."""
        inner = self.attention_norm(values)
        return self.key(inner).to(values.dtype), self.value(inner).to(values.dtype)

    def forward(self, values: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
        """The output ``[N, D]`` for inputs ``[N, D]`` that look at keys and values ``[K, M]``."""
        heads, groups, depth = self.shape
        query = self.query(self.attention_norm(values)).to(values.dtype)
        mixed = softmax_attention(
            query.view(-1, heads, depth),
            key.view(-1, groups, depth),
            value.view(-1, groups, depth),
            mask.blocks,
            self.frequencies,
        )
        values = values + self.dropout(self.leave(mixed.flatten(1)))
        return self.alone(values)

    def alone(self, values: Tensor) -> Tensor:
        """The output for inputs ``[.., D]`` that see nothing, or have seen."""
        inner = self.inner_norm(values)
        gated = functional.silu(self.gate(inner)) * self.widen(inner)
        left: Tensor = self.dropout(self.narrow(gated))
        return values + left


class Decoder(Backbone):
    """The layers, and a norm after the last."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def finish(self, values: Tensor) -> Tensor:
        """The norm of the last output."""
        finished: Tensor = self.norm(values)
        return finished
