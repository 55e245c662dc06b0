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

from everlong.data.ids import IdMap
from everlong.inference.catalogue import Best
from everlong.inference.filters import NOTHING, Named, Rows, joined
from everlong.inference.index import made_up
from everlong.inference.retriever import Retriever
from everlong.inference.topk import NONE
from everlong.models import state as states
from everlong.models.state import State
from everlong.models.user_model import UserModel
from everlong.recommender.recommender import Recommender, load
from everlong.server.store.log import Id, Slice
from everlong.server.store.state_table import StateTable
from everlong.training.migrations import first_parameter

log = logging.getLogger(__name__)

INDEX_FROM = 1_000_000
"""Items from which on a search goes through an index."""

QUERIES = 256
"""Searches on which an index is tried."""


class Listed(NamedTuple):
    """Items and their scores, best first."""

    items: list[Id]
    scores: list[float]
    unknown: Sequence[Id] = ()
    """Items that a request named and the catalogue does not have; they were left out."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What one request for recommendations wants.

    Attributes:
        k: items, at most.
        at: time of the request, Unix seconds.
        exclude: items that must not come.
        among: the only items that may come, None for all.
    """

    k: int
    at: int | None = None
    exclude: Collection[Id] = ()
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
        # one of its own: what is hidden in the service stays in the lists of the recommender
        self.retriever = Retriever(self.model)
        # a list is many times quicker than a gather from the ids of the map
        self._ids: list[Id] = self.item_ids.ids(range(len(self.item_ids))).to_list()
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

    @property
    def filters_seen(self) -> bool:
        """Whether lists leave out what a user has seen, where a request does not say."""
        return self.recommender.origin.protocol.seen == "mask"

    @property
    def exact(self) -> bool:
        """Whether lists are exact; else an index finds the items."""
        catalogue = self.retriever.catalogue
        return catalogue is None or catalogue.index is None

    @property
    def recall(self) -> float | None:
        """Share of the best 100 items that the index finds; None where none was built."""
        catalogue = self.retriever.catalogue
        return None if catalogue is None else catalogue.recall

    def table(self) -> StateTable:
        """Empty states of the model."""
        return StateTable(self.model, self.item_ids, self.digest)

    def prepare(self, state: State | None = None) -> None:
        """Builds the index of a large catalogue, if it finds what the exact search finds.

        Args:
            state: of some users who will ask, 256 are plenty; None where there are none.
        """
        catalogue = self.retriever.catalogue
        if catalogue is not None:
            catalogue.prepare()
        if catalogue is None or self.index_from is None or len(catalogue) < self.index_from:
            return
        with torch.no_grad():
            without_events = self.model.user_embedding(self.model.initial_state(1))
            queries = made_up(catalogue.weight, float(without_events.norm()), QUERIES)
            if state is not None and states.num_users(state):
                # vectors of users in place of as many synthetic ones
                queries = torch.cat([self.model.user_embedding(state).to(queries.dtype), queries])[
                    :QUERIES
                ]
            try:
                catalogue.build_index(queries)
            except ImportError as error:
                log.warning("%d items and no index: %s", len(catalogue), error)

    def warm_up(self) -> None:
        """Reads an event and makes a list, so that everything compiled at first use is compiled."""
        table, user_id = self.table(), self.user_type(0)
        fields = dict.fromkeys(self.model.event_fields, 0)
        table.apply(Slice((1,), (bytes(16),), (user_id,), (self._ids[0],), (0,), (fields,)))
        self.recommend(table.read([user_id]), [Wanted(k=1)])

    def hide(self, items: Iterable[Id]) -> None:
        """Keeps items out of every list that is not asked for by name; they replace those before.

        Those that are not in the catalogue are ignored.
        """
        self.retriever.hide(torch.from_numpy(Named.of(self.item_ids.row_of, items).rising))

    def recommend(
        self, state: State, wanted: Sequence[Wanted], seen: Rows | None = None
    ) -> list[Listed]:
        """A list for each of ``B`` users from their states ``[B]``.

        Without a time a request is scored at the time of the user's latest event.

        Args:
            state: of the users.
            wanted: what each of them wants.
            seen: rows of the catalogue that must not come for each of them, rising; None for none.
        """
        filters = [self._filters(one) for one in wanted]
        without = [
            joined(mine, own.exclude.rising)
            for mine, own in zip(seen or [NOTHING] * len(wanted), filters, strict=True)
        ]
        among = [None if own.among is None else own.among.rising for own in filters]
        unknown = [own.unknown for own in filters]
        timed = [one.at is not None for one in wanted]
        if all(timed) or not any(timed):
            found = self._recommend(state, wanted, without, among)
            return self._listed(wanted, found, unknown)
        # a model takes times of all or of none
        lists: dict[int, Listed] = {}
        for kind in (True, False):
            rows = [row for row, has in enumerate(timed) if has is kind]
            some, part = [wanted[row] for row in rows], states.take(state, torch.tensor(rows))
            found = self._recommend(
                part, some, [without[row] for row in rows], [among[row] for row in rows]
            )
            own = [unknown[row] for row in rows]
            lists.update(zip(rows, self._listed(some, found, own), strict=True))
        return [lists[row] for row in range(len(wanted))]

    def _recommend(
        self,
        state: State,
        wanted: Sequence[Wanted],
        without: Rows,
        among: Sequence[np.ndarray | None],
    ) -> Best:
        """The lists for requests that either all have a time or all have none."""
        when = torch.tensor([one.at for one in wanted]) if wanted[0].at is not None else None
        most = max(one.k for one in wanted)
        return self.retriever.recommend(state, most, at=when, exclude=without, among=among)

    def rank(self, state: State, candidates: Sequence[Id], at: int | None) -> Listed:
        """Candidates of one user in order; those that are not in the catalogue are left out."""
        named = Named.of(self.item_ids.row_of, candidates)
        when = None if at is None else torch.tensor([at])
        found = self.retriever.rank(state, torch.from_numpy(named.rows)[None], when)
        return self._listed([Wanted(k=max(1, len(named.rows)))], found, [named.unknown])[0]

    def similar(self, item: Id, k: int) -> Listed | None:
        """Items near one in the space of item vectors, by cosine; None if it is not known.

        Raises:
            TypeError: if the model has no item vectors.
        """
        row = self.item_ids.row_of.get(item)
        if row is None:
            return None
        found = self.retriever.similar(torch.tensor([row]), k)
        return self._listed([Wanted(k=k)], found, [()])[0]

    def _filters(self, wanted: Wanted) -> _Filters:
        row_of = self.item_ids.row_of
        among = None if wanted.among is None else Named.of(row_of, wanted.among)
        return _Filters(Named.of(row_of, wanted.exclude), among)

    def _listed(
        self, wanted: Sequence[Wanted], found: Best, unknown: Sequence[Sequence[Id]]
    ) -> list[Listed]:
        """Lists with the ids of items."""
        lists = []
        for one, values, rows, lost in zip(
            wanted, found.scores.tolist(), found.items.tolist(), unknown, strict=True
        ):
            there = [
                (self._ids[row], value)
                for row, value in zip(rows[: one.k], values[: one.k], strict=True)
                if row != NONE
            ]
            lists.append(Listed([item for item, _ in there], [value for _, value in there], lost))
        return lists


class _Filters(NamedTuple):
    """What a request names, as rows of the catalogue."""

    exclude: Named
    among: Named | None

    @property
    def unknown(self) -> list[Id]:
        """Items that the catalogue does not have, each once."""
        among = [] if self.among is None else self.among.unknown
        return list(dict.fromkeys([*self.exclude.unknown, *among]))


FIRST_CLASSES = {
    "PublishedPerSRecHSTU": "PaperPerSRec",
    "PublishedPerSRecHSTUConfig": "PaperPerSRecConfig",
    "PublishedPerSRecHLLM": "PaperPerSRecHLLM",
    "PublishedPerSRecHLLMConfig": "PaperPerSRecHLLMConfig",
}
"""Classes of today, and what version 1 called them."""


def state_digest(model: UserModel, item_ids: IdMap) -> bytes:
    """16 bytes that stand for all that states of a model depend on.

    What was renamed counts by its first name: states and data folders of earlier versions hold
    digests, and a model is the same under another name.
    """
    kind, (config, _, settings) = type(model).__name__, repr(model.config).partition("(")
    kind, config = (FIRST_CLASSES.get(name, name) for name in (kind, config))
    digest = hashlib.sha256(f"{kind} {config}({settings} {item_ids.fingerprint}".encode())
    values = {first_parameter(name): value for name, value in model.state_dict().items()}
    for name, value in sorted(values.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().data)
    return digest.digest()[:16]
