"""What models have of each item: an embedding of its id, a projection of its vector, or their sum.

Vectors, such as those of a text, are not learned here; the projection is. An item whose id was
never seen in training has its vector still, and can be recommended by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from everlong.models.user_model import UserModel


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
        self._kept: tuple[list[tuple[int, int]], Tensor] | None = None
        self._live: Tensor | None = None

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
        vectors = vectors.to(self.vectors)
        there = vectors.ne(0).any(1)
        if bool(there.any()):
            self.center.copy_(vectors[there].mean(0))
            size = _mean_length(vectors[there])
            spread = _mean_length(vectors[there] - self.center)
            # vectors that are all the same: their differences are rounding, not to be blown up
            self.length.copy_(torch.where(spread > 1e-6 * size, spread, size))
        self.vectors.copy_(self.prepared(vectors))

    @torch.no_grad()
    def refill(self, vectors: Tensor) -> None:
        """Takes other vectors ``[I, V]`` of the same items, centred and scaled as they were."""
        self.vectors.copy_(self.prepared(vectors))

    @contextmanager
    def live(self, rows: Tensor, vectors: Tensor) -> Iterator[None]:
        """Inside, the vectors of the items ``rows [n]`` are ``vectors [n, V]``, with gradients.

        They stay as they are then, without gradients.
        """
        prepared = self.prepared(vectors)
        self._live = self.vectors.index_copy(0, rows, prepared)
        try:
            yield
        finally:
            self._live = None
            self.vectors[rows] = prepared.detach()

    def prepared(self, vectors: Tensor) -> Tensor:
        """Vectors ``[n, V]`` as the projection takes them; zeros stay zeros."""
        vectors = vectors.to(self.vectors)
        there = vectors.ne(0).any(1, keepdim=True)
        return (vectors - self.center) / self.length * there

    def forward(self, items: Tensor) -> Tensor:
        """Vectors ``[.., D]`` of items ``[..]``."""
        if self.project is None:
            return self._ids()(items)  # type: ignore[no-any-return]
        if items.numel() > self.config.num_items:
            # fewer products for the catalogue than for the events
            return torch.nn.functional.embedding(items, self.table())
        projected = self._projected(self._current()[items])
        return projected if self.ids is None else self.ids(items) + projected

    def table(self) -> Tensor:
        """Vectors ``[I, D]`` of all items."""
        if self.project is None:
            return self._ids().weight
        kept = None if torch.is_grad_enabled() or self._live is not None else self._kept
        if kept is not None and kept[0] == self._versions():
            return kept[1]
        projected = self._projected(self._current())
        return projected if self.ids is None else self.ids.weight + projected

    @torch.no_grad()
    def keep(self) -> None:
        """Computes the table for all calls without gradients until ``train()``: for serving."""
        # tensors of inference mode have no versions by which a change could be seen
        if self.project is not None and not torch.is_inference_mode_enabled():
            self._kept = self._versions(), self.table()

    def train(self, mode: bool = True) -> ItemVectors:
        """Training mode on or off; on, what was kept is forgotten."""
        # not left to the versions: fused optimizers change parameters without raising them
        if mode:
            self._kept = None
        return super().train(mode)

    def _versions(self) -> list[tuple[int, int]]:
        """What changes when a parameter is moved, cast, loaded or filled."""
        tensors = [*self.parameters(), *self.buffers()]
        return [(tensor.data_ptr(), tensor._version) for tensor in tensors]

    def _projected(self, vectors: Tensor) -> Tensor:
        assert self.project is not None  # noqa: S101 - asked for where there are vectors
        # products may be narrow, item vectors are as wide as embeddings are
        projected: Tensor = self.project(vectors)
        return projected.to(self.project.weight.dtype)

    def _current(self) -> Tensor:
        return self.vectors if self._live is None else self._live

    def _ids(self) -> nn.Embedding:
        assert self.ids is not None  # noqa: S101 - the configuration has ids where it has no vectors
        return self.ids


def _mean_length(vectors: Tensor) -> Tensor:
    return vectors.square().sum(1).mean().sqrt()


def item_vectors(model: nn.Module) -> ItemVectors | None:
    """Where a model has its item vectors; None if it has none."""
    return next((part for part in model.modules() if isinstance(part, ItemVectors)), None)


def for_serving(model: UserModel) -> UserModel:
    """The model in eval mode, with all its item vectors at hand."""
    model.eval()
    items = item_vectors(model)
    if items is not None:
        items.keep()
    return model


@torch.no_grad()
def same_space(model: nn.Module, rows: np.ndarray, vectors: np.ndarray) -> bool:
    """Whether vectors ``[n, V]`` of items ``rows [n]`` are, for the most part, those it has."""
    items = item_vectors(model)
    if items is None or items.project is None or len(rows) == 0:
        return True
    there = items.vectors[torch.from_numpy(rows)]
    if vectors.shape[1] != there.shape[1]:
        return False
    given = items.prepared(torch.from_numpy(vectors))
    # the text of an item may have changed since, that of most has not
    alike = ((given - there).abs().amax(1) < 1e-2 * there.abs().amax(1).clamp(min=1e-6)).float()
    return bool(alike.mean() >= 0.5)


@torch.no_grad()
def with_more_items(model: UserModel, vectors: Tensor) -> UserModel:
    """A copy of a model with ``n`` more items, known by their vectors ``[n, V]`` alone.

    The rows of the items that there were stay. An embedding of a new id is zero, a bias the mean of
    the others.

    Raises:
        ValueError: if the items of the model have no vectors, or vectors of another width.
    """
    items = item_vectors(model)
    if items is None or items.project is None:
        raise ValueError(
            "items that were not in training are known by their vectors: expected a model with "
            "item vectors, received one that knows items by their ids alone; fit one with vectors"
        )
    if vectors.shape[1] != items.config.vectors:
        raise ValueError(
            f"expected vectors of width {items.config.vectors}, as in training, received "
            f"{vectors.shape[1]}; make them in the same way"
        )
    count, prepared = len(vectors), items.prepared(vectors)
    config = replace(model.config, num_items=model.num_items + count)
    with torch.random.fork_rng(devices=[]):
        larger: UserModel = type(model)(config)
    weights = model.state_dict()
    for name, like in larger.state_dict().items():
        known = weights[name]
        if name.endswith("items.vectors"):
            weights[name] = torch.cat([known, prepared])
        elif known.shape != like.shape:
            fill = known.mean(0) if known.dim() == 1 else torch.zeros_like(known[0])
            weights[name] = torch.cat([known, fill.expand(count, *known.shape[1:])])
    larger.to(items.vectors)
    larger.load_state_dict(weights)
    return larger.train(model.training)
