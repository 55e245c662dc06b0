"""What models have of each item: an embedding of its id, a projection of its vector, or their sum.

Vectors, such as those of a text, are not learned here; the projection is. An item whose id was
never seen in training has its vector still, and can be recommended by it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class ItemConfig:
    """What every model of items has in its architecture.

    Attributes:
        num_items: items of the catalogue.
        dim: width D of item and user vectors.
        vectors: width V of the vectors that items come with, 0 for none.
        ids: whether each item has an embedding of its own; without, items are their vectors alone,
            so that new ones need no training.
    """

    num_items: int
    dim: int = 64
    vectors: int = 0
    ids: bool = True

    def __post_init__(self) -> None:
        if self.dim < 1:
            raise ValueError(f"expected dim >= 1, received {self.dim}")
        if self.vectors < 0:
            raise ValueError(f"expected vectors >= 0, received {self.vectors}")
        if not self.ids and self.vectors == 0:
            raise ValueError(
                "an item is its id, its vector, or both: expected vectors >= 1 where ids=False, "
                "received vectors=0"
            )


class ItemVectors(nn.Module):
    """Item vectors ``[I, D]``: ``ids + project(vectors)``, or one of the two.

    ``vectors`` are centred on the mean of the catalogue and scaled to a mean square length of 1
    when they are filled in: what all texts have in common tells no item from another.
    """

    def __init__(self, config: ItemConfig) -> None:
        super().__init__()
        self.config = config
        self.ids = nn.Embedding(config.num_items, config.dim) if config.ids else None
        self.project: nn.Linear | None = None
        if config.vectors:
            self.project = nn.Linear(config.vectors, config.dim, bias=False)
            self.vectors: Tensor
            self.register_buffer("vectors", torch.zeros(config.num_items, config.vectors))
            self.center: Tensor
            self.register_buffer("center", torch.zeros(config.vectors))
            self.length: Tensor
            self.register_buffer("length", torch.ones(()))

    @torch.no_grad()
    def fill(self, vectors: Tensor) -> None:
        """Takes the vectors ``[I, V]`` of the items of the catalogue; zeros where there is none.

        Raises:
            ValueError: if they are not of the configured shape.
        """
        expected = (self.config.num_items, self.config.vectors)
        if self.project is None or tuple(vectors.shape) != expected:
            raise ValueError(
                f"expected vectors [items, width] = {expected}, received {tuple(vectors.shape)}; "
                "set vectors= in the architecture to the width of what is given"
            )
        there = vectors.ne(0).any(1)
        if bool(there.any()):
            self.center.copy_(vectors[there].mean(0))
            spread = (vectors[there] - self.center).square().sum(1).mean().sqrt()
            self.length.copy_(spread.clamp(min=1e-12))
        self.vectors.copy_(self.prepared(vectors))

    def prepared(self, vectors: Tensor) -> Tensor:
        """Vectors ``[n, V]`` as the projection takes them; zeros stay zeros."""
        there = vectors.ne(0).any(1, keepdim=True)
        return (vectors - self.center) / self.length * there

    def forward(self, items: Tensor) -> Tensor:
        """Vectors ``[.., D]`` of items ``[..]``."""
        if self.project is None:
            return self._ids()(items)  # type: ignore[no-any-return]
        if items.numel() > self.config.num_items:
            # fewer products for the catalogue than for the events
            return torch.nn.functional.embedding(items, self.table())
        projected: Tensor = self.project(self.vectors[items])
        return projected if self.ids is None else self.ids(items) + projected

    def table(self) -> Tensor:
        """Vectors ``[I, D]`` of all items."""
        if self.project is None:
            return self._ids().weight
        projected: Tensor = self.project(self.vectors)
        return projected if self.ids is None else self.ids.weight + projected

    def _ids(self) -> nn.Embedding:
        assert self.ids is not None  # noqa: S101 - the configuration has ids where it has no vectors
        return self.ids
