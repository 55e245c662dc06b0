"""A model in service: what it answers from states, with the ids of the catalogue."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from everlong.data.ids import IdMap
from everlong.inference.catalogue import NOTHING, Catalogue, Rows, made_up, pairs_of
from everlong.inference.topk import NONE, mask_items, top_k
from everlong.models import state as states
from everlong.models.device import serving
from everlong.models.state import State
from everlong.models.two_stage import TwoStage, rerank
from everlong.models.user_model import UserModel
from everlong.recommender.recommender import Recommender, load
from everlong.server.store.log import Id, Slice
from everlong.server.store.state_table import StateTable

log = logging.getLogger(__name__)

INDEX_FROM = 1_000_000
"""Items from which on a search goes through an index."""

QUERIES = 256
"""Searches on which an index is tried."""


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
        leave_out: items that must not come.
        among: the only items that may come, None for all.
    """

    k: int
    at: int | None = None
    leave_out: Collection[Id] = ()
    among: Sequence[Id] | None = None


class ServedModel:
    """A model, its catalogue, and its item vectors ready for use.

    Args:
        recommender: a trained one; the states in it are not used. It stays in evaluation mode.
        folder: where it was read from.
        index_from: items from which on :meth:`prepare` builds an index; None for never.
    """

    def __init__(
        self, recommender: Recommender, folder: Path, *, index_from: int | None = INDEX_FROM
    ) -> None:
        self.recommender, self.folder, self.index_from = recommender, folder, index_from
        self.model: UserModel = recommender.model.eval()
        self.item_ids: IdMap = recommender.item_ids
        self.digest = state_digest(self.model, self.item_ids)
        self.name = self.digest.hex()
        self.catalogue: Catalogue | None = None
        if not isinstance(self.model, TwoStage) and self._has_head():
            with serving(self.model):
                self.catalogue = Catalogue(self.model.item_embeddings())
        # a list is many times quicker than a gather from the ids of the map
        self._ids: list[Id] = self.item_ids.ids(range(len(self.item_ids))).to_list()
        self._hidden = torch.zeros(0, dtype=torch.int64)
        known = recommender.users.ids[:1]
        self.user_type: type[Any] = type(known[0]) if known else str
        self.item_type: type[Any] = str if self.item_ids.dtype == pl.String else int

    @classmethod
    def read(cls, folder: str | Path, *, index_from: int | None = INDEX_FROM) -> ServedModel:
        """The model of a folder that ``Recommender.save`` wrote.

        Raises:
            ValueError: if it is not a whole model folder.
        """
        return cls(load(folder), Path(folder).absolute(), index_from=index_from)

    def _has_head(self) -> bool:
        return type(self.model).item_embeddings is not UserModel.item_embeddings

    def table(self) -> StateTable:
        """Empty states of the model."""
        return StateTable(self.model, self.item_ids, self.digest)

    def prepare(self, state: State | None = None) -> None:
        """Builds the index of a large catalogue, if it finds what the exact search finds.

        Args:
            state: of some users who will ask, 256 are plenty; None where there are none.
        """
        catalogue = self.catalogue
        if catalogue is None or self.index_from is None or len(catalogue) < self.index_from:
            return
        with torch.no_grad():
            nobody = self.model.user_embedding(self.model.initial_state(1))
            queries = made_up(catalogue.weight, float(nobody.norm()), QUERIES)
            if state is not None and states.num_users(state):
                # those who are there in place of as many that are made up
                queries = torch.cat([self.model.user_embedding(state).to(queries.dtype), queries])[
                    :QUERIES
                ]
            try:
                catalogue.build_index(queries)
            except ImportError as error:
                log.warning("%d items and no index: %s", len(catalogue), error)

    def warm_up(self) -> None:
        """Reads an event and makes a list for nobody: what is compiled at the first use is then."""
        table, somebody = self.table(), self.user_type(0)
        fields = dict.fromkeys(self.model.event_fields, 0)
        table.apply(Slice((1,), (bytes(16),), (somebody,), (self._ids[0],), (0,), (fields,)))
        self.recommend(table.read([somebody]), [Wanted(k=1)])

    def hide(self, items: Iterable[Id]) -> None:
        """Keeps items out of every list that is not asked for by name; they replace those before.

        Those that are not in the catalogue are ignored.
        """
        rows_of = self.item_ids.row_of
        rows = sorted({rows_of[item] for item in items if item in rows_of})
        self._hidden = torch.tensor(rows, dtype=torch.int64)
        if self.catalogue is not None:
            self.catalogue.hide(self._hidden)

    def recommend(
        self, state: State, wanted: Sequence[Wanted], seen: Rows | None = None
    ) -> list[Listed]:
        """A list for each of ``B`` users from their states ``[B]``.

        Who says no time is asked as of the newest event.

        Args:
            state: of the users.
            wanted: what each of them wants.
            seen: rows of the catalogue that must not come for each of them, rising; None for none.
        """
        without = self._left_out(wanted, seen or [NOTHING] * len(wanted))
        timed = [one.at is not None for one in wanted]
        if all(timed) or not any(timed):
            return self._recommend(state, wanted, without)
        # a model takes times of all or of none
        found: dict[int, Listed] = {}
        for kind in (True, False):
            rows = [row for row, has in enumerate(timed) if has is kind]
            part = states.take(state, torch.tensor(rows))
            some, out = [wanted[row] for row in rows], [without[row] for row in rows]
            found.update(zip(rows, self._recommend(part, some, out), strict=True))
        return [found[row] for row in range(len(wanted))]

    def _recommend(self, state: State, wanted: Sequence[Wanted], without: Rows) -> list[Listed]:
        """The lists of users of whom all say a time, or none."""
        when = torch.tensor([one.at for one in wanted]) if wanted[0].at is not None else None
        with torch.no_grad():
            if self.catalogue is not None:
                user = self.model.user_embedding(state, when)
                return self._searched(self.catalogue, user, wanted, without)
            most = max(one.k for one in wanted)
            scores = mask_items(self.model.score(state, at=when), *pairs_of(without))
            scores = self._only(scores.index_fill_(1, self._hidden, -torch.inf), wanted)
            if isinstance(self.model, TwoStage):
                named = top_k(scores, max(most, self.model.config.candidates))[1]
                found = rerank(self.model, state, named, when)
            else:
                found = top_k(scores, most)
        return self._listed(wanted, *found)

    def _searched(
        self,
        catalogue: Catalogue,
        user: Tensor,
        wanted: Sequence[Wanted],
        without: Rows,
    ) -> list[Listed]:
        """Lists for user vectors ``[B, D]``."""
        found: dict[int, Listed] = {}
        free = [row for row, one in enumerate(wanted) if one.among is None]
        if free:
            some = [wanted[row] for row in free]
            most = max(one.k for one in some)
            mine = user if len(free) == len(user) else user[free]
            best = catalogue.best(mine, most, [without[row] for row in free])
            found.update(zip(free, self._listed(some, *best), strict=True))
        for row, one in enumerate(wanted):
            if one.among is not None:
                named = np.array(self._known(one.among), dtype=np.int64)
                items = torch.from_numpy(np.setdiff1d(named, without[row]))
                best = catalogue.among(user[row : row + 1], one.k, items)
                found[row] = self._listed([one], *best)[0]
        return [found[row] for row in range(len(wanted))]

    def rank(self, state: State, candidates: Sequence[Id], at: int | None) -> Listed:
        """Candidates of one user in order; those that are not in the catalogue are left out."""
        rows = list(dict.fromkeys(self._known(candidates)))
        if not rows:
            return Listed([], [])
        known = torch.tensor(rows)[None]
        when = None if at is None else torch.tensor([at])
        with torch.no_grad():
            if isinstance(self.model, TwoStage):
                scores, known = rerank(self.model, state, known, when)
            else:
                scores = self.model.score(state, known, when)
                scores, order = scores.sort(dim=1, descending=True, stable=True)
                known = known.gather(1, order)
        return self._listed([Wanted(k=len(rows))], scores, known)[0]

    def similar(self, item: Id, k: int) -> Listed | None:
        """Items near one in the space of item vectors, by cosine; None if it is not known.

        Raises:
            TypeError: if the model has no item vectors.
        """
        row = self.item_ids.row_of.get(item)
        if row is None:
            return None
        if self.catalogue is not None:
            return self._listed([Wanted(k=k)], *self.catalogue.similar(row, k))[0]
        hidden = set(self._hidden.tolist())
        found = self.recommender.similar_items([item], k=k + len(hidden))
        near = zip(found["similar_item_id"].to_list(), found["score"].to_list(), strict=True)
        kept = [(name, score) for name, score in near if self.item_ids.row_of[name] not in hidden][
            :k
        ]
        return Listed([name for name, _ in kept], [score for _, score in kept])

    def _known(self, items: Iterable[Id]) -> list[int]:
        """The rows of those that are in the catalogue."""
        rows_of = self.item_ids.row_of
        return [rows_of[item] for item in items if item in rows_of]

    def _left_out(self, wanted: Sequence[Wanted], seen: Rows) -> list[np.ndarray]:
        """Rows that must not come for each user, rising."""
        return [
            np.union1d(rows, np.array(self._known(one.leave_out), dtype=np.int64))
            if one.leave_out
            else rows
            for one, rows in zip(wanted, seen, strict=True)
        ]

    def _only(self, scores: Tensor, wanted: Sequence[Wanted]) -> Tensor:
        for row, one in enumerate(wanted):
            if one.among is not None:
                allowed = torch.zeros(scores.shape[1], dtype=torch.bool)
                allowed[self._known(one.among)] = True
                scores[row].masked_fill_(~allowed, -torch.inf)
        return scores

    def _listed(self, wanted: Sequence[Wanted], scores: Tensor, items: Tensor) -> list[Listed]:
        """Lists with the ids of items from scores and items ``[B, n]``."""
        lists = []
        for one, values, rows in zip(wanted, scores.tolist(), items.tolist(), strict=True):
            there = [
                (self._ids[row], value)
                for row, value in zip(rows[: one.k], values[: one.k], strict=True)
                if row != NONE and value != -torch.inf
            ]
            lists.append(Listed([item for item, _ in there], [value for _, value in there]))
        return lists


def state_digest(model: UserModel, item_ids: IdMap) -> bytes:
    """16 bytes that stand for all that states of a model depend on."""
    digest = hashlib.sha256(
        f"{type(model).__name__} {model.config!r} {item_ids.fingerprint}".encode()
    )
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.digest()[:16]
