"""What is common to the decoders that read histories: items in, layers, scoring by cosine.

A layer is in two parts, so that keys and values can come from elsewhere: what it keeps of an event,
and what a query makes of what is kept. HSTU (``hstu``) and a decoder of the Llama family
(``decoder``) are layers of this kind; ``ring`` and ``persrec`` are ways of keeping.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from everlong.models.item_vectors import ItemConfig, ItemVectors
from everlong.models.user_model import ItemEmbeddings
from everlong.ops.dropout import Dropout
from everlong.ops.pointwise_attention import Blocks


@dataclass(frozen=True, kw_only=True)
class BackboneConfig(ItemConfig):
    """Architecture of a stack of layers.

    Attributes:
        heads: attention heads.
        layers: blocks of attention.
        dropout: on embeddings and on what leaves the attention of each layer.
        temperature: scores are cosines divided by it.
        learn_temperature: learn it from there, never below 0.01.
    """

    heads: int = 2
    layers: int = 2
    dropout: float = 0.2
    temperature: float = 0.05
    learn_temperature: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, received {getattr(self, name)}")
        if not self.temperature >= 0.01:
            raise ValueError(f"expected temperature >= 0.01, received {self.temperature}")

    @property
    def memory(self) -> int:
        """Width M of the keys, and of the values, that a layer keeps of an event."""
        return self.dim


class AttentionMask(NamedTuple):
    """Which keys each query sees, and when queries and keys are."""

    blocks: list[Blocks]
    query_times: Tensor  # [N] int64
    key_times: Tensor  # [M] int64


class Layer(nn.Module, ABC):
    """A layer of attention and whatever follows it, each with its residual."""

    @abstractmethod
    def remember(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[N, M]`` of events, from the input of the layer ``[N, D]``."""

    @abstractmethod
    def forward(self, values: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
        """The output ``[N, D]`` for inputs ``[N, D]`` that look at keys and values ``[K, M]``."""

    @abstractmethod
    def alone(self, values: Tensor) -> Tensor:
        """The output for inputs ``[.., D]`` that see nothing."""


class Backbone(nn.Module):
    """Item vectors, layers and the scoring by cosine. A subclass adds the layers."""

    layers: nn.ModuleList

    weight_decay: ClassVar[Mapping[str, bool]] = {"start": True}

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.items = ItemVectors(config)
        self.start = nn.Parameter(torch.empty(config.dim))
        for weight in self.items.parameters():
            nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04)
        nn.init.trunc_normal_(self.start, std=0.02, a=-0.04, b=0.04)
        self.dropout = Dropout(config.dropout)
        # a number and no matrix, so that weight decay spares it
        start = torch.tensor(-math.log(config.temperature))
        self.log_inverse_temperature = nn.Parameter(start, requires_grad=config.learn_temperature)

    def enter(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """First layer's inputs ``[N, D]`` of item vectors ``[N, D]`` at positions ``[N]``."""
        entered: Tensor = self.dropout(vectors)
        return entered

    def finish(self, values: Tensor) -> Tensor:
        """What scores are made of, from the output of the last layer ``[N, D]``."""
        return values

    def without_events(self) -> Tensor:
        """The user vector ``[D]`` of users without events: the start vector, which sees nothing."""
        vector: Tensor = self.user_embedding(self.layers[-1].alone(self.start))  # type: ignore[operator]
        return vector

    def user_embedding(self, values: Tensor) -> Tensor:
        """User vectors ``[N, D]`` of length 1 / temperature, from the output of the last layer."""
        log_inverse = self.log_inverse_temperature
        # the bound lets gradients through, so that what has reached it can come back
        beyond = (log_inverse - math.log(100.0)).clamp(min=0.0).detach()
        return functional.normalize(self.finish(values), dim=-1) * (log_inverse - beyond).exp()

    def item_embeddings(self) -> ItemEmbeddings:
        """Item vectors of length 1, without biases."""
        return self._head(self.items.table())

    def embeddings_of(self, items: Tensor) -> ItemEmbeddings:
        """The same of some items ``[n]``."""
        return self._head(self.items(items))

    def _head(self, vectors: Tensor) -> ItemEmbeddings:
        weight = functional.normalize(vectors, dim=-1)
        return ItemEmbeddings(weight, weight.new_zeros(weight.shape[0]))
