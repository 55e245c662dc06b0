"""What the scores of users are made of: products with item vectors, biases, and what is added."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Query(NamedTuple):
    """The parts of the scores of ``B`` users over ``I`` items; a search is exact over their sum.

    The score of item ``i`` for user ``b`` is ``vectors[b] @ weight[i] + bias[i]`` with the item
    embeddings of the model, plus ``item_bias[bias_rows[b], i]``, plus ``added[b, s]`` where
    ``items[b, s] == i``.
    """

    vectors: Tensor
    """``[B, D]`` user vectors."""
    item_bias: Tensor | None = None
    """``[G, I]`` biases that depend on the request, such as on its time; None for none."""
    bias_rows: Tensor | None = None
    """``[B]`` int64, the row of ``item_bias`` of each user; None where ``G`` is 1."""
    items: Tensor | None = None
    """``[B, S]`` int64, distinct items that have a score of their own for the user, such as a
    memory of repeats; -1 for none."""
    added: Tensor | None = None
    """``[B, S]``, what these items have beside the products and biases."""

    def add_to(self, scores: Tensor, items: Tensor | None) -> Tensor:
        """Products and biases ``[B, I]``, or ``[B, C]`` of ``items [B, C]``, with what is added."""
        if self.item_bias is not None:
            rows = self.item_bias.new_zeros(len(self.vectors), dtype=torch.int64)
            bias = self.item_bias[rows if self.bias_rows is None else self.bias_rows]
            scores = scores + (bias if items is None else bias.gather(1, items))
        if self.items is not None and self.added is not None:
            there = self.items >= 0
            added = self.added.masked_fill(~there, 0.0).to(scores.dtype)
            if items is None:
                scores = scores.scatter_add(1, self.items.clamp(min=0), added)
            else:
                hits = items[:, :, None] == self.items.masked_fill(~there, -1)[:, None]
                scores = scores + (hits * added[:, None]).sum(2)
        return scores
