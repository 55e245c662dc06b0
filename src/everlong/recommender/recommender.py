"""What people use: a model with its ids and the states of its users."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

from everlong.data.arrays import IntArray
from everlong.data.events import Events, read_events, restrict_to_catalogue
from everlong.data.ids import IdMap
from everlong.data.items import ItemTable
from everlong.data.reading import Source
from everlong.data.split import Protocol, split
from everlong.data.times import TimeUnit
from everlong.evaluation.next_item import Evaluation, evaluate
from everlong.inference.topk import SCORES_PER_BATCH, mask_items, top_k
from everlong.models.device import device_of, named_device, serving
from everlong.models.item_vectors import for_serving, same_space, with_more_items
from everlong.models.registry import config_class, load_model_class, stored_model_class
from everlong.models.two_stage import TwoStage, rerank
from everlong.models.user_model import UserModel
from everlong.recommender.card import card
from everlong.recommender.folder import read_folder, write_folder
from everlong.recommender.origin import Origin
from everlong.recommender.users import UserTable, read_into
from everlong.system.provenance import versions
from everlong.system.settings import load_settings
from everlong.training.settings import TrainConfig

log = logging.getLogger(__name__)

TWO_STAGE = "two_stage"
"""Name of a model that is a retriever and a ranker."""

SEEN_CAPACITY = 1024
"""Item rows kept for each user so that seen items can be filtered: 4 KB."""


class UpdateReport(NamedTuple):
    """What ``update`` did."""

    events: int
    """Events that were read into states."""
    users: int
    """Users whose state changed."""
    new_users: int
    unknown_items: int
    """Events left out because their item is not in the catalogue."""
    late: int
    """Events older than one that was read before; read in the order of arrival all the same."""
    skipped: Mapping[str, int]
    """Rows without a usable id or time, by reason."""


class Recommender:
    """Recommends items to users from their states, and keeps the states up to date.

    Made by :func:`everlong.fit` or :func:`everlong.load`.
    """

    def __init__(
        self, model: UserModel, item_ids: IdMap, origin: Origin, users: UserTable | None = None
    ) -> None:
        self.model = for_serving(model)
        self.item_ids = item_ids
        self.origin = origin
        if users is None:
            with serving(model):
                users = UserTable(model.initial_state(1), SEEN_CAPACITY)
        self.users = users

    def __repr__(self) -> str:
        return (
            f"Recommender({self.origin.model}: {len(self.item_ids):,} items, "
            f"{len(self.users):,} users, {self.bytes_per_user:,} bytes per user)"
        )

    @property
    def bytes_per_user(self) -> int:
        """Bytes kept for a user, whatever the length of the history."""
        return self.users.bytes_per_user

    def recommend(
        self,
        users: Sequence[Any] | Mapping[Any, Sequence[Any]] | pl.Series,
        *,
        k: int = 10,
        filter_seen: bool = True,
        at: int | datetime | None = None,
    ) -> pl.DataFrame:
        """The best items for each user: ``user_id, item_id, score, rank``, rank from 1.

        Args:
            users: ids of known users; or histories of anybody, oldest item first, as a mapping
                from any name to a list of item ids. Nothing is kept of histories.
            k: items for each user; fewer come if the catalogue is smaller or all else was seen.
            filter_seen: leave out the items that a user has seen.
            at: time of the request, Unix seconds or a datetime (UTC if it has no time zone), for
                models that use it.

        Raises:
            ValueError: if ``k`` is below 1, or a user or an item of a history is unknown.
        """
        if k < 1:
            raise ValueError(f"expected k >= 1, received {k}")
        if isinstance(users, Mapping):
            table, names = self._read_histories(users)
            rows = np.arange(len(names), dtype=np.int64)
        else:
            table, names = self.users, _series("user_id", users)
            rows = self._known_users(names)
        return self._list(table, rows, names.alias("user_id"), k, filter_seen, _seconds(at))

    def rank(
        self,
        users: Sequence[Any] | pl.Series,
        candidates: Sequence[Sequence[Any]],
        *,
        at: int | datetime | None = None,
    ) -> pl.DataFrame:
        """Candidates of each user in the order of the ranker: ``user_id, item_id, score, rank``.

        The candidates of a user are one set: what is among them may change the order of the rest.
        Without a ranker they are ordered by the scores that recommendations are made from.

        Args:
            users: ids of known users.
            candidates: item ids for each of them; one that is there twice is kept once.
            at: time of the request, Unix seconds or a datetime (UTC if it has no time zone).

        Raises:
            ValueError: if a user or an item is unknown, or there is not one list for each user.
        """
        names = _series("user_id", users)
        if len(names) != len(candidates):
            raise ValueError(
                f"expected one list of candidates a user, received {len(candidates)} lists for "
                f"{len(names)} users"
            )
        when, lists = _seconds(at), []
        rows, device = self._known_users(names), device_of(self.model)
        with serving(self.model):
            for place, items in enumerate(candidates):
                ids = _series("item_id", items).unique(maintain_order=True)
                known = torch.from_numpy(self._known_items(ids)) if len(ids) else torch.zeros(0)
                state = self.users.read_states(torch.from_numpy(rows[place : place + 1]))
                state = type(state)(*(value.to(device) for value in state))
                asked = None if when is None else torch.tensor([when], device=device)
                known = known.long()[None].to(device)
                if isinstance(self.model, TwoStage):
                    scores, known = rerank(self.model, state, known, asked)
                else:
                    scores = self.model.score(state, known, asked)
                    scores, order = scores.sort(dim=1, descending=True, stable=True)
                    known = known.gather(1, order)
                lists.append((scores.cpu(), known.cpu()))
        frames = [self._frame(names[n : n + 1], "item_id", [part]) for n, part in enumerate(lists)]
        return pl.concat(frames) if frames else self._frame(names, "item_id", [])

    def update(
        self,
        events: Source | Events,
        *,
        user_id: str = "user_id",
        item_id: str = "item_id",
        timestamp: str | None = "timestamp",
        time_unit: TimeUnit | Literal["auto"] = "auto",
    ) -> UpdateReport:
        """Reads new events into the states of their users, at a constant cost per event.

        Users that are new begin with the initial state. Events of items that are not in the
        catalogue are left out and counted. Events of one user are read in the order of their times.

        Args:
            events: new events alone, in any form that ``read_events`` takes.
            user_id: the column of user ids.
            item_id: the column of item ids.
            timestamp: the column of times, or None if the rows are in order already and the log
                had no times either; they follow the user's last event.
            time_unit: what the times are; a log that had positions is continued by positions.

        Raises:
            ValueError: if the events cannot be read, or have times where the log had positions or
                the other way round.
        """
        ordered = timestamp is None and not isinstance(events, Events)
        if not isinstance(events, Events):
            events = read_events(
                events,
                user_id=user_id,
                item_id=item_id,
                timestamp=timestamp,
                fields=self.model.event_fields,
                time_unit="position" if self.origin.time_unit == "position" else time_unit,
            )
        self._check_clock(events)
        known, dropped = restrict_to_catalogue(events, self.item_ids)
        if ordered:
            known = self._continued(known)
        new_users = self.users.add(known.user_ids.ids(np.arange(known.num_users)))
        late = read_into(self.model, self.users, known)
        busy = int(np.count_nonzero(known.lengths))
        if dropped:
            log.warning("%d events have items that are not in the catalogue: left out", dropped)
        skipped = dict(events.facts.rows_skipped)
        return UpdateReport(known.num_events, busy, new_users, dropped, late, skipped)

    def add_items(self, items: ItemTable) -> int:
        """Takes new items into the catalogue at once, by their vectors and without training.

        An item is added if the catalogue lacks it and its vector is not zero. From then on it is
        recommended, and events of it are read. Nothing changes for other items and for the states
        of users; events of the item that ``update`` left out earlier stay left out. The model is
        copied each time, so add many at once.

        Args:
            items: a table with the vector columns that the model was trained with; items that are
                in the catalogue may be in it too.

        Returns:
            How many items were added.

        Raises:
            ValueError: if the model knows items by their ids alone or has a ranker, or vectors or
                ids are not of the kind that it was trained with.
        """
        if isinstance(self.model, TwoStage):
            raise ValueError(
                "the ranker knows no items but those it was trained with: expected a recommender "
                "without one; add the items before fit_ranker"
            )
        expected = self.origin.data.get("item_vectors", items.vector_widths)
        if items.vector_widths != expected:
            raise ValueError(
                f"expected vector columns {expected}, as in training, received "
                f"{items.vector_widths}; read the items with these columns alone"
            )
        ids = items.item_ids.ids(np.arange(items.num_items))
        vectors = items.joined_vectors(items.item_ids)
        rows, there = self.item_ids.rows(ids), vectors.any(axis=1)
        new, known = (rows < 0) & there, (rows >= 0) & there
        if not same_space(self.model, rows[known], vectors[known]):
            raise ValueError(
                "most items of the catalogue that are in the table have other vectors there than "
                "in training: expected vectors of the same encoder, received others; make them in "
                "the same way"
            )
        larger = with_more_items(self.model, torch.from_numpy(vectors[new]))
        item_ids = self.item_ids.extended(ids.filter(pl.Series(new)))
        self.model, self.item_ids = for_serving(larger), item_ids
        return int(new.sum())

    def evaluate(self, events: Source | Events, *, part: str = "test") -> Evaluation:
        """Metrics on the held-out part of the log that the model was trained on.

        Items that were added later are ranked with the others.

        Args:
            events: the same log; it is split by the same protocol.
            part: ``"test"`` or ``"validation"``.

        Raises:
            ValueError: if the log is another one, or there is no such part.
        """
        if part not in ("test", "validation"):
            raise ValueError(f"expected part 'test' or 'validation', received {part!r}")
        if not isinstance(events, Events):
            events = read_events(events, fields=self.model.event_fields)
        if events.fingerprint != self.origin.data["fingerprint"]:
            raise ValueError(
                "this log is not the one that the model was trained on: expected fingerprint "
                f"{self.origin.data['fingerprint'][:12]}, received {events.fingerprint[:12]}; "
                "read the same file with the same columns, ties and seed"
            )
        parts = split(events, self.origin.protocol)
        targets = parts.test if part == "test" else parts.validation
        return evaluate(self.model, parts.events, targets, seen=self.origin.protocol.seen)

    def similar_items(self, items: Sequence[Any] | pl.Series, *, k: int = 10) -> pl.DataFrame:
        """The items nearest to each item by cosine: ``item_id, similar_item_id, score, rank``.

        Raises:
            ValueError: if ``k`` is below 1, or an item is unknown.
            TypeError: if the model has no item vectors.
        """
        if k < 1:
            raise ValueError(f"expected k >= 1, received {k}")
        ids = _series("item_id", items)
        rows = torch.from_numpy(self._known_items(ids))
        weight = self.model.item_embeddings().weight.detach().cpu()
        if weight.shape[1] < 2:
            raise TypeError(f"the model {self.origin.model!r} has no item vectors to compare")
        vectors = torch.nn.functional.normalize(weight, dim=1)
        lists = []
        for part in torch.split(rows, max(1, SCORES_PER_BATCH // len(self.item_ids))):
            scores = vectors[part] @ vectors.T
            scores[torch.arange(len(part)), part] = -torch.inf
            lists.append(top_k(scores, k))
        return self._frame(ids, "similar_item_id", lists)

    def user_ids_from_text(self, texts: Sequence[str]) -> pl.Series:
        """Ids of users written as text, such as command line words, in the type of the log.

        Raises:
            ValueError: if a text cannot be read as that type.
        """
        return IdMap.from_values(self.users.ids[:1] or [""]).from_text(texts)

    def save(self, folder: str | Path) -> None:
        """Writes model, ids, states, metrics and card to a folder, whole or not at all.

        Raises:
            OSError: if it cannot be written; a folder that was there stays as it was.
        """
        origin = self.origin
        write_folder(
            Path(folder),
            config={
                "model": origin.model,
                "architecture": dataclasses.asdict(self.model.config),
                "train": origin.train.model_dump(),
                "protocol": origin.protocol.model_dump(mode="json"),
                "time_unit": origin.time_unit,
                "data": dict(origin.data),
                "versions": versions(),
            },
            weights=self.model.state_dict(),
            item_ids=self.item_ids.ids(np.arange(len(self.item_ids))),
            user_ids=pl.Series("user_id", self.users.ids),
            users=self.users.trimmed(),
            metrics=origin.metrics,
            card=card(origin.model, origin, self.model, self.bytes_per_user),
        )

    def _check_clock(self, events: Events) -> None:
        """Raises ``ValueError`` if new events count time in another way than the log."""
        before, now = self.origin.time_unit == "position", events.facts.time_unit == "position"
        if before != now:
            kinds = {True: "positions, no times", False: "times"}
            raise ValueError(
                f"the log that was learnt from had {kinds[before]}: expected the same of new "
                f"events, received {kinds[now]}; name their column in timestamp= and its unit in "
                "time_unit="
            )

    def _continued(self, events: Events) -> Events:
        """The events with positions that go on where those of their users ended."""
        rows = self.users.rows(events.user_ids.ids(np.arange(events.num_users)))
        first = np.zeros(events.num_users, dtype=np.int64)
        first[rows >= 0] = self.users.next_position(rows[rows >= 0])
        times = events.times + np.repeat(first, events.lengths)
        return dataclasses.replace(events, times=times)

    def _known_users(self, ids: pl.Series) -> IntArray:
        rows = self.users.rows(ids)
        if (rows < 0).any():
            unknown = ids.filter(pl.Series(rows < 0))
            raise ValueError(
                f"{len(unknown)} users are unknown, for example {unknown[0]!r}: feed their events "
                "with update(), or pass {name: [item ids]} to recommend from a history"
            )
        return rows

    def _known_items(self, ids: pl.Series) -> IntArray:
        rows = self.item_ids.rows(ids)
        if (rows < 0).any():
            unknown = ids.filter(pl.Series(rows < 0))
            raise ValueError(
                f"{len(unknown)} items are not in the catalogue, for example {unknown[0]!r}; "
                f"ids are of type {self.item_ids.dtype}, as in training"
            )
        return rows

    def _read_histories(
        self, histories: Mapping[Any, Sequence[Any]]
    ) -> tuple[UserTable, pl.Series]:
        """A table of these histories alone, and their names."""
        if self.model.event_fields:
            raise ValueError(
                f"the model reads the fields {', '.join(self.model.event_fields)} of events, which "
                "a list of items does not have: feed the events with update() first"
            )
        names = _series("user_id", list(histories))
        for name, items in histories.items():
            if isinstance(items, str | bytes) or not isinstance(items, Iterable):
                raise ValueError(
                    f"history of {name!r}: expected a list of item ids, received {items!r}; "
                    f"use [{items!r}]"
                )
        lengths = [len(items) for items in histories.values()]
        flat = [item for items in histories.values() for item in items]
        rows = self._known_items(_series("item_id", flat)) if flat else np.zeros(0, np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        with serving(self.model):
            table = UserTable(self.model.initial_state(1), SEEN_CAPACITY)
        table.add(pl.Series(range(len(names))))
        events = Events(
            items=rows.astype(np.int32),
            times=np.arange(len(rows), dtype=np.int64),
            offsets=offsets,
            user_ids=IdMap(pl.Series(range(len(names)), dtype=pl.Int64)),
            item_ids=self.item_ids,
        )
        read_into(self.model, table, events)
        return table, names

    def _list(
        self,
        table: UserTable,
        rows: IntArray,
        names: pl.Series,
        k: int,
        filter_seen: bool,
        at: int | None,
    ) -> pl.DataFrame:
        lists = []
        size = max(1, SCORES_PER_BATCH // len(self.item_ids))
        device = device_of(self.model)
        with serving(self.model):
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                state = table.read_states(torch.from_numpy(part))
                state = type(state)(*(value.to(device) for value in state))
                when = None if at is None else torch.full((len(part),), at, device=device)
                scores = self.model.score(state, at=when).cpu()
                if filter_seen:
                    scores = mask_items(scores, *table.seen_pairs(part))
                if isinstance(self.model, TwoStage):
                    named = top_k(scores, max(k, self.model.config.candidates))[1].to(device)
                    ranked = rerank(self.model, state, named, when)
                    lists.append((ranked[0][:, :k].cpu(), ranked[1][:, :k].cpu()))
                else:
                    lists.append(top_k(scores, k))
        return self._frame(names, "item_id", lists)

    def _frame(
        self, names: pl.Series, found: str, lists: list[tuple[Tensor, Tensor]]
    ) -> pl.DataFrame:
        """One row for each item of each list, best first; places without an item are left out."""
        if not lists:
            lists = [(torch.empty(0, 1), torch.empty(0, 1, dtype=torch.int64))]
        scores = torch.cat([scores for scores, _ in lists])
        items = torch.cat([items for _, items in lists])
        width = items.shape[1]
        owners = np.repeat(np.arange(len(names)), width)
        frame = pl.DataFrame(
            [
                names.gather(owners),
                self.item_ids.ids(items.flatten().numpy()).alias(found),
                pl.Series("score", scores.flatten().float().numpy()),
                pl.Series("rank", np.tile(np.arange(1, width + 1, dtype=np.int32), len(names))),
            ]
        )
        return frame.filter(pl.Series(items.flatten().numpy() >= 0))


def load(
    folder: str | Path,
    *,
    models: Sequence[str | type[UserModel]] = (),
    device: str = "cpu",
) -> Recommender:
    """The recommender that ``save`` wrote.

    Args:
        folder: a model folder.
        models: models of your own that the folder may be of, as classes or as import paths
            ``package.module:Class``: a folder alone has no code imported.
        device: where to compute.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if the folder is not whole, was changed, or is of another format, or the device
            cannot be used.
    """
    place = named_device(device)
    for named in models:
        load_model_class(named, None)
    stored = read_folder(Path(folder))
    config = stored.config
    try:
        model_class = TwoStage if config.model == TWO_STAGE else stored_model_class(config.model)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    try:
        model = model_class(load_settings(config_class(model_class), config.architecture))
        train = load_settings(TrainConfig, config.train)
        protocol = load_settings(Protocol, config.protocol)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; was it written by another version?") from error
    try:
        model.load_state_dict(stored.weights)
    except RuntimeError as error:
        raise ValueError(f"{folder}: weights and architecture do not fit: {error}") from error
    model.to(place)
    with serving(model):
        initial = model.initial_state(1)
    initial = type(initial)(*(value.cpu() for value in initial))
    origin = Origin(
        model=config.model,
        train=train,
        protocol=protocol,
        time_unit=config.time_unit,
        data=config.data,
        metrics=stored.metrics,
    )
    users = UserTable.restore(stored.user_ids, stored.users, initial)
    return Recommender(model, IdMap.in_order(stored.item_ids), origin, users)


def _series(name: str, ids: Sequence[Any] | pl.Series) -> pl.Series:
    """Ids from outside as a series.

    Raises:
        ValueError: if they are no list, or of several types.
    """
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise ValueError(f"{name}: expected a list of ids, received {ids!r}; use [{ids!r}]")
    try:
        return pl.Series(name, ids, strict=True)
    except (TypeError, OverflowError, pl.exceptions.PolarsError) as error:
        raise ValueError(f"{name}: ids must all have one type: {error}") from error


def _seconds(at: int | datetime | None) -> int | None:
    """Unix seconds; a datetime without a time zone is UTC, as in a log."""
    if isinstance(at, datetime):
        return int((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp())
    if at is None or isinstance(at, int | np.integer):
        return None if at is None else int(at)
    raise ValueError(f"at: expected Unix seconds or a datetime, received {at!r}")
