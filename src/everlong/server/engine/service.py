"""The service without its protocol: shards, the models in them, and what can be asked of them.

data folder/
    service.json          shards, which model is live, items that are hidden; replaced as a whole
    service.lock          held by the process that serves
    shard-0000.sqlite     events and states of some of the users
    ...
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch

from everlong.models import state as states
from everlong.models.state import State
from everlong.server.engine.reader import Reader
from everlong.server.engine.served_model import QUERIES, Listed, ServedModel, Wanted
from everlong.server.engine.shard import Shard
from everlong.server.store.data_folder import lock_folder
from everlong.server.store.log import (
    DamagedError,
    Event,
    Id,
    Receipt,
    Stored,
)
from everlong.server.store.seen import Seen
from everlong.server.store.service_file import (
    ABOUT,
    About,
    StoredModel,
    read_about,
    write_about,
)
from everlong.server.store.sqlite_log import make_folder
from everlong.server.store.state_table import StateTable
from everlong.server.store.watermark import Watermark

log = logging.getLogger(__name__)


class Placed(NamedTuple):
    """What became of an event, and in which shard."""

    shard: int
    receipt: Receipt


class UserInfo(NamedTuple):
    """What is known of a user."""

    shard: int
    watermark: Watermark
    state_bytes: int


class LiveModel(NamedTuple):
    """A model and its states, one table a shard."""

    served_model: ServedModel
    tables: list[StateTable]


class Service:
    """Events in, recommendations out.

    Args:
        folder: where everything is kept; made where there is nothing.
        served_model: the model that is asked for. If it was asked for the last time too, and
            another one has been switched to since, that one goes on: a restart does not undo a
            switch.
        shards: of a new folder; one that is there keeps its number.
        capacity: most events that wait in a shard.

    Raises:
        DamagedError: if what is in the folder is not what was written.
        OSError: if it cannot be opened, or another process serves it.
    """

    def __init__(
        self, folder: Path, served_model: ServedModel, *, shards: int = 1, capacity: int = 10_000
    ) -> None:
        self.folder = folder
        make_folder(folder)
        self._lock = lock_folder(folder)
        self.shards: list[Shard] = []
        self.seen = Seen(lambda user_id: self._shard(user_id).log)
        # one model at a time; and, for a moment, what service.json says
        self._switching, self._settling = threading.Lock(), threading.Lock()
        self.draining = False
        self.damage: str | None = None
        try:
            known = read_about(folder)
            about = known or About(shards)
            for number in range(about.shards):
                path = folder / f"shard-{number:04d}.sqlite"
                self.shards.append(
                    Shard.open(
                        path, new=known is None, capacity=capacity, on_erase=self.seen.forget
                    )
                )
            if known is None:
                self._check_empty()
            self._asked, self.hidden = served_model.name, list[Id](about.hidden)
            self._live_model, self._previous = self._started(served_model, about)
            self._settle(self._live_model, self._previous, self.hidden)
            names = {one.served_model.name for one in (self._live_model, self._previous) if one}
            for shard in self.shards:
                shard.keep_records_of(names)
            self.reader = Reader(self._live_states, self.seen)
        except BaseException:
            for shard in self.shards:
                shard.close()
            self._lock.close()
            raise

    def _check_empty(self) -> None:
        """Without service.json there may be no events: the shard of a user would be unknown."""
        files = len(list(self.folder.glob("shard-*.sqlite")))
        if files > len(self.shards) or any(shard.log.total.last for shard in self.shards):
            raise DamagedError(f"{self.folder} has logs but no {ABOUT}; restore it from a copy")

    def _started(
        self, served_model: ServedModel, about: About
    ) -> tuple[LiveModel, LiveModel | None]:
        """What is live and what was before, with their states."""
        live, before = about.live, about.previous
        if live and about.asked == served_model.name and live.digest != served_model.name:
            found = _stored(live)
            if found is None:
                raise ValueError(
                    f"the live model was read from {live.folder}, which does not hold it now: "
                    "put it back, or ask for another model"
                )
            served_model = found
        elif live and live.digest != served_model.name:
            before = live
        live_model = self._bring_up(served_model)
        if before and before.digest != served_model.name and (found := _stored(before)):
            return live_model, self._bring_up(found)
        return live_model, None

    def trouble(self) -> str | None:
        """Why requests should not come; None while they may."""
        if self.draining:
            return "the service is ending"
        if self.damage is not None:
            return self.damage
        if not all(shard.writable for shard in self.shards):
            return "events cannot be written"
        if not (self.reader.alive and all(shard.alive for shard in self.shards)):
            return "a thread has ended; start the service again"
        return None

    @property
    def live(self) -> ServedModel:
        """The model that answers."""
        return self._live_model.served_model

    @property
    def previous(self) -> ServedModel | None:
        """The model that was live before, to which ``roll_back`` goes."""
        return None if self._previous is None else self._previous.served_model

    def close(self) -> None:
        """Answers what waits, writes all states, and stops; a second time nothing is left to do."""
        self.draining = True
        self.reader.close()
        for shard in self.shards:
            shard.close()
        self._lock.close()

    # events

    def ingest(self, events: Sequence[Event]) -> list[Future[list[Receipt]]]:
        """Queues events; futures hold receipts by shard, in the order of ``by_shard``.

        Raises:
            FullError: if a shard has no room; events of other shards may have been queued.
        """
        return [self.shards[number].submit(some) for number, some in self.by_shard(events).items()]

    def by_shard(self, events: Sequence[Event]) -> dict[int, list[Event]]:
        """Events by the shard of their users."""
        found: dict[int, list[Event]] = {}
        for event in events:
            found.setdefault(self.shard_of(event.user_id), []).append(event)
        return found

    def shard_of(self, user_id: Id) -> int:
        """The number of a user's shard."""
        if len(self.shards) == 1:
            return 0
        digest = hashlib.blake2b(repr(user_id).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % len(self.shards)

    def _shard(self, user_id: Id) -> Shard:
        return self.shards[self.shard_of(user_id)]

    def erase(self, user_id: Id) -> Future[int]:
        """Erases a user everywhere; the future holds how many events there were."""
        return self._shard(user_id).erase(user_id)

    # answers

    def recommend(
        self, user_id: Id, wanted: Wanted, *, filter_seen: bool | None = None
    ) -> Future[Listed]:
        """The best items for a user.

        Args:
            user_id: the user.
            wanted: what the list is to hold.
            filter_seen: whether items that the user has seen are left out; None for what the
                protocol of the live model says.

        Raises:
            FullError: if too many requests wait.
        """
        return self.reader.submit(user_id, wanted, filter_seen=filter_seen)

    def rank(self, user_id: Id, candidates: Sequence[Id], at: int | None = None) -> Listed:
        """Candidates in order for a user."""
        served_model, state = self._live_states([user_id])
        return served_model.rank(state, candidates, at)

    def info(self, user_id: Id) -> UserInfo | None:
        """The watermark and the state size of a user; None for an unknown user."""
        number = self.shard_of(user_id)
        table = self._live_model.tables[number]
        if not table.complete and user_id not in table:
            self.shards[number].warm([user_id])
        watermark = table.watermark(user_id)
        if watermark is None:
            return None
        return UserInfo(number, watermark, table.bytes_per_user)

    def knows(self, user_id: Id) -> bool:
        """Whether a user has a state."""
        return user_id in self._live_model.tables[self.shard_of(user_id)]

    def history(self, user_id: Id, count: int) -> list[Stored]:
        """The last events of a user, newest first."""
        with closing(self._shard(user_id).log.reader()) as log:
            return log.last_of_user(user_id, count)

    def offset_of(self, user_id: Id) -> int:
        """Every event of a user's shard up to here is in the live states."""
        return self._live_model.tables[self.shard_of(user_id)].offset

    @property
    def bytes_per_user(self) -> int:
        """State and watermark in the live model."""
        return self._live_model.tables[0].bytes_per_user

    @property
    def num_users(self) -> int:
        """Users with a state."""
        return sum(len(table) for table in self._live_model.tables)

    def _live_states(self, user_ids: Sequence[Id]) -> tuple[ServedModel, State]:
        """The live model and the states of users in it."""
        live, tables = self._live_model
        owners = [self.shard_of(user_id) for user_id in user_ids]
        parts, places = [], []
        for number in sorted(set(owners)):
            mine = [place for place, owner in enumerate(owners) if owner == number]
            names, table = [user_ids[place] for place in mine], tables[number]
            if not table.complete and (cold := [name for name in names if name not in table]):
                self.shards[number].warm(cold)
            parts.append(table.read(names))
            places += mine
        if len(parts) == 1:
            return live, parts[0]
        back = torch.tensor(places).argsort()
        return live, states.take(states.concat(parts), back)

    # models

    def switch(self, served_model: ServedModel, *, since: int | None = None) -> None:
        """Builds the states of another model from the log while serving, then makes it live.

        The model that was live is kept up to date, so that ``roll_back`` is as quick.

        Args:
            served_model: the model.
            since: users without an event at or after this time are left out at first: each of
                their states is built at the first request for it.
        """
        with self._switching:
            self._check_kinds(served_model)
            live, previous = self._live_model, self._previous
            if served_model.name == live.served_model.name:
                served_model.retriever = live.served_model.retriever
                self._settle(live._replace(served_model=served_model), previous, None)
                return
            if previous is not None and previous.served_model.name == served_model.name:
                served_model.retriever = previous.served_model.retriever
                self._settle(previous._replace(served_model=served_model), live, None)
                return
            if previous is not None:
                self._settle(live, None, None)
                for shard, table in zip(self.shards, previous.tables, strict=True):
                    shard.drop(table)
            self._settle(self._bring_up(served_model, since), live, None)

    def roll_back(self) -> ServedModel:
        """Makes the model live again that was live before the last switch.

        Raises:
            ValueError: if there is none.
        """
        with self._switching:
            if self._previous is None:
                raise ValueError(
                    "expected a model that was live before, received none; switch once"
                )
            self._settle(self._previous, self._live_model, None)
            return self.live

    def hide(self, item_ids: Sequence[Id]) -> None:
        """Keeps items out of every list of every model, from now on and after a restart."""
        self._settle(None, None, list(dict.fromkeys(item_ids)))

    def _settle(
        self, live: LiveModel | None, previous: LiveModel | None, hidden: list[Id] | None
    ) -> None:
        """Changes what is live, or what is hidden, on the disk first: what fails has not happened.

        Args:
            live: with ``previous``; None to leave both.
            previous: what is rolled back to.
            hidden: None to leave it.

        Raises:
            OSError: if it cannot be written.
        """
        with self._settling:
            if live is None:
                live, previous = self._live_model, self._previous
            hidden = self.hidden if hidden is None else hidden
            self._write_about(live, previous, hidden)
            for live_model in (live, previous):
                if live_model is not None:
                    live_model.served_model.hide(hidden)
            self._live_model, self._previous, self.hidden = live, previous, hidden

    def _bring_up(self, served_model: ServedModel, since: int | None = None) -> LiveModel:
        self._check_kinds(served_model)
        tables = [served_model.table() for _ in self.shards]
        try:
            for shard, table in zip(self.shards, tables, strict=True):
                shard.bring_up(table, since=since)
        except BaseException:
            for shard, table in zip(self.shards, tables, strict=True):
                shard.drop(table)
            raise
        served_model.prepare(tables[0].read(tables[0].some_users(QUERIES)))
        served_model.warm_up()
        return LiveModel(served_model, tables)

    def _check_kinds(self, served_model: ServedModel) -> None:
        """Refuses a model whose ids are of another type than those of the log."""
        expected = (served_model.user_type, served_model.item_type)
        for shard in self.shards:
            with closing(shard.log.reader()) as log:
                events = log.after(0, 1)
            for found in events:
                received = (type(found.user_id), type(found.item_id))
                if received != expected:
                    raise ValueError(
                        f"the log has ids of users and items of types {_names(received)}, the "
                        f"model of types {_names(expected)}; fit it on such a log"
                    )

    def _write_about(self, live: LiveModel, previous: LiveModel | None, hidden: list[Id]) -> None:
        if self._lock.closed:
            raise OSError("the service has ended; another process may have its folder")
        about = About(
            len(self.shards),
            self._asked,
            _named(live.served_model),
            None if previous is None else _named(previous.served_model),
            hidden,
        )
        write_about(self.folder, about)


def _names(kinds: Sequence[type[Any]]) -> str:
    return " and ".join(kind.__name__ for kind in kinds)


def _named(served_model: ServedModel) -> StoredModel:
    return StoredModel(str(served_model.folder), served_model.name)


def _stored(model: StoredModel) -> ServedModel | None:
    """A model that was served before; None if its folder does not hold it any more."""
    try:
        found = ServedModel.read(model.folder)
    # a folder may hold anything
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        log.warning("the model in %s cannot be served again: %s", model.folder, error)
        return None
    if found.name != model.digest:
        log.warning("%s holds another model than was served from it", model.folder)
        return None
    return found
