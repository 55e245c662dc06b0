"""The best items of a catalogue.

A small catalogue is scored as it is. In a large one the best are found by a coarse look and decided
by the scores themselves: the look is a product with item vectors of 8 bits, a quarter of the memory
to be read, of which it is known how far it can be from the score; items that could be among the
best by that are scored, the others cannot be. So the list is exact. Scores are then summed in
float64 and rounded to float32: they do not depend on who else is asked about in the same call.

Where there is an index, it names the items to be scored instead, and the list is nearly exact.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from everlong.inference.topk import NONE, top_k, top_k_items
from everlong.models.user_model import ItemEmbeddings
from everlong.ops.coarse_scores import (
    coarse_above,
    coarse_best,
    exact_scores,
    in_blocks,
    put_in_order,
)

log = logging.getLogger(__name__)

COARSE_FROM = 50_000
"""Items from which on there is a coarse look."""

SPARE = 32
"""Items beyond one and a half times the places of a list that are scored after the coarse look."""

RECALL, RECALL_AT = 0.95, 100
"""An index has to find this share of the best so many items."""

PROBES = (16, 32, 64, 96, 128, 192, 256)
"""Lists of an index that are looked into: the first number that suffices is taken."""

MOST_NAMED = 4_096
"""Items that an index is asked for at most; a request for more is answered without it."""


class Best(NamedTuple):
    """Scores and items, best first, ``[B, k]`` each; -inf and -1 where nothing is left."""

    scores: Tensor
    items: Tensor


NOTHING = np.empty(0, dtype=np.int64)

Rows = Sequence[np.ndarray]
"""Items that must not be listed, ``[n]`` rising for each user."""


class Catalogue:
    """Item vectors and biases, ready for search.

    Args:
        head: item vectors ``[I, D]`` and biases ``[I]``.
        coarse: whether there is a coarse look; None for whichever is quicker.

    Raises:
        ValueError: if a vector or a bias is not finite.
    """

    def __init__(self, head: ItemEmbeddings, *, coarse: bool | None = None) -> None:
        weight, bias = (part.detach().to("cpu", torch.float32).contiguous() for part in head)
        if not (bool(weight.isfinite().all()) and bool(bias.isfinite().all())):
            raise ValueError(
                "item vectors must be finite numbers, received NaN or infinity; the model's "
                "parameters have diverged: lower the learning rate"
            )
        self.weight, self._own_bias, self.bias = weight, bias, bias
        self.coarse = len(weight) >= COARSE_FROM if coarse is None else coarse
        some = weight if self.coarse else weight[:0]
        scales = some.abs().amax(1).clamp(min=1e-30) / 127
        table = (some / scales[:, None]).round().to(torch.int8)
        self._table, self._scales = in_blocks(table.numpy()), scales.numpy()
        self._error = _Error.of(some, table * scales[:, None], bias)
        self._norms = weight.norm(dim=1)
        self.index: Index | None = None
        self.recall: float | None = None
        self.hide(torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.weight)

    def hide(self, items: Tensor) -> None:
        """Keeps items (rows ``[n]``) out of every list from now on; they replace those before."""
        bias = self._own_bias.index_fill(0, items, -torch.inf)
        if self.index is not None:
            self.index.hide(items)
        self.bias = bias

    def scores(self, user: Tensor, items: Tensor) -> Tensor:
        """Scores ``[B, C]`` of items ``[B, C]``; -inf of those that are hidden, and of -1."""
        users, rows = user.float().contiguous().numpy(), items.contiguous().numpy()
        found = np.empty(rows.shape, dtype=np.float32)
        exact_scores(self.weight.numpy(), self.bias.numpy(), users, rows, found)
        return torch.from_numpy(found)

    def best(self, user: Tensor, k: int, exclude: Rows | None = None) -> Best:
        """The ``min(k, I)`` best items of users ``[B, D]``, the lower row first among equals.

        Raises:
            ValueError: if a user vector is not finite, or ``k`` is below 1.
        """
        if k < 1:
            raise ValueError(f"a list needs at least one place: expected k >= 1, received {k}")
        if not bool(user.isfinite().all()):
            raise ValueError(
                "user vectors must be finite numbers, received NaN or infinity; the model's "
                "parameters or state have diverged: rebuild the state"
            )
        exclude = exclude or [NOTHING] * len(user)
        if self.index is not None:
            return self._nearly_best(self.index, user.float(), k, exclude)
        return self._best(user.float(), k, exclude)

    def among(self, user: Tensor, k: int, items: Tensor) -> Best:
        """The best ``k`` of some items (different rows ``[n]``) for one user ``[1, D]``."""
        items = items.sort()[0]
        return _in_order(self.scores(user, items[None]), items[None], k)

    def similar(self, item: int, k: int) -> Best:
        """The ``k`` items nearest to one by cosine, ``[1, k]``.

        Raises:
            TypeError: if the item vectors are mere numbers.
        """
        if self.weight.shape[1] < 2:
            raise TypeError("the model has no item vectors to compare")
        norms = self._norms.clamp(min=1e-12)
        cosines = torch.mv(self.weight, self.weight[item] / norms[item]) / norms
        cosines[self.bias.isneginf()] = -torch.inf
        cosines[item] = -torch.inf
        return Best(*top_k(cosines[None], k))

    # exactly

    def _best(self, user: Tensor, k: int, exclude: Rows) -> Best:
        k = min(k, len(self))
        if len(user) == 0 or not self.coarse:
            pairs = pairs_of(exclude)
            return Best(*top_k_items(user, self.weight, self.bias, k, exclude=pairs))
        # arrays from here on: for a user or two, calls of tensors would take longer than the search
        users, weight, bias = user.contiguous().numpy(), self.weight.numpy(), self.bias.numpy()
        cuts = np.cumsum([0, *(own.size for own in exclude)])
        excluded = np.concatenate(exclude)
        keep = min(k + k // 2 + SPARE, len(self))
        coarse = np.full((len(users), keep), -np.inf, dtype=np.float32)
        named = np.full((len(users), keep), NONE)
        padded = self._padded(users)
        coarse_best(self._table, self._scales, bias, padded, excluded, cuts, coarse, named)
        scores = np.empty_like(coarse)
        put_in_order(weight, bias, users, named, scores)
        best = Best(torch.from_numpy(scores[:, :k]), torch.from_numpy(named[:, :k]))
        # nothing that was not scored can be as high as the k-th score, if that is above this
        lowest = coarse[:, -1]
        all_scored = np.isneginf(lowest)
        limit = self._error.highest(np.where(all_scored, 0, lowest), users)
        for row in np.flatnonzero(~(all_scored | (scores[:, k - 1] > limit))).tolist():
            floor = float(scores[row, k - 1])
            again = self._best_above(user[row : row + 1], k, exclude[row], floor)
            best.scores[row], best.items[row] = again.scores[0], again.items[0]
        return best

    def _padded(self, users: np.ndarray) -> np.ndarray:
        """Users ``[B, D]`` with zeros at the ends, as the table has them."""
        found = np.zeros((len(users), self._table.shape[1]), dtype=np.float32)
        found[:, : users.shape[1]] = users
        return found

    def _best_above(self, user: Tensor, k: int, excluded: np.ndarray, floor: float) -> Best:
        """The best of one user, of whom the k-th best score is known to be ``floor`` or higher."""
        far = float(self._error.highest(np.zeros(1, np.float32), user.numpy())[0])
        found = np.empty(len(self), dtype=np.int64)
        count = coarse_above(
            *(self._table, self._scales, self.bias.numpy()),
            *(self._padded(user.numpy())[0], excluded),
            *(far, self._error.by_score, floor, found),
        )
        rows = torch.from_numpy(found[:count])[None]
        return _in_order(self.scores(user, rows), rows, k)

    # nearly

    def build_index(self, queries: Tensor, *, probes: Sequence[int] = PROBES) -> bool:
        """Builds an index if it finds what the exact search finds; whether it does.

        Args:
            queries: user vectors ``[Q, D]`` such as will be asked about.
            probes: numbers of lists to look into that are tried.

        Raises:
            ImportError: without the extra ``ann``.
        """
        k = min(RECALL_AT, len(self))
        nothing = [NOTHING] * len(queries)
        wanted = self._best(queries.float(), k, nothing).items
        index = Index(self.weight, self._own_bias)
        index.hide(self.bias.isneginf().nonzero()[:, 0])
        for index.probes in probes:
            found = self._named(index, queries.float(), k, nothing).items
            self.recall = _recall(wanted, found)
            if self.recall >= RECALL:
                self.index = index
                log.info("index: recall %.4f with %d lists", self.recall, index.probes)
                return True
        log.warning(
            "index refused: recall@%d %.4f, expected %.2f; every search stays exact",
            k,
            self.recall,
            RECALL,
        )
        return False

    def _nearly_best(self, index: Index, user: Tensor, k: int, exclude: Rows) -> Best:
        k = min(k, len(self))
        if _named_for(k) + _most(exclude) > MOST_NAMED:
            return self._best(user, k, exclude)
        best = self._named(index, user, k, exclude)
        short = best.scores[:, -1].isneginf().nonzero()[:, 0]
        if short.numel():
            again = self._best(user[short], k, [exclude[row] for row in short.tolist()])
            best.scores[short], best.items[short] = again
        return best

    def _named(self, index: Index, user: Tensor, k: int, exclude: Rows) -> Best:
        """The best of what the index names, with room for what is left out."""
        most = min(_named_for(k) + _most(exclude), len(self))
        named, (rows, items) = index.nearest(user, most).sort(dim=1)[0], pairs_of(exclude)
        scores = self.scores(user, named)
        # one number for a user and an item
        out = torch.isin(
            named + torch.arange(len(user))[:, None] * len(self), rows * len(self) + items
        )
        return _in_order(scores.masked_fill(out, -torch.inf), named, k)


class _Error(NamedTuple):
    """How far a coarse score can be from the score."""

    by_length: float
    """In lengths of the user vector."""
    by_score: float
    """In coarse scores."""
    fixed: float

    @classmethod
    def of(cls, weight: Tensor, coarse: Tensor, bias: Tensor) -> _Error:
        if not len(weight):
            return cls(0.0, 0.0, 0.0)
        # norms in float32 are a little off themselves
        longest = 1.001 * float(coarse.norm(dim=1).max())
        lost = 1.001 * float((weight - coarse).norm(dim=1).max())
        sums = (weight.shape[1] + 8) * 2.0**-23
        return cls(lost + sums * longest, 2.0**-21, sums * float(bias.abs().max()) + 1e-30)

    def highest(self, coarse: np.ndarray, users: np.ndarray) -> np.ndarray:
        """Above the scores of items with coarse scores ``[B]``, or ``[n]`` of one user."""
        far = np.sqrt((users * users).sum(axis=1)) * (1.001 * self.by_length) + self.fixed
        limit: np.ndarray = far + np.abs(coarse) * self.by_score + coarse
        return limit


def pairs_of(rows: Rows) -> tuple[Tensor, Tensor]:
    """Users and items ``[E]`` each, as scores of all users at once are masked by."""
    users = np.repeat(np.arange(len(rows)), [own.size for own in rows])
    return torch.from_numpy(users), torch.from_numpy(np.concatenate([NOTHING, *rows]))


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


def _most(exclude: Rows) -> int:
    """Of the items that are left out for one user, the largest number."""
    return max((own.size for own in exclude), default=0)


def _named_for(k: int) -> int:
    """Items that an index names for a list of ``k``."""
    return 4 * k + 32


def _in_order(scores: Tensor, items: Tensor, k: int) -> Best:
    """The ``k`` best of items ``[B, C]`` in the order of their rows, by their scores ``[B, C]``."""
    values, order = scores.sort(dim=1, descending=True, stable=True)
    values, items = values[:, :k], items.gather(1, order[:, :k])
    return Best(values, items.masked_fill(values.isneginf(), NONE))


def _recall(wanted: Tensor, found: Tensor) -> float:
    """The share of items ``[B, k]`` that were wanted and found."""
    hits = (wanted[:, :, None] == found[:, None]).any(2) & (wanted != NONE)
    return float(hits.sum()) / max(1, int((wanted != NONE).sum()))
