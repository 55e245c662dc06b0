"""The best items of a catalogue by products with item vectors, exactly.

Items are named by a coarse score and decided by the score itself, as ``ops.exact_scores`` sums it.
The coarse score is a product in float32 for a small catalogue and one with item vectors of 8 bits,
a quarter of the memory to be read, for a large one. How far it can be from the score is known: an
item that is not scored exactly is one that cannot be among the best. So a list depends on the
user vector and the item vectors alone, and not on the batch, the threads or the processor.

Where there is an index, it names the items instead, and the list is nearly exact.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from everlong.inference.filters import NOTHING, Packed, Rows, holds, joined
from everlong.inference.index import PROBES, Index
from everlong.inference.topk import NONE, SCORES_PER_BATCH, check_k, in_order
from everlong.models.query import Query
from everlong.models.user_model import ItemEmbeddings
from everlong.ops.coarse_scores import coarse_above, coarse_best, in_blocks
from everlong.ops.exact_scores import (
    count_before,
    exact_cosines,
    exact_norms,
    exact_scores,
    put_in_order,
)

log = logging.getLogger(__name__)

COARSE_FROM = 50_000
"""Items from which on the coarse score is of 8 bits."""

SPARE = 32
"""Items beyond one and a half times the places of a list that are scored after the coarse look."""

RECALL, RECALL_AT = 0.95, 100
"""An index has to find this share of the best so many items."""

MOST_NAMED = 4_096
"""Items that an index is asked for at most; a request for more is answered without it."""

LARGEST = 1e38
"""Scores may not come near the end of float32."""

UNITS = {"highest": 2.0**-24, "high": 2.0**-11, "medium": 2.0**-8}
"""How far a product of float32 may be off, by ``torch.get_float32_matmul_precision``."""


class Best(NamedTuple):
    """Scores and items, best first, ``[B, k]`` each; -inf and -1 where nothing is left."""

    scores: Tensor
    items: Tensor


class Catalogue:
    """Item vectors and biases, ready for search.

    Args:
        embeddings: item vectors ``[I, D]`` and biases ``[I]``; products in float32 are computed
            where they are, all else on the CPU.
        coarse: whether the coarse score is of 8 bits; None for whichever is quicker.
        scores_per_batch: most coarse scores of float32 held at once; those of a user at least.

    Raises:
        ValueError: if a vector or a bias is not finite.
    """

    def __init__(
        self,
        embeddings: ItemEmbeddings,
        *,
        coarse: bool | None = None,
        scores_per_batch: int = SCORES_PER_BATCH,
    ) -> None:
        self._placed = embeddings.weight.detach().to(torch.float32).contiguous()
        bias = embeddings.bias.detach().to("cpu", torch.float32).contiguous()
        self.weight, self._own_bias, self.bias = self._placed.cpu(), bias, bias
        if not (bool(self.weight.isfinite().all()) and bool(bias.isfinite().all())):
            raise ValueError(
                "item vectors must be finite numbers, received NaN or infinity; the model's "
                "parameters have diverged: lower the learning rate"
            )
        self.coarse = len(self.weight) >= COARSE_FROM if coarse is None else coarse
        self.scores_per_batch = scores_per_batch
        self.index: Index | None = None
        self.recall: float | None = None

    def __len__(self) -> int:
        return len(self.weight)

    def prepare(self) -> None:
        """Makes the table of the coarse look now and not at the first search."""
        if self.coarse:
            _ = self._table

    def hide(self, items: Tensor) -> None:
        """Keeps items (rows ``[n]``) out of every list from now on; they replace those before."""
        bias = self._own_bias.index_fill(0, items, -torch.inf)
        if self.index is not None:
            self.index.hide(items)
        self.bias = bias

    def scores(self, query: Query, items: Tensor) -> Tensor:
        """Scores ``[B, C]`` of items ``[B, C]``, also of those that are hidden; -inf for -1."""
        asked = self._asked(query)
        named = items.contiguous().numpy()
        return torch.from_numpy(self._scored(asked, named, self._own_bias))

    def best(self, query: Query, k: int, exclude: Rows | None = None) -> Best:
        """The ``min(k, I)`` best items of ``B`` users, the lower row first among equals.

        Raises:
            ValueError: if what is asked is not finite, or ``k`` is below 1.
        """
        check_k(k)
        asked, k = self._asked(query), min(k, len(self))
        exclude = exclude or [NOTHING] * len(asked)
        if self.index is not None and len(asked.item_bias) == 0:
            return self._nearly_best(self.index, asked, k, exclude)
        return self._best(asked, k, exclude)

    def among(self, query: Query, k: int, items: Rows) -> Best:
        """The best ``k`` of some items (different rows ``[n]``) of each of ``B`` users."""
        asked = self._asked(query)
        found = np.full((len(asked), max((own.size for own in items), default=0)), NONE)
        for row, own in enumerate(items):
            found[row, : own.size] = own
        return self._in_order(asked, found, k)

    def places(self, query: Query, targets: Tensor, exclude: Rows | None = None) -> Tensor:
        """The place ``[B]`` of one item ``[B]`` in the whole list of each user, from 1.

        An item that is hidden or excluded is in no list: its place is the last, ``I``.
        """
        asked = self._asked(query)
        exclude = exclude or [NOTHING] * len(asked)
        size, found = max(1, self.scores_per_batch // len(self)), []
        for first in range(0, len(asked), size):
            part = slice(first, first + size)
            found.append(self._places(asked.at(part), targets[part].numpy(), exclude[part]))
        return torch.from_numpy(np.concatenate([NOTHING, *found]))

    def similar(self, items: Tensor, k: int) -> Best:
        """The ``k`` items nearest to each of ``items [n]`` by cosine: ``[n, min(k, I)]``.

        Raises:
            TypeError: if the item vectors are mere numbers.
        """
        check_k(k)
        if self.weight.shape[1] < 2:
            raise TypeError("the model has no item vectors to compare: they are mere numbers")
        k = min(k, len(self))
        lists = [self._similar(item, k) for item in items.tolist()]
        if not lists:
            lists = [(np.empty((0, k), np.float32), np.empty((0, k), np.int64))]
        scores, rows = (np.concatenate(parts) for parts in zip(*lists, strict=True))
        return Best(torch.from_numpy(scores), torch.from_numpy(rows))

    # exactly

    def _asked(self, query: Query) -> _Asked:
        asked = _Asked.of(query)
        if asked.users.shape[1] != self.weight.shape[1]:
            raise ValueError(
                f"expected user vectors of width {self.weight.shape[1]}, as item vectors have, "
                f"received {asked.users.shape[1]}"
            )
        reach = self._longest * asked.lengths + asked.highest_bias
        reach += self._highest_bias + np.abs(asked.added).max(initial=0.0)
        # NaN is not below
        if not bool((reach < LARGEST).all()):
            raise ValueError(
                "user vectors must be finite numbers, received NaN, infinity, or numbers that no "
                "score can be made of; the model's parameters or state have diverged: rebuild the "
                "state"
            )
        return asked

    def _scored(self, asked: _Asked, items: np.ndarray, bias: Tensor) -> np.ndarray:
        scores = np.empty(items.shape, dtype=np.float32)
        added = asked.added_to(items)
        exact_scores(
            *(self.weight.numpy(), bias.numpy(), asked.item_bias, asked.bias_rows),
            *(asked.users, items, added, scores),
        )
        return scores

    def _best(self, asked: _Asked, k: int, exclude: Rows) -> Best:
        keep = k + k // 2 + SPARE
        whole = keep > MOST_NAMED or keep >= len(self)
        size = len(asked) if self.coarse and not whole else self.scores_per_batch // len(self)
        lists = [Best(torch.empty(0, k), torch.empty(0, k, dtype=torch.int64))]
        for first in range(0, len(asked), max(1, size)):
            part = slice(first, first + max(1, size))
            find = self._best_of_all if whole else self._best_of_some
            lists.append(find(asked.at(part), k, exclude[part], min(keep, len(self))))
        if len(lists) == 2:
            return lists[1]
        return Best(*(torch.cat(parts) for parts in zip(*lists, strict=True)))

    def _best_of_all(self, asked: _Asked, k: int, exclude: Rows, _: int) -> Best:
        """The best after scoring every item exactly."""
        named = np.repeat(np.arange(len(self))[None], len(asked), axis=0)
        for row, gone in enumerate(exclude):
            named[row, gone] = NONE
        return self._in_order(asked, named, k)

    def _best_of_some(self, asked: _Asked, k: int, exclude: Rows, keep: int) -> Best:
        """The best after scoring what may be among them by the coarse look."""
        without = exclude
        if asked.items.shape[1]:
            # items with a score of their own are scored in any case
            without = [joined(gone, mine) for gone, mine in zip(exclude, asked.own, strict=True)]
        look = self._coarse_best if self.coarse else self._product_best
        coarse, named = look(asked, keep, without)
        lowest = coarse[:, -1]
        if asked.items.shape[1]:
            named = np.concatenate([named, asked.allowed(exclude)], axis=1)
        scores = self._scored(asked, named, self.bias)
        put_in_order(scores, named)
        best = Best(torch.from_numpy(scores[:, :k]), torch.from_numpy(named[:, :k]))
        # nothing that was not scored can be as high as the k-th score, if that is above this
        all_scored = np.isneginf(lowest)
        limit = self._error.highest(np.where(all_scored, 0, lowest), asked)
        for row in np.flatnonzero(~(all_scored | (scores[:, k - 1] > limit))).tolist():
            floor, one = float(scores[row, k - 1]), asked.at(slice(row, row + 1))
            again = self._best_above(one, k, exclude[row], floor)
            best.scores[row, :], best.items[row, :] = again.scores[0], again.items[0]
        return best

    def _in_order(self, asked: _Asked, named: np.ndarray, k: int) -> Best:
        scores = torch.from_numpy(self._scored(asked, named, self.bias))
        values, items = in_order(scores, torch.from_numpy(named))
        return Best(values[:, :k], items[:, :k])

    def _coarse_best(
        self, asked: _Asked, keep: int, without: Rows
    ) -> tuple[np.ndarray, np.ndarray]:
        """The highest coarse scores and their items, ``[B, keep]`` each."""
        out = Packed.of(without)
        values = np.full((len(asked), keep), -np.inf, dtype=np.float32)
        named = np.full((len(asked), keep), NONE)
        coarse_best(
            *(*self._table, self._whole_bias(asked), asked.bias_rows, self._padded(asked)),
            *(out.items, out.cuts, values, named),
        )
        return values, named

    def _product_best(
        self, asked: _Asked, keep: int, without: Rows
    ) -> tuple[np.ndarray, np.ndarray]:
        scores = self._product(asked)
        scores[Packed.of(without).pairs()] = -torch.inf
        values, items = scores.topk(keep)
        return values.numpy(), items.masked_fill(values.isneginf(), NONE).numpy()

    def _product(self, asked: _Asked) -> Tensor:
        """Products and biases ``[B, I]`` in float32, on the CPU."""
        users = torch.from_numpy(asked.users).to(self._placed.device)
        scores = torch.mm(users, self._placed.T).cpu()
        bias = torch.from_numpy(self._whole_bias(asked))
        return scores.add_(bias if len(bias) == 1 else bias[torch.from_numpy(asked.bias_rows)])

    def _whole_bias(self, asked: _Asked) -> np.ndarray:
        """Biases ``[G, I]`` with those of the request, -inf for hidden items."""
        bias = self.bias.numpy()[None]
        return bias if len(asked.item_bias) == 0 else bias + asked.item_bias

    def _best_above(self, asked: _Asked, k: int, exclude: np.ndarray, floor: float) -> Best:
        """The best items of one user whose k-th best score is known to be ``floor`` or higher."""
        far, by_score = float(self._error.far(asked)[0]), self._error.by_score
        without = joined(exclude, asked.own[0])
        if self.coarse:
            found = np.empty(len(self), dtype=np.int64)
            count = coarse_above(
                *(*self._table, self._whole_bias(asked)[asked.bias_rows[0]]),
                *(self._padded(asked)[0], without, far, by_score, floor, found),
            )
            rows = found[:count]
        else:
            coarse = self._product(asked)[0].numpy()
            coarse[without] = -np.inf
            there = ~np.isneginf(coarse)
            high = np.where(there, coarse, 0)
            high = high + np.abs(high) * by_score + far
            rows = np.flatnonzero(there & (high >= floor))
        named = np.concatenate([rows[None], asked.allowed([exclude])], axis=1)
        return self._in_order(asked, named, k)

    def _places(self, asked: _Asked, targets: np.ndarray, exclude: Rows) -> np.ndarray:
        without = [joined(out, mine) for out, mine in zip(exclude, asked.own, strict=True)]
        out = Packed.of(without)
        scores = self._scored(asked, targets[:, None], self.bias)[:, 0]
        barred = np.isneginf(scores)
        barred |= [holds(own, item) for own, item in zip(exclude, targets.tolist(), strict=True)]
        error, before = self._product_error, np.empty(len(asked), dtype=np.int64)
        count_before(
            *(self._product(asked).numpy(), error.far(asked), error.by_score),
            *(self.weight.numpy(), self.bias.numpy(), asked.item_bias, asked.bias_rows),
            *(asked.users, out.items, out.cuts, targets, np.where(barred, 0, scores), before),
        )
        if asked.items.shape[1]:
            # those with a score of their own
            named = asked.allowed(exclude)
            mine = self._scored(asked, named, self.bias)
            lower = named < targets[:, None]
            ahead = (mine > scores[:, None]) | ((mine == scores[:, None]) & lower)
            before += (ahead & ~np.isneginf(mine)).sum(1)
        return np.where(barred, len(self), before + 1)

    def _similar(self, item: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        norms, bias = self._norms, self.bias.numpy()
        unit = torch.from_numpy(self.weight[item].numpy() / norms[item].astype(np.float32))
        coarse = torch.mv(self.weight, unit).numpy() / norms
        gone = np.isneginf(bias)
        gone[item] = True
        coarse[gone] = -np.inf
        far = 4 * (self.weight.shape[1] + 8) * _unit()
        floor = np.partition(coarse, -k)[-k] - far
        named = np.flatnonzero(~gone & (coarse >= floor))
        scores = np.empty(named.size, dtype=np.float32)
        exact_cosines(self.weight.numpy(), norms, item, named, scores)
        order = np.lexsort((named, -scores))[:k]
        values, items = np.full((1, k), -np.inf, np.float32), np.full((1, k), NONE)
        values[0, : order.size], items[0, : order.size] = scores[order], named[order]
        return values, items

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        """Item vectors of 8 bits as the search reads them, and the scale of each."""
        table, scales = self._in_8_bits()
        return in_blocks(table.numpy()), scales.numpy()

    def _in_8_bits(self) -> tuple[Tensor, Tensor]:
        scales = self.weight.abs().amax(1).clamp(min=1e-30) / 127
        return (self.weight / scales[:, None]).round().to(torch.int8), scales

    @property
    def _error(self) -> _Error:
        return self._error_of_8_bits if self.coarse else self._product_error

    @cached_property
    def _error_of_8_bits(self) -> _Error:
        table, scales = self._in_8_bits()
        coarse = table * scales[:, None]
        lost = 1.001 * float((self.weight - coarse).norm(dim=1).max())
        longest, width = 1.001 * float(coarse.norm(dim=1).max()), self.weight.shape[1]
        return _Error.made(lost, longest, width, self._highest_bias, UNITS["highest"])

    @property
    def _product_error(self) -> _Error:
        # the precision of products is a setting of the process, which may change
        return _Error.made(0.0, self._longest, self.weight.shape[1], self._highest_bias, _unit())

    @cached_property
    def _longest(self) -> float:
        """The length of the longest item vector, or more."""
        # norms in float32 are a little off themselves
        return 1.001 * float(self.weight.norm(dim=1).max())

    @cached_property
    def _highest_bias(self) -> float:
        return float(self._own_bias.abs().max())

    @cached_property
    def _norms(self) -> np.ndarray:
        norms = np.empty(len(self), dtype=np.float64)
        exact_norms(self.weight.numpy(), norms)
        return norms

    def _padded(self, asked: _Asked) -> np.ndarray:
        """Users ``[B, D]`` with zeros at the ends, as the table has them."""
        found = np.zeros((len(asked), self._table[0].shape[1]), dtype=np.float32)
        found[:, : asked.users.shape[1]] = asked.users
        return found

    # nearly

    def build_index(self, queries: Tensor, *, probes: Sequence[int] = PROBES) -> bool:
        """Builds an index if it finds what the exact search finds; whether it does.

        Args:
            queries: user vectors ``[Q, D]`` such as will be asked about.
            probes: numbers of lists to look into that are tried.

        Raises:
            ImportError: without the extra ``ann``.
        """
        k, asked = min(RECALL_AT, len(self)), self._asked(Query(queries))
        nothing = [NOTHING] * len(queries)
        wanted = self._best(asked, k, nothing).items
        index = Index(self.weight, self._own_bias)
        index.hide(self.bias.isneginf().nonzero()[:, 0])
        for index.probes in probes:
            found = self._named(index, asked, k, nothing).items
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

    def _nearly_best(self, index: Index, asked: _Asked, k: int, exclude: Rows) -> Best:
        if _named_for(k) + _most(exclude) > MOST_NAMED:
            return self._best(asked, k, exclude)
        best = self._named(index, asked, k, exclude)
        for row in best.scores[:, -1].isneginf().nonzero()[:, 0].tolist():
            again = self._best(asked.at(slice(row, row + 1)), k, exclude[row : row + 1])
            best.scores[row], best.items[row] = again.scores[0], again.items[0]
        return best

    def _named(self, index: Index, asked: _Asked, k: int, exclude: Rows) -> Best:
        """The best of what the index names, with room for what is left out."""
        most = min(_named_for(k) + _most(exclude), len(self))
        found = index.nearest(torch.from_numpy(asked.users), most).numpy()
        for row, mine in enumerate(asked.own):
            found[row, np.isin(found[row], joined(exclude[row], mine))] = NONE
        return self._in_order(asked, np.concatenate([found, asked.allowed(exclude)], axis=1), k)


class _Asked(NamedTuple):
    """A query as arrays."""

    users: np.ndarray  # [B, D] float32
    item_bias: np.ndarray  # [G, I] float32, G 0 for none
    bias_rows: np.ndarray  # [B] int64
    items: np.ndarray  # [B, S] int64, rising, -1 first
    added: np.ndarray  # [B, S] float32
    own: list[np.ndarray]  # items without -1

    @classmethod
    def of(cls, query: Query) -> _Asked:
        users = np.ascontiguousarray(query.vectors.detach().cpu().float().numpy())
        count, none = len(users), np.empty((len(users), 0), dtype=np.float32)
        item_bias, rows = np.empty((0, 0), dtype=np.float32), np.zeros(count, dtype=np.int64)
        if query.item_bias is not None:
            item_bias = np.ascontiguousarray(query.item_bias.detach().cpu().float().numpy())
            if query.bias_rows is not None:
                rows = query.bias_rows.cpu().numpy()
        if query.items is None or query.added is None:
            return cls(users, item_bias, rows, none.astype(np.int64), none, [NOTHING] * count)
        items, order = query.items.cpu().sort(dim=1)
        added = query.added.detach().cpu().float().gather(1, order).masked_fill(items < 0, 0.0)
        if bool(((items[:, 1:] == items[:, :-1]) & (items[:, 1:] >= 0)).any()):
            raise ValueError(
                "a query names an item of a user once: expected distinct items, received repeats; "
                "add up what the model has for one item"
            )
        found = np.ascontiguousarray(items.numpy())
        return cls(users, item_bias, rows, found, added.numpy(), [r[r >= 0] for r in found])

    def __len__(self) -> int:
        return len(self.users)

    def at(self, part: slice) -> _Asked:
        """Some of the users."""
        users, bias, rows, items, added, own = self
        return _Asked(users[part], bias, rows[part], items[part], added[part], own[part])

    def added_to(self, items: np.ndarray) -> np.ndarray:
        """What some items ``[B, n]`` have of their own; ``[B, 0]`` where there is nothing."""
        if self.items.shape[1] == 0:
            return self.added
        found = np.zeros(items.shape, dtype=np.float32)
        for row, mine in enumerate(self.items):
            places = np.searchsorted(mine, items[row]).clip(max=mine.size - 1)
            hits = (mine[places] == items[row]) & (items[row] >= 0)
            found[row, hits] = self.added[row, places[hits]]
        return found

    def allowed(self, exclude: Rows) -> np.ndarray:
        """Items with a score of their own ``[B, S]``, without those that must not come."""
        found = self.items.copy()
        for row, gone in enumerate(exclude if found.shape[1] else ()):
            found[row, np.isin(found[row], gone)] = NONE
        return found

    @property
    def lengths(self) -> np.ndarray:
        """``[B]`` lengths of the user vectors, in float64."""
        found: np.ndarray = np.sqrt(np.square(self.users, dtype=np.float64).sum(axis=1))
        return found

    @property
    def highest_bias(self) -> float:
        """The largest bias of the request, whatever its sign."""
        return float(np.abs(self.item_bias).max(initial=0.0))


class _Error(NamedTuple):
    """How far a coarse score can be from the score."""

    by_length: float
    """In lengths of the user vector."""
    by_score: float
    """In coarse scores."""
    by_bias: float
    """In biases of the request."""
    fixed: float

    @classmethod
    def made(cls, lost: float, longest: float, width: int, bias: float, unit: float) -> _Error:
        """The error of sums of ``width`` products with vectors of a length of ``longest`` at most,
        which differ from the item vectors by ``lost``."""
        sums = 2 * (width + 8) * unit
        return cls(lost + sums * longest, 2.0**-21, sums, sums * bias + 1e-30)

    def far(self, asked: _Asked) -> np.ndarray:
        """``[B]`` in float32, without the part that goes with the coarse score."""
        fixed = self.fixed + self.by_bias * asked.highest_bias
        found: np.ndarray = (asked.lengths * (1.001 * self.by_length) + fixed).astype(np.float32)
        return found

    def highest(self, coarse: np.ndarray, asked: _Asked) -> np.ndarray:
        """Above the scores of items with coarse scores ``[B]``, or ``[n]`` of one user."""
        limit: np.ndarray = self.far(asked) + np.abs(coarse) * self.by_score + coarse
        return limit


def _unit() -> float:
    """The relative error of one product and one sum of a matrix product in float32, or more."""
    return UNITS[torch.get_float32_matmul_precision()]


def _most(exclude: Rows) -> int:
    """Of the items that are left out for one user, the largest number."""
    return max((own.size for own in exclude), default=0)


def _named_for(k: int) -> int:
    """Items that an index names for a list of ``k``."""
    return 4 * k + 32


def _recall(wanted: Tensor, found: Tensor) -> float:
    """The share of items ``[B, k]`` that were wanted and found."""
    hits = (wanted[:, :, None] == found[:, None]).any(2) & (wanted != NONE)
    return float(hits.sum()) / max(1, int((wanted != NONE).sum()))
