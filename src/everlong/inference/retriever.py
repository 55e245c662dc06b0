"""From states to lists and ranks: what the recommender, the server and the evaluation all call.

A model that scores by products is searched by its :class:`Catalogue`: the score of an item is
summed in float64 in a fixed order and rounded once to float32, so that for the same user vector
neither the batch, nor the shard, nor the number of threads, nor the processor decides about a list.
Any other model is asked for the scores of all items, which are compared in float32. Among equal
scores the lower item row comes first everywhere, and the rank of an item is its place in the list.

A model with a second stage (``num_candidates``) names so many of the best, and
``rank_candidates`` puts these in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from everlong.inference.catalogue import Best, Catalogue
from everlong.inference.filters import NOTHING, Packed, Rows
from everlong.inference.topk import (
    NONE,
    SCORES_PER_BATCH,
    check_k,
    in_order,
    mask_items,
    rank_of,
    refuse_nan,
    top_k,
)
from everlong.models.device import serving
from everlong.models.state import State, num_users, take
from everlong.models.user_model import UserModel


class Retriever:
    """The lists of a model, whose parameters must stay as they are.

    Args:
        model: read in evaluation mode, without gradients.
        coarse: as of ``Catalogue``.
        scores_per_batch: most scores held at once; those of a user over the catalogue at least.

    Raises:
        ValueError: if the model scores by products and an item vector is not finite.
    """

    def __init__(
        self,
        model: UserModel,
        *,
        coarse: bool | None = None,
        scores_per_batch: int = SCORES_PER_BATCH,
    ) -> None:
        self.model, self.num_items = model, model.num_items
        self._users_at_once = max(1, scores_per_batch // model.num_items)
        self._hidden = torch.zeros(0, dtype=torch.int64)
        self.catalogue: Catalogue | None = None
        if model.scores_by_products:
            with serving(model):
                self.catalogue = Catalogue(
                    model.item_embeddings(), coarse=coarse, scores_per_batch=scores_per_batch
                )
        self._vectors = self.catalogue

    def hide(self, items: Tensor) -> None:
        """Keeps items (rows ``[n]``) out of every list from now on; they replace those before.

        ``rank`` takes them all the same, because it is asked for them by name.
        """
        if self.catalogue is not None:
            self.catalogue.hide(items)
        self._hidden = items

    def recommend(
        self,
        state: State,
        k: int,
        *,
        at: Tensor | None = None,
        exclude: Rows | None = None,
        among: Sequence[np.ndarray | None] | None = None,
    ) -> Best:
        """The best items of ``B`` users, best first: ``[B, k]``, fewer where there are fewer items.

        Args:
            state: of the users.
            k: places wanted.
            at: ``[B]`` time of each request, Unix seconds; None for that of the newest event.
            exclude: items that must not come for each user, rising.
            among: for each user the only items that may come, rising, or None for all.

        Raises:
            ValueError: if ``k`` is below 1, or a score is not a number.
        """
        check_k(k)
        count = num_users(state)
        exclude = exclude or [NOTHING] * count
        among = among or [None] * count
        staged = self.model.num_candidates
        named = min(k if staged is None else max(k, staged), self.num_items)
        found = Best(
            torch.full((count, named), -torch.inf), torch.full((count, named), NONE).long()
        )
        with self._reading():
            # an item of a short list is scored by itself where that can be done
            searched = self.catalogue is not None
            alone = [row for row in range(count) if searched and among[row] is not None]
            rest = [row for row in range(count) if not searched or among[row] is None]
            for first in range(0, len(alone), self._users_at_once):
                rows = alone[first : first + self._users_at_once]
                items = [np.setdiff1d(np.asarray(among[row]), exclude[row]) for row in rows]
                part, when = _some(rows, state, at)
                self._put(found, rows, self._among(part, named, items, when))
            for first in range(0, len(rest), self._users_at_once):
                rows = rest[first : first + self._users_at_once]
                part, when = _some(rows, state, at) if len(rows) < count else (state, at)
                best = self._first_stage(
                    part, named, when, [exclude[row] for row in rows], [among[row] for row in rows]
                )
                self._put(found, rows, best)
            if staged is not None:
                found = self._second_stage(state, found.items, at)
        return Best(found.scores[:, :k], found.items[:, :k])

    def rank(self, state: State, items: Tensor, at: Tensor | None = None) -> Best:
        """Candidates ``[B, C]`` of ``B`` users in the order in which ``recommend`` lists them.

        The candidates of a user are one set for a model with a second stage.

        Args:
            state: of the users.
            items: different item rows of each user, -1 where there are fewer.
            at: as of ``recommend``.

        Raises:
            ValueError: if a score is not a number.
        """
        if items.numel() == 0:
            return Best(torch.empty(items.shape), items)
        with self._reading():
            if self.catalogue is None or self.model.num_candidates is not None:
                return self._second_stage(state, items, at)
            scores = self.catalogue.scores(self.model.query(state, at), items)
        return Best(*in_order(scores, items))

    def places(
        self,
        state: State,
        targets: Tensor,
        *,
        at: Tensor | None = None,
        exclude: Rows | None = None,
    ) -> Tensor:
        """The place ``[B]`` of one item ``[B]`` in the whole list of each user, from 1.

        An item that cannot be listed has the last place, ``I``.

        Raises:
            ValueError: if a score is not a number.
        """
        count, found = num_users(state), []
        exclude = exclude or [NOTHING] * count
        with self._reading():
            for first in range(0, count, self._users_at_once):
                rows = list(range(count)[first : first + self._users_at_once])
                part, when = _some(rows, state, at) if len(rows) < count else (state, at)
                found.append(self._places(part, targets[rows], when, [exclude[r] for r in rows]))
        return torch.cat([targets[:0], *found])

    def similar(self, items: Tensor, k: int) -> Best:
        """The items nearest to each of ``items [n]`` by cosine: ``[n, k]``, at most all.

        Raises:
            TypeError: if the model has no item vectors.
            ValueError: if ``k`` is below 1.
        """
        if self._vectors is None:
            # a model may have item vectors and score by something else
            with serving(self.model):
                self._vectors = Catalogue(self.model.item_embeddings())
        if self._vectors is not self.catalogue:
            self._vectors.hide(self._hidden)
        return self._vectors.similar(items, k)

    def _reading(self) -> AbstractContextManager[object]:
        # to look at every module for its mode takes longer than a short search
        return serving(self.model) if self.model.training else torch.no_grad()

    def _first_stage(
        self,
        state: State,
        k: int,
        at: Tensor | None,
        exclude: Rows,
        among: Sequence[np.ndarray | None],
    ) -> Best:
        if self.catalogue is not None:
            return self.catalogue.best(self.model.query(state, at), k, exclude)
        scores = mask_items(self._all_scores(state, at), *Packed.of(exclude).pairs())
        scores[:, self._hidden] = -torch.inf
        for row, items in enumerate(among):
            if items is not None:
                allowed = torch.zeros(self.num_items, dtype=torch.bool)
                allowed[torch.from_numpy(items)] = True
                scores[row].masked_fill_(~allowed, -torch.inf)
        return Best(*top_k(scores, k))

    def _among(self, state: State, k: int, items: Rows, at: Tensor | None) -> Best:
        assert self.catalogue is not None  # noqa: S101 - the caller asks where there is one
        return self.catalogue.among(self.model.query(state, at), k, items)

    def _second_stage(self, state: State, items: Tensor, at: Tensor | None) -> Best:
        """Items ``[B, C]``, -1 for none, in the order of ``rank_candidates``."""
        # equal sets score equally in whatever order they come
        items = torch.where(items < 0, self.num_items, items).sort(dim=1)[0]
        there = items < self.num_items
        sizes, device = there.sum(1), state[0].device
        scores = torch.full(items.shape, -torch.inf)
        for size in torch.unique(sizes[sizes > 0]).tolist():
            rows = (sizes == size).nonzero()[:, 0]
            part, when = _some(rows.tolist(), state, at)
            asked = items[rows, :size].to(device)
            found = self.model.rank_candidates(part, asked, when)
            scores[rows, :size] = self._checked(found, asked.shape)
        return Best(*in_order(scores, items.masked_fill(~there, NONE)))

    def _places(self, state: State, targets: Tensor, at: Tensor | None, exclude: Rows) -> Tensor:
        if self.catalogue is not None:
            places = self.catalogue.places(self.model.query(state, at), targets, exclude)
        else:
            scores = mask_items(self._all_scores(state, at), *Packed.of(exclude).pairs())
            scores[:, self._hidden] = -torch.inf
            places = rank_of(scores, targets)
        staged = self.model.num_candidates
        if staged is None:
            return places
        # a target that is named has the place that the second stage gives it
        none: list[np.ndarray | None] = [None] * len(targets)
        named = self._first_stage(state, min(staged, self.num_items), at, exclude, none).items
        ordered = self._second_stage(state, named, at).items
        hits = ordered == targets[:, None]
        return torch.where(hits.any(1), hits.int().argmax(1) + 1, places)

    def _all_scores(self, state: State, at: Tensor | None) -> Tensor:
        scores = self.model.score(state, at=at)
        return self._checked(scores, (num_users(state), self.num_items))

    def _checked(self, scores: Tensor, shape: Sequence[int]) -> Tensor:
        """Scores in float32 on the CPU, where lists are made."""
        if tuple(scores.shape) != tuple(shape):
            raise ValueError(
                "a model returns one number per user and item: expected "
                f"{tuple(shape)}, received {tuple(scores.shape)}"
            )
        scores = scores.detach().cpu().float()
        if scores.numel():
            refuse_nan(scores.amax(dim=1))
        return scores

    def _put(self, found: Best, rows: list[int], best: Best) -> None:
        width = best.items.shape[1]
        if len(rows) == len(found.items):
            found.scores[:, :width], found.items[:, :width] = best
        else:
            found.scores[rows, :width], found.items[rows, :width] = best


def _some(rows: list[int], state: State, at: Tensor | None) -> tuple[State, Tensor | None]:
    """The states of some users and the times of their requests."""
    index = torch.tensor(rows, device=state[0].device)
    return take(state, index), None if at is None else at[index.to(at.device)]
