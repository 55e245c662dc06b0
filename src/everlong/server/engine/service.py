"""The service without its protocol: shards, the models in them, and what can be asked of them.

data folder/
    service.json          shards, which model is live, items that are hidden; replaced as a whole
    service.lock          held by the process that serves
    shard-0000.sqlite     events and states of some of the users
    ...
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch

from everlong.models import state as states
from everlong.models.state import State
from everlong.server.engine.deployment import QUERIES, Deployment, Listed, Wanted
from everlong.server.engine.reader import Reader
from everlong.server.engine.shard import Shard
from everlong.server.store.arena import Arena
from everlong.server.store.log import (
    DamagedError,
    Event,
    Id,
    LogReader,
    Receipt,
    Stored,
    make_folder,
)
from everlong.server.store.seen import Seen
from everlong.server.store.standing import Standing
from everlong.system.atomic import write_bytes

log = logging.getLogger(__name__)

ABOUT, LOCK, VERSION = "service.json", "service.lock", 1


class Placed(NamedTuple):
    """What became of an event, and in which shard."""

    shard: int
    receipt: Receipt


class UserInfo(NamedTuple):
    """What is known of a user."""

    shard: int
    standing: Standing
    state_bytes: int


class Served(NamedTuple):
    """A model and its states, one arena a shard."""

    deployment: Deployment
    arenas: list[Arena]


class Service:
    """Events in, recommendations out.

    Args:
        folder: where everything is kept; made where there is nothing.
        deployment: the model that is asked for. If it was asked for the last time too, and another
            one has been switched to since, that one goes on: a restart does not undo a switch.
        shards: of a new folder; one that is there keeps its number.
        capacity: most events that wait in a shard.

    Raises:
        DamagedError: if what is in the folder is not what was written.
        OSError: if it cannot be opened, or another process serves it.
    """

    def __init__(
        self, folder: Path, deployment: Deployment, *, shards: int = 1, capacity: int = 10_000
    ) -> None:
        self.folder = folder
        make_folder(folder)
        self._lock = _locked(folder / LOCK)
        self.shards: list[Shard] = []
        self.seen = Seen(lambda user_id: self._shard(user_id).log.path)
        # one model at a time; and, for a moment, what service.json says
        self._switching, self._settling = threading.Lock(), threading.Lock()
        self.draining = False
        self.damage: str | None = None
        try:
            known = self._about()
            about = known or {"shards": shards}
            for number in range(about["shards"]):
                path = folder / f"shard-{number:04d}.sqlite"
                self.shards.append(
                    Shard(path, new=known is None, capacity=capacity, on_erase=self.seen.forget)
                )
            if known is None:
                self._check_empty()
            self._asked, self.hidden = deployment.name, list[Id](about.get("hidden", ()))
            self._served, self._previous = self._started(deployment, about)
            self._settle(self._served, self._previous, self.hidden)
            names = {one.deployment.name for one in (self._served, self._previous) if one}
            for shard in self.shards:
                shard.keep_records_of(names)
            self.reader = Reader(self._live_states, self.seen)
        except BaseException:
            for shard in self.shards:
                shard.close()
            self._lock.close()
            raise

    def _check_empty(self) -> None:
        """Without service.json there are no events: nobody would know which shard has whom."""
        files = len(list(self.folder.glob("shard-*.sqlite")))
        if files > len(self.shards) or any(shard.log.total.last for shard in self.shards):
            raise DamagedError(f"{self.folder} has logs but no {ABOUT}; restore it from a copy")

    def _started(
        self, deployment: Deployment, about: Mapping[str, Any]
    ) -> tuple[Served, Served | None]:
        """What is live and what was before, with their states."""
        live, before = about.get("live"), about.get("previous")
        if live and about["asked"] == deployment.name and live["digest"] != deployment.name:
            found = _stored(live)
            if found is None:
                raise ValueError(
                    f"the live model was read from {live['folder']}, which does not hold it now: "
                    "put it back, or ask for another model"
                )
            deployment = found
        elif live and live["digest"] != deployment.name:
            before = live
        served = self._bring_up(deployment)
        if before and before["digest"] != deployment.name and (found := _stored(before)):
            return served, self._bring_up(found)
        return served, None

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
    def live(self) -> Deployment:
        """The model that answers."""
        return self._served.deployment

    @property
    def previous(self) -> Deployment | None:
        """The model that was live before, to which ``roll_back`` goes."""
        return None if self._previous is None else self._previous.deployment

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

    def recommend(self, user_id: Id, wanted: Wanted, *, filter_seen: bool = True) -> Future[Listed]:
        """The best items for a user.

        Raises:
            FullError: if too many requests wait.
        """
        return self.reader.submit(user_id, wanted, filter_seen=filter_seen)

    def rank(self, user_id: Id, candidates: Sequence[Id], at: int | None = None) -> Listed:
        """Candidates in order for a user."""
        deployment, state = self._live_states([user_id])
        return deployment.rank(state, candidates, at)

    def info(self, user_id: Id) -> UserInfo | None:
        """What is known of a user; None of one who is not known."""
        number = self.shard_of(user_id)
        arena = self._served.arenas[number]
        if not arena.complete and user_id not in arena:
            self.shards[number].warm([user_id])
        standing = arena.standing(user_id)
        if standing is None:
            return None
        return UserInfo(number, standing, arena.bytes_per_user)

    def knows(self, user_id: Id) -> bool:
        """Whether a user has a state."""
        return user_id in self._served.arenas[self.shard_of(user_id)]

    def history(self, user_id: Id, count: int) -> list[Stored]:
        """The last events of a user, newest first."""
        with closing(LogReader(self._shard(user_id).log.path)) as log:
            return log.last_of_user(user_id, count)

    def offset_of(self, user_id: Id) -> int:
        """Every event of a user's shard up to here is in the live states."""
        return self._served.arenas[self.shard_of(user_id)].offset

    @property
    def bytes_per_user(self) -> int:
        """State and standing in the live model."""
        return self._served.arenas[0].bytes_per_user

    @property
    def num_users(self) -> int:
        """Users with a state."""
        return sum(len(arena) for arena in self._served.arenas)

    def _live_states(self, user_ids: Sequence[Id]) -> tuple[Deployment, State]:
        """The live model and the states of users in it."""
        live, arenas = self._served
        owners = [self.shard_of(user_id) for user_id in user_ids]
        parts, places = [], []
        for number in sorted(set(owners)):
            mine = [place for place, owner in enumerate(owners) if owner == number]
            names, arena = [user_ids[place] for place in mine], arenas[number]
            if not arena.complete and (cold := [name for name in names if name not in arena]):
                self.shards[number].warm(cold)
            parts.append(arena.read(names))
            places += mine
        if len(parts) == 1:
            return live, parts[0]
        back = torch.tensor(places).argsort()
        return live, states.take(states.concat(parts), back)

    # models

    def switch(self, deployment: Deployment, *, since: int | None = None) -> None:
        """Builds the states of another model from the log while serving, then makes it live.

        The model that was live is kept up to date, so that ``roll_back`` is as quick.

        Args:
            deployment: the model.
            since: users without an event at or after this time are left out at first: each of
                their states is built when somebody asks for it.
        """
        with self._switching:
            self._check_kinds(deployment)
            live, previous = self._served, self._previous
            if deployment.name == live.deployment.name:
                deployment.catalogue = live.deployment.catalogue
                self._settle(live._replace(deployment=deployment), previous, None)
                return
            if previous is not None and previous.deployment.name == deployment.name:
                deployment.catalogue = previous.deployment.catalogue
                self._settle(previous._replace(deployment=deployment), live, None)
                return
            if previous is not None:
                self._settle(live, None, None)
                for shard, arena in zip(self.shards, previous.arenas, strict=True):
                    shard.drop(arena)
            self._settle(self._bring_up(deployment, since), live, None)

    def roll_back(self) -> Deployment:
        """Makes the model live again that was live before the last switch.

        Raises:
            ValueError: if there is none.
        """
        with self._switching:
            if self._previous is None:
                raise ValueError(
                    "expected a model that was live before, received none; switch once"
                )
            self._settle(self._previous, self._served, None)
            return self.live

    def hide(self, item_ids: Sequence[Id]) -> None:
        """Keeps items out of every list of every model, from now on and after a restart."""
        self._settle(None, None, list(dict.fromkeys(item_ids)))

    def _settle(
        self, live: Served | None, previous: Served | None, hidden: list[Id] | None
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
                live, previous = self._served, self._previous
            hidden = self.hidden if hidden is None else hidden
            self._write_about(live, previous, hidden)
            for served in (live, previous):
                if served is not None:
                    served.deployment.hide(hidden)
            self._served, self._previous, self.hidden = live, previous, hidden

    def _bring_up(self, deployment: Deployment, since: int | None = None) -> Served:
        self._check_kinds(deployment)
        arenas = [deployment.arena() for _ in self.shards]
        try:
            for shard, arena in zip(self.shards, arenas, strict=True):
                shard.bring_up(arena, since=since)
        except BaseException:
            for shard, arena in zip(self.shards, arenas, strict=True):
                shard.drop(arena)
            raise
        deployment.prepare(arenas[0].read(arenas[0].some_users(QUERIES)))
        deployment.warm_up()
        return Served(deployment, arenas)

    def _check_kinds(self, deployment: Deployment) -> None:
        """Refuses a model whose ids are of another type than those of the log."""
        expected = (deployment.user_type, deployment.item_type)
        for shard in self.shards:
            with closing(LogReader(shard.log.path)) as log:
                events = log.after(0, 1)
            for found in events:
                received = (type(found.user_id), type(found.item_id))
                if received != expected:
                    raise ValueError(
                        f"the log has ids of users and items of types {_names(received)}, the "
                        f"model of types {_names(expected)}; fit it on such a log"
                    )

    # what is where

    def _about(self) -> Mapping[str, Any] | None:
        path = self.folder / ABOUT
        if not path.is_file():
            return None
        try:
            about: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if about["version"] != VERSION or not about["shards"] >= 1:
                raise ValueError(f"version {about['version']}, {about['shards']} shards")
            for model in (about["live"], about["previous"]):
                if model is not None and not {"folder", "digest"} <= model.keys():
                    raise ValueError(f"a model with {sorted(model)}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(
                f"{path} is not what was written: {error}; restore it from a copy"
            ) from error
        return about

    def _write_about(self, live: Served, previous: Served | None, hidden: list[Id]) -> None:
        if self._lock.closed:
            raise OSError("the service has ended; another process may have its folder")
        about = {
            "version": VERSION,
            "shards": len(self.shards),
            "asked": self._asked,
            "live": _named(live.deployment),
            "previous": None if previous is None else _named(previous.deployment),
            "hidden": hidden,
        }
        write_bytes(self.folder / ABOUT, (json.dumps(about, indent=2) + "\n").encode())


def _names(kinds: Sequence[type[Any]]) -> str:
    return " and ".join(kind.__name__ for kind in kinds)


def _named(deployment: Deployment) -> Mapping[str, str]:
    return {"folder": str(deployment.folder), "digest": deployment.name}


def _stored(model: Mapping[str, str]) -> Deployment | None:
    """A model that was served before; None if its folder does not hold it any more."""
    try:
        found = Deployment.read(model["folder"])
    # a folder may hold anything
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        log.warning("the model in %s cannot be served again: %s", model["folder"], error)
        return None
    if found.name != model["digest"]:
        log.warning("%s holds another model than was served from it", model["folder"])
        return None
    return found


def _locked(path: Path) -> Any:
    """A file that only one process holds at a time; the system lets it go if that dies."""
    file = path.open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise OSError(f"{path.parent} is in use by another process; stop that first") from error
    return file
