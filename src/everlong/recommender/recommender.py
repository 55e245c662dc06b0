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

from everlong.data.arrays import IntArray
from everlong.data.events import Events, read_events, restrict_to_catalogue
from everlong.data.ids import IdMap
from everlong.data.items import ItemTable
from everlong.data.reading import Source
from everlong.data.split import Protocol, split
from everlong.data.times import TimeUnit
from everlong.evaluation.next_item import Evaluation, evaluate
from everlong.inference.catalogue import Best
from everlong.inference.filters import NOTHING, Named, joined
from everlong.inference.retriever import Retriever
from everlong.inference.seen import UserBytes
from everlong.models import state as states
from everlong.models.device import device_of, named_device, serving
from everlong.models.item_vectors import for_serving, same_space, with_more_items
from everlong.models.registry import config_class, load_model_class, stored_model_class
from everlong.models.state import State
from everlong.models.two_stage import TwoStage
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


Items = Sequence[Any] | pl.Series | Mapping[Any, Sequence[Any]]
"""Ids of items, for all users alike or of each user."""


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
    """IntArray without a usable id or time, by reason."""


class Recommender:
    """Recommends items to users from their states, and keeps the states up to date.

    Made by :func:`everlong.fit` or :func:`everlong.load`.
    """

    def __init__(
        self, model: UserModel, item_ids: IdMap, origin: Origin, users: UserTable | None = None
    ) -> None:
        self.item_ids = item_ids
        self._set_model(model)
        self.origin = origin
        if users is None:
            with serving(model):
                users = UserTable(model.initial_state(1))
        self.users = users

    def __repr__(self) -> str:
        return (
            f"Recommender({self.origin.model}: {len(self.item_ids):,} items, "
            f"{len(self.users):,} users, {self.bytes_per_user})"
        )

    @property
    def bytes_per_user(self) -> UserBytes:
        """Bytes kept for a user: all but the seen items whatever the length of the history."""
        return self.users.bytes_per_user

    @property
    def model(self) -> UserModel:
        """The model, in evaluation mode; its parameters stay as they are."""
        return self._model

    @property
    def retriever(self) -> Retriever:
        """What makes lists from the states of the model."""
        return self._retriever

    def _set_model(self, model: UserModel) -> None:
        self._model = for_serving(model)
        self._retriever = Retriever(model)

    def recommend(
        self,
        users: Sequence[Any] | Mapping[Any, Sequence[Any]] | pl.Series,
        *,
        k: int = 10,
        filter_seen: bool | None = None,
        exclude: Items | None = None,
        among: Items | None = None,
        at: int | datetime | None = None,
    ) -> pl.DataFrame:
        """The best items for each user: ``user_id, item_id, score, rank``, rank from 1.

        Among equal scores the item that comes first in the catalogue comes first. Ids in
        ``exclude`` and ``among`` that are not in the catalogue are left out, and their number is
        logged.

        Args:
            users: ids of known users; or histories of any users, oldest item first, as a mapping
                from any name to a list of item ids. Nothing is kept of histories.
            k: items for each user; fewer come if the catalogue is smaller or all else was seen.
            filter_seen: leave out the items that a user has seen; by default as the model was
                evaluated, that is unless its protocol has ``seen="keep"``.
            exclude: ids of items that must not come; of each user as a mapping from users to ids.
            among: ids of the only items that may come; a user that a mapping lacks may get any.
            at: time of the request, Unix seconds or a datetime (UTC if it has no time zone), for
                models that use it.

        Raises:
            ValueError: if ``k`` is below 1, or a user or an item of a history is unknown.
        """
        if k < 1:
            raise ValueError(f"expected k >= 1, received {k}")
        if filter_seen is None:
            filter_seen = self.origin.protocol.seen == "mask"
        if isinstance(users, Mapping):
            table, names = self._read_histories(users)
            rows = np.arange(len(names), dtype=np.int64)
        else:
            table, names = self.users, _series("user_id", users)
            rows = self._known_users(names)
        without = table.seen.rows(rows) if filter_seen else [NOTHING] * len(rows)
        filters = _Filters(self.item_ids, names.to_list(), exclude, among)
        found = self._retriever.recommend(
            self._states(table, rows),
            k,
            at=self._times(at, len(rows)),
            exclude=[joined(a, b) for a, b in zip(without, filters.exclude, strict=True)],
            among=filters.among,
        )
        return self._frame(names.alias("user_id"), "item_id", found)

    def rank(
        self,
        users: Sequence[Any] | pl.Series,
        candidates: Sequence[Sequence[Any]],
        *,
        exclude: Items | None = None,
        among: Items | None = None,
        at: int | datetime | None = None,
    ) -> pl.DataFrame:
        """Candidates of each user in order: ``user_id, item_id, score, rank``, rank from 1.

        The order is that of ``recommend``. With a ranker the candidates of a user are one set: what
        is among them may change the order of the rest. Candidates that are not in the catalogue
        stand at the end of the rows of their user, without a score and a rank.

        Args:
            users: ids of known users.
            candidates: item ids for each of them; one that is there twice is kept once.
            exclude, among: candidates that are left out, as of ``recommend``.
            at: time of the request, Unix seconds or a datetime (UTC if it has no time zone).

        Raises:
            ValueError: if a user is unknown, or there is not one list for each user.
        """
        names = _series("user_id", users)
        if len(names) != len(candidates):
            raise ValueError(
                f"expected one list of candidates a user, received {len(candidates)} lists for "
                f"{len(names)} users"
            )
        rows = self._known_users(names)
        filters = _Filters(self.item_ids, names.to_list(), exclude, among)
        named = [_named(self.item_ids, items) for items in candidates]
        kept = [filters.kept(row, one.rows) for row, one in enumerate(named)]
        items = torch.full((len(kept), max((own.size for own in kept), default=0)), -1)
        for row, own in enumerate(kept):
            items[row, : own.size] = torch.from_numpy(own)
        found = self._retriever.rank(
            self._states(self.users, rows), items, self._times(at, len(rows))
        )
        frame = self._frame(names, "item_id", found)
        lost = [(row, item) for row, one in enumerate(named) for item in one.unknown]
        if not lost:
            return frame
        unknown = pl.DataFrame(
            [
                names.gather([row for row, _ in lost]),
                pl.Series("item_id", [item for _, item in lost], dtype=self.item_ids.dtype),
            ]
        ).with_columns(score=pl.lit(None, pl.Float32), rank=pl.lit(None, pl.Int32))
        # rows of one user together, in the order in which users were given
        owners = np.concatenate([self._owners(found), np.array([row for row, _ in lost])])
        return pl.concat([frame, unknown])[np.argsort(owners, kind="stable")]

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
        if self.model.num_candidates is not None:
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
        self.item_ids = item_ids
        self._set_model(larger)
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
        ids = _series("item_id", items)
        found = self._retriever.similar(torch.from_numpy(self._known_items(ids)), k)
        return self._frame(ids, "similar_item_id", found)

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
            table = UserTable(self.model.initial_state(1))
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

    def _states(self, table: UserTable, rows: IntArray) -> State:
        """The states of some users, where the model is."""
        found = table.read_states(torch.from_numpy(rows))
        return states.to_device(found, device_of(self.model))

    def _times(self, at: int | datetime | None, count: int) -> torch.Tensor | None:
        when = _seconds(at)
        return None if when is None else torch.full((count,), when, device=device_of(self.model))

    def _frame(self, names: pl.Series, found: str, best: Best) -> pl.DataFrame:
        """One row for each item of each list, best first; places without an item are left out."""
        count, width = best.items.shape
        frame = pl.DataFrame(
            [
                names.gather(np.repeat(np.arange(count), width)),
                self.item_ids.ids(best.items.flatten().numpy()).alias(found),
                pl.Series("score", best.scores.flatten().numpy()),
                pl.Series("rank", np.tile(np.arange(1, width + 1, dtype=np.int32), count)),
            ]
        )
        return frame.filter(pl.Series(best.items.flatten().numpy() >= 0))

    def _owners(self, best: Best) -> IntArray:
        """The place of the user of each row of the frame of some lists."""
        return np.nonzero(best.items.numpy() >= 0)[0]


class _Filters:
    """Filters of users ``[B]`` as rows of the catalogue."""

    def __init__(
        self, item_ids: IdMap, names: list[Any], exclude: Items | None, among: Items | None
    ) -> None:
        self._item_ids, self._unknown = item_ids, 0
        self.exclude = [NOTHING if ids is None else ids for ids in self._rows(exclude, names)]
        self.among = self._rows(among, names)
        if self._unknown:
            log.warning("%d items of exclude or among are not in the catalogue", self._unknown)

    def _rows(self, items: Items | None, names: list[Any]) -> list[np.ndarray | None]:
        if items is None:
            return [None] * len(names)
        if isinstance(items, Mapping):
            mine = {name: self._rising(ids) for name, ids in items.items()}
            return [mine.get(name) for name in names]
        return [self._rising(items)] * len(names)

    def _rising(self, ids: Sequence[Any] | pl.Series) -> np.ndarray:
        named = _named(self._item_ids, ids)
        self._unknown += len(named.unknown)
        return named.rising

    def kept(self, row: int, items: np.ndarray) -> np.ndarray:
        """Items ``[n]`` of a user that are not left out."""
        allowed, only = ~np.isin(items, self.exclude[row]), self.among[row]
        return items[allowed if only is None else allowed & np.isin(items, only)]


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


def _named(item_ids: IdMap, ids: Sequence[Any] | pl.Series) -> Named:
    """Items named by ids from outside.

    Raises:
        ValueError: if they are no list, of several types, or of another kind than those of the log.
    """
    series = _series("item_id", ids).unique(maintain_order=True)
    rows = item_ids.rows(series) if len(series) else NOTHING
    return Named(rows[rows >= 0], series.filter(pl.Series(rows < 0)).to_list())


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
