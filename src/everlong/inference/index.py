"""An approximate index over item vectors, which names items that are then scored exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

PROBES = (16, 32, 64, 96, 128, 192, 256)
"""Lists of an index that are looked into: the first number that suffices is taken."""


class Index:
    """An inverted file over item vectors with their biases as one more dimension.

    It is always built from vectors of our own and never read from a file, of which a damaged or
    foreign one could do anything.

    Raises:
        ImportError: without the extra ``ann``.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ImportError('an index takes more: pip install "everlong[ann]"') from error
        self._faiss: Any = faiss
        self.probes = PROBES[0]
        self._selector: Any = None
        count, width = weight.shape
        faiss.omp_set_num_threads(torch.get_num_threads())
        lists = max(1, min(int(4 * count**0.5), count // 39))
        vectors = torch.cat([weight, bias[:, None]], dim=1).numpy()
        index: Any = faiss.index_factory(width + 1, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.cp.niter, index.cp.max_points_per_centroid = 10, 64
        index.cp.min_points_per_centroid = 1
        index.train(vectors)
        for first in range(0, count, 1 << 16):
            index.add(vectors[first : first + (1 << 16)])
        self._index = index

    def hide(self, items: Tensor) -> None:
        """Items that are not named from now on; they replace those before."""
        allowed = np.ones(self._index.ntotal, dtype=np.bool_)
        allowed[items.numpy()] = False
        bits = np.packbits(allowed, bitorder="little")
        some = self._faiss.IDSelectorBitmap(bits) if items.numel() else None
        self._selector = some

    def nearest(self, user: Tensor, count: int) -> Tensor:
        """Items ``[B, count]`` that may be the best of users ``[B, D]``; -1 for no more."""
        faiss = self._faiss
        # a setting of the calling thread
        faiss.omp_set_num_threads(torch.get_num_threads())
        how = faiss.SearchParametersIVF(nprobe=self.probes, sel=self._selector)
        queries = functional.pad(user, (0, 1), value=1.0).numpy()
        return torch.from_numpy(self._index.search(queries, count, params=how)[1])


def made_up(vectors: Tensor, length: float, count: int) -> Tensor:
    """User vectors ``[count, D]`` between those of a few items each, of a given length."""
    seeded = torch.Generator().manual_seed(0)
    some = torch.randint(len(vectors), (count, 3), generator=seeded)
    found = vectors[some].mean(1)
    found += 0.1 * found.std() * torch.randn(found.shape, generator=seeded)
    return functional.normalize(found, dim=1) * (length or float(vectors.norm(dim=1).mean()))
