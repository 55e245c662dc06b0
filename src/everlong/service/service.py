"""The service without its protocol: shards, the models in them, and what can be asked of them.

data folder/
    service.json          shards, and which model is live; replaced as a whole
    shard-0000.sqlite     events and states of some of the users
    ...
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

import torch

from everlong import state as states
from everlong.atomic import write_bytes
from everlong.service.arena import Arena, Standing
from everlong.service.deployment import Deployment, Listed, Wanted
from everlong.service.log import DamagedError, Event, EventLog, Id, Receipt, Stored
from everlong.service.reader import Reader
from everlong.service.shard import Shard
from everlong.state import State

log = logging.getLogger(__name__)

ABOUT, VERSION = "service.json", 1


class Placed(NamedTuple):
    """What became of an event, and in which shard."""

    shard: int
    receipt: Receipt


class UserInfo(NamedTuple):
    """What is known of a user."""

    shard: int
    standing: Standing
    state_bytes: int


class Service:
    """Events in, recommendations out.

    Args:
        folder: where everything is kept; made where there is nothing.
        deployment: the model that answers.
        shards: of a new folder; one that is there keeps its number.
        capacity: most events that wait in a shard.

    Raises:
        DamagedError: if what is in the folder is not what was written.
        OSError: if it cannot be opened.
    """

    def __init__(
        self, folder: Path, deployment: Deployment, *, shards: int = 1, capacity: int = 10_000
    ) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        about = self._about() or {"version": VERSION, "shards": shards}
        self.shards = [
            Shard(folder / f"shard-{number:04d}.sqlite", capacity=capacity)
            for number in range(about["shards"])
        ]
        self._switching = threading.Lock()
        self._arenas: dict[str, list[Arena]] = {}
        self.live = deployment
        self.previous: Deployment | None = None
        try:
            self._bring_up(deployment)
            self._write_about()
            self.reader = Reader(self._live_states, lambda user: self._shard(user).log.path)
        except BaseException:
            for shard in self.shards:
                shard.close()
            raise

    def close(self) -> None:
        """Answers what waits, writes all states, and stops."""
        self.reader.close()
        for shard in self.shards:
            shard.close()

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
        arena = self._arenas[self.live.name][number]
        standing = arena.standing(user_id)
        if standing is None:
            return None
        return UserInfo(number, standing, arena.bytes_per_user)

    def history(self, user_id: Id, count: int) -> list[Stored]:
        """The last events of a user, newest first."""
        log = EventLog(self._shard(user_id).log.path)
        try:
            return log.of_user(user_id)[: -count - 1 : -1]
        finally:
            log.close()

    def offset_of(self, user_id: Id) -> int:
        """Every event of a user's shard up to here is in the live states."""
        return self._arenas[self.live.name][self.shard_of(user_id)].offset

    @property
    def bytes_per_user(self) -> int:
        """State and standing in the live model."""
        return self._arenas[self.live.name][0].bytes_per_user

    @property
    def num_users(self) -> int:
        """Users with a state."""
        return sum(len(arena) for arena in self._arenas[self.live.name])

    def _live_states(self, user_ids: Sequence[Id]) -> tuple[Deployment, State]:
        # one look at what is live: the model and its states are of one another
        live = self.live
        arenas = self._arenas[live.name]
        owners = [self.shard_of(user_id) for user_id in user_ids]
        if len(set(owners)) == 1:
            return live, arenas[owners[0]].read(user_ids)
        parts, places = [], []
        for number in sorted(set(owners)):
            mine = [place for place, owner in enumerate(owners) if owner == number]
            parts.append(arenas[number].read([user_ids[place] for place in mine]))
            places += mine
        back = torch.tensor(places).argsort()
        return live, states.take(states.concat(parts), back)

    # models

    def switch(self, deployment: Deployment) -> None:
        """Builds the states of another model from the log while serving, then makes it live.

        The model that was live is kept up to date, so that ``roll_back`` is as quick.
        """
        with self._switching:
            if deployment.name == self.live.name:
                self.live = deployment
                return
            if self.previous is not None and self.previous.name != deployment.name:
                self._let_go(self.previous)
            if deployment.name not in self._arenas:
                self._bring_up(deployment)
            self.live, self.previous = deployment, self.live
            self._write_about()

    def roll_back(self) -> Deployment:
        """Makes the model live again that was live before the last switch.

        Raises:
            ValueError: if there is none.
        """
        with self._switching:
            if self.previous is None:
                raise ValueError(
                    "expected a model that was live before, received none; switch once"
                )
            self.live, self.previous = self.previous, self.live
            self._write_about()
            return self.live

    def _bring_up(self, deployment: Deployment) -> None:
        arenas = [deployment.arena() for _ in self.shards]
        for shard, arena in zip(self.shards, arenas, strict=True):
            shard.restore(arena).result()
            shard.catch_up(arena)
            shard.add(arena).result()
        self._arenas[deployment.name] = arenas

    def _let_go(self, deployment: Deployment) -> None:
        for shard, arena in zip(self.shards, self._arenas.pop(deployment.name), strict=True):
            shard.drop(arena).result()

    # what is where

    def _about(self) -> Mapping[str, Any] | None:
        path = self.folder / ABOUT
        if not path.is_file():
            return None
        try:
            about: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if about["version"] != VERSION or not about["shards"] >= 1:
                raise ValueError(f"version {about['version']}, {about['shards']} shards")
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(
                f"{path} is not what was written: {error}; restore it from a copy"
            ) from error
        return about

    def _write_about(self) -> None:
        about = {
            "version": VERSION,
            "shards": len(self.shards),
            "model": str(self.live.folder),
            "digest": self.live.name,
            "previous": None if self.previous is None else str(self.previous.folder),
        }
        write_bytes(self.folder / ABOUT, (json.dumps(about, indent=2) + "\n").encode())
