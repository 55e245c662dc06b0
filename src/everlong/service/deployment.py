"""A model in service: what it answers from states, with the ids of the catalogue."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import polars as pl
import torch
from torch import Tensor

from everlong.encode import serving
from everlong.ids import IdMap
from everlong.model import ItemHead, UserModel
from everlong.recommender import Recommender, load
from everlong.service.arena import Arena
from everlong.service.log import Id
from everlong.state import State
from everlong.topk import NONE, mask_items, top_k, top_k_items
from everlong.two_stage import TwoStage, rerank


class Listed(NamedTuple):
    """Items and their scores, best first."""

    items: list[Id]
    scores: list[float]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What one request for recommendations wants.

    Attributes:
        k: items, at most.
        at: time of the request, Unix seconds.
        leave_out: items that must not come, such as those seen.
        among: the only items that may come, None for all.
    """

    k: int
    at: int | None = None
    leave_out: Collection[Id] = ()
    among: Sequence[Id] | None = None


class Deployment:
    """A model, its catalogue, and its item vectors ready for use.

    Args:
        recommender: a trained one; the states in it are not used.
        folder: where it was read from.
    """

    def __init__(self, recommender: Recommender, folder: Path) -> None:
        self.recommender, self.folder = recommender, folder
        self.model: UserModel = recommender.model
        self.item_ids: IdMap = recommender.item_ids
        self.digest = state_digest(self.model, self.item_ids)
        self.name = self.digest.hex()
        self.head: ItemHead | None = None
        if not isinstance(self.model, TwoStage) and self._has_head():
            with serving(self.model):
                head = self.model.item_head()
            self.head = ItemHead(head.weight.detach().clone(), head.bias.detach().clone())
        self.unavailable: frozenset[Id] = frozenset()
        known = recommender.users.ids[:1]
        self.user_type: type[Any] = type(known[0]) if known else str
        self.item_type: type[Any] = str if self.item_ids.dtype == pl.String else int

    @classmethod
    def read(cls, folder: str | Path) -> Deployment:
        """The model of a folder that ``Recommender.save`` wrote.

        Raises:
            ValueError: if it is not a whole model folder.
        """
        return cls(load(folder), Path(folder).absolute())

    def _has_head(self) -> bool:
        return type(self.model).item_head is not UserModel.item_head

    def arena(self) -> Arena:
        """Empty states of the model."""
        return Arena(self.model, self.item_ids, self.digest)

    def recommend(self, state: State, wanted: Sequence[Wanted]) -> list[Listed]:
        """A list for each of ``B`` users from their states ``[B]``."""
        when = self._times(state, [one.at for one in wanted])
        rows, items = self._left_out(wanted)
        most = max(one.k for one in wanted)
        with serving(self.model):
            if self.head is not None and all(one.among is None for one in wanted):
                user = self.model.user(state, when)
                found = top_k_items(user, *self.head, most, exclude=(rows, items))
            else:
                scores = mask_items(self.model.score(state, at=when), rows, items)
                scores = self._only(scores, wanted)
                if isinstance(self.model, TwoStage):
                    named = top_k(scores, max(most, self.model.config.candidates))[1]
                    found = rerank(self.model, state, named, when)
                else:
                    found = top_k(scores, most)
        return [
            self._listed(scores[: one.k], items[: one.k])
            for one, scores, items in zip(wanted, *found, strict=True)
        ]

    def rank(self, state: State, candidates: Sequence[Id], at: int | None) -> Listed:
        """Candidates of one user in order; those that are not in the catalogue are left out."""
        rows = self.item_ids.rows(pl.Series(list(dict.fromkeys(candidates))))
        known = torch.from_numpy(rows[rows >= 0])[None]
        if known.numel() == 0:
            return Listed([], [])
        when = self._times(state, [at])
        with serving(self.model):
            if isinstance(self.model, TwoStage):
                scores, known = rerank(self.model, state, known, when)
            else:
                scores = self.model.score(state, known, when)
                scores, order = scores.sort(dim=1, descending=True, stable=True)
                known = known.gather(1, order)
        return self._listed(scores[0], known[0])

    def similar(self, item: Id, k: int) -> Listed | None:
        """Items near one in the space of item vectors, by cosine; None if it is not known."""
        if not int(self.item_ids.rows(pl.Series([item]))[0]) >= 0:
            return None
        found = self.recommender.similar_items([item], k=k)
        return Listed(found["similar_item_id"].to_list(), found["score"].to_list())

    def _times(self, state: State, at: Sequence[int | None]) -> Tensor | None:
        """When each asks; where one says nothing, all are asked as of their newest event."""
        known = [time for time in at if time is not None]
        return torch.tensor(known) if len(known) == len(at) else None

    def _left_out(self, wanted: Sequence[Wanted]) -> tuple[Tensor, Tensor]:
        owners: list[int] = []
        names: list[Id] = []
        for row, one in enumerate(wanted):
            out = [*one.leave_out, *self.unavailable]
            owners += [row] * len(out)
            names += out
        if not names:
            none = torch.zeros(0, dtype=torch.int64)
            return none, none
        items = torch.from_numpy(self.item_ids.rows(pl.Series(names)))
        known = items >= 0
        return torch.tensor(owners)[known], items[known]

    def _only(self, scores: Tensor, wanted: Sequence[Wanted]) -> Tensor:
        for row, one in enumerate(wanted):
            if one.among is not None:
                items = self.item_ids.rows(pl.Series(list(one.among))) if one.among else ()
                allowed = torch.zeros(scores.shape[1], dtype=torch.bool)
                allowed[[int(item) for item in items if item >= 0]] = True
                scores[row].masked_fill_(~allowed, -torch.inf)
        return scores

    def _listed(self, scores: Tensor, items: Tensor) -> Listed:
        there = (items != NONE) & ~scores.isneginf()
        ids = self.item_ids.ids(items[there].numpy())
        return Listed(ids.to_list(), scores[there].tolist())


def state_digest(model: UserModel, item_ids: IdMap) -> bytes:
    """16 bytes that stand for all that states of a model depend on."""
    digest = hashlib.sha256(
        f"{type(model).__name__} {model.config!r} {item_ids.fingerprint}".encode()
    )
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()[:16]
