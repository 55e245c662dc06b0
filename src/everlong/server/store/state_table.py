"""The states of a shard's users in memory: what requests are answered from.

A cache of the log. Of each user it says up to which event the state goes and what the events before
came to, so that an event is applied once, in order, whatever is delivered again after a crash.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from everlong.data.ids import IdMap
from everlong.models import state as states
from everlong.models.state import State
from everlong.models.user_model import UserModel
from everlong.server.store.decoded_events import DecodedEvents
from everlong.server.store.log import DamagedError, Id, Slice
from everlong.server.store.room import machine_memory, room, room_like
from everlong.server.store.watermark import WATERMARK, Watermark, note

MAGIC = b"elst"
HEADER = struct.Struct("<4sI16sqqQQq")
"""Magic, version and model; then the watermark: last offset, events, chain, sum, newest time."""

RECORD_VERSION = 1

EVENTS_AT_ONCE = 4_096
"""So many are read by one product: what it needs stays in the caches of a core."""


class Applied(NamedTuple):
    """What became of events that were read into states."""

    events: int = 0
    """Events that changed what is known of a user, also those of unknown items."""
    repeated: int = 0
    """Events that a state had already."""
    unread: int = 0
    """Events of items that the model does not know, or without the fields that it reads: they are
    counted, and in no state."""
    late: int = 0
    """Events older than one that was read before."""

    def plus(self, *others: Applied) -> Applied:
        """All together."""
        return Applied(*map(sum, zip(self, *others, strict=True)))


class StateTable:
    """States of one model.

    Args:
        model: it is put into evaluation mode.
        item_ids: its catalogue.
        digest: 16 bytes that stand for what its states depend on.
    """

    def __init__(self, model: UserModel, item_ids: IdMap, digest: bytes) -> None:
        self.model, self.item_ids, self.digest = model.eval(), item_ids, digest
        self.name = digest.hex()
        self.offset = 0
        """Every event of the log up to here is in the states; kept by whoever applies them."""
        self.complete = True
        """Whether every user of the log is here; else some are built when they are asked for."""
        with torch.no_grad():
            self._initial = states.detach(model.initial_state(1))
        self._spec = states.spec(self._initial)
        self._rows: dict[Id, int] = {}
        self._free: list[int] = []
        self._ids: list[Id | None] = []
        self.capacity = machine_memory() // self.bytes_per_user
        """Most users; more would not fit into the memory of the machine."""
        self._states = type(self._initial)(
            *(room_like(value, self.capacity) for value in self._initial)
        )
        self._watermarks = room(self.capacity, WATERMARK)
        self._dirty = room(self.capacity, np.dtype(np.bool_))
        # a reader must not see a state half of which is of before
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, user_id: Id) -> bool:
        # a user whose state is being built has a row, but is not there yet
        row = self._rows.get(user_id)
        return row is not None and bool(self._watermarks[row]["events"])

    @property
    def num_events(self) -> int:
        """Events that were applied, of all users."""
        return int(self._watermarks["events"][: len(self._ids)].sum())

    @property
    def bytes_per_user(self) -> int:
        """State and watermark."""
        return states.bytes_per_user(self._initial) + WATERMARK.itemsize + 1

    def some_users(self, count: int) -> list[Id]:
        """Users, at most so many."""
        return [user_id for user_id in self._ids[:count] if user_id is not None]

    def watermark(self, user_id: Id) -> Watermark | None:
        """How far the state of a user goes; None of one who is not known."""
        # a row may be given to somebody else, and a watermark be moved, in between
        with self._lock:
            row = self._rows.get(user_id)
            return None if row is None else Watermark(*self._watermarks[row].item())

    def read(self, user_ids: Sequence[Id]) -> State:
        """The states of users; of those who are not known the initial one."""
        with self._lock:
            rows = [self._rows.get(user_id, -1) for user_id in user_ids]
            if min(rows, default=-1) >= 0:
                return states.take(self._states, torch.tensor(rows))
            known = [place for place, row in enumerate(rows) if row >= 0]
            mine = states.take(self._states, torch.tensor([row for row in rows if row >= 0]).long())
        found = states.take(self._initial, torch.zeros(len(rows), dtype=torch.int64))
        return states.put(found, torch.tensor(known).long(), mine)

    # events

    def decoded(self, events: Slice) -> DecodedEvents:
        """Events as the model reads them."""
        return DecodedEvents.of(events, self.item_ids.row_of, self.model.field_codes)

    def apply(self, events: Slice) -> Applied:
        """Reads events, in the order of their offsets, into the states of their users.

        An event whose offset a state has passed already is left out.
        """
        rows = self._add(events.user_ids)
        columns = self.decoded(events)
        fresh = np.flatnonzero(columns.offsets > self._watermarks["offset"][rows])
        order = fresh[np.argsort(rows[fresh], kind="stable")]
        rows, columns, late = rows[order], columns.at(order), 0
        for start in range(0, order.size, EVENTS_AT_ONCE):
            part = slice(start, start + EVENTS_AT_ONCE)
            new = self._advanced(rows[part], columns.at(part))
            with self._lock:
                self._write(*new)
                late += self._note(rows[part], columns.at(part))
        unread = int((columns.items < 0).sum())
        return Applied(order.size, len(events.offsets) - order.size, unread, late)

    def rebuild(self, user_ids: Sequence[Id], owner: np.ndarray, columns: DecodedEvents) -> Applied:
        """Reads whole histories in the order of their times, as in training; users begin anew.

        So an event that came late takes its place in time.

        Args:
            user_ids: who they are.
            owner: ``[n]`` whose each event is, an index into ``user_ids``.
            columns: ``n`` events in the order of their offsets.
        """
        for user_id in user_ids:
            self.forget(user_id)
        rows = self._add(user_ids)[owner]
        # stable: events of one time stay in the order of their arrival
        order = np.lexsort((columns.times, rows))
        try:
            for start in range(0, order.size, EVENTS_AT_ONCE):
                part = order[start : start + EVENTS_AT_ONCE]
                new = self._advanced(rows[part], columns.at(part))
                with self._lock:
                    self._write(*new)
            with self._lock:
                late = self._note(rows, columns)
        except BaseException:
            # a state without its watermark would read its events again
            for user_id in user_ids:
                self.forget(user_id)
            raise
        return Applied(order.size, 0, int((columns.items < 0).sum()), late)

    def _advanced(
        self, rows: np.ndarray, columns: DecodedEvents
    ) -> tuple[np.ndarray, State | None]:
        """Who read something, and their states; events lie user by user."""
        known = columns.items >= 0
        mine = rows[known]
        if mine.size == 0:
            return mine, None
        # where the next user begins
        inner = np.flatnonzero(mine[1:] != mine[:-1]) + 1
        cuts = np.concatenate([[0], inner, [mine.size]])
        touched, lengths = mine[cuts[:-1]], cuts[1:] - cuts[:-1]
        batch = columns.at(known).batch(lengths, self.model.event_fields)
        before = states.take(self._states, torch.from_numpy(touched))
        read = self.model.step if touched.size == mine.size else self.model.final_state
        with torch.no_grad():
            return touched, read(batch, before)

    def _note(self, rows: np.ndarray, columns: DecodedEvents) -> int:
        """Moves the watermark of users past events; returns how many of these were late."""
        self._dirty[rows] = True
        late: int = note(self._watermarks, rows, columns.offsets, columns.numbers, columns.times)
        return late

    def _add(self, user_ids: Sequence[Id]) -> np.ndarray:
        """The row of each user; those who are new get one, with the initial state."""
        new = [user_id for user_id in dict.fromkeys(user_ids) if user_id not in self._rows]
        if new:
            self._place(new)
        return np.array([self._rows[user_id] for user_id in user_ids], dtype=np.int64)

    def _place(self, new: Sequence[Id]) -> None:
        if len(self._rows) + len(new) > self.capacity:
            raise MemoryError(
                f"the states of {self.capacity:,} users of {self.bytes_per_user:,} bytes fit into "
                "the memory of this machine, there are more; use another machine for some shards"
            )
        reused = [self._free.pop() for _ in range(min(len(new), len(self._free)))]
        first = len(self._ids)
        rows = [*reused, *range(first, first + len(new) - len(reused))]
        with self._lock:
            where = torch.tensor(rows)
            for stored, value in zip(self._states, self._initial, strict=True):
                stored[where] = value[0]
        self._ids += [None] * (len(new) - len(reused))
        for user_id, row in zip(new, rows, strict=True):
            self._ids[row] = user_id
            self._rows[user_id] = row

    def _write(self, rows: np.ndarray, new: State | None) -> None:
        if new is None:
            return
        if states.spec(new) != self._spec:
            raise ValueError(
                f"a state keeps its spec: expected {self._spec}, received {states.spec(new)}"
            )
        where = torch.from_numpy(rows)
        for stored, value in zip(self._states, new, strict=True):
            stored.index_copy_(0, where, value)

    # records

    def dirty(self) -> np.ndarray:
        """Rows of users whose states changed since their records were taken."""
        return np.flatnonzero(self._dirty[: len(self._ids)])

    def records(self, rows: np.ndarray) -> list[tuple[Id, bytes]]:
        """Users and their records, which count as written from then on."""
        with self._lock:
            rows = rows[[self._ids[row] is not None for row in rows.tolist()]]
            ids = [self._ids[row] for row in rows.tolist()]
            stored = states.take(self._states, torch.from_numpy(rows))
            stands = [self._watermarks[row].item() for row in rows.tolist()]
            self._dirty[rows] = False
        if not ids:
            return []
        parts = [
            value.contiguous().numpy().reshape(len(rows), -1).view(np.uint8) for value in stored
        ]
        table = np.concatenate(parts, axis=1)
        return [
            (
                user_id,
                sealed(
                    HEADER.pack(MAGIC, RECORD_VERSION, self.digest, *stand) + body.tobytes(),
                    user_id,
                ),
            )
            for user_id, stand, body in zip(ids, stands, table, strict=True)
            if user_id is not None
        ]

    def not_written(self, user_ids: Iterable[Id]) -> None:
        """Says that records that were taken did not reach the disk."""
        for user_id in user_ids:
            row = self._rows.get(user_id)
            if row is not None:
                self._dirty[row] = True

    def load(self, records: Sequence[tuple[Id, bytes]]) -> list[Id]:
        """Takes states from records; returns the users whose record is not what was written.

        Those begin anew, at offset 0, and have to be brought up from their events.
        """
        size, spoiled, whole = states.bytes_per_user(self._initial), [], []
        for user_id, record in records:
            try:
                whole.append((user_id, opened(record, user_id, self.digest, size)))
            except DamagedError:
                spoiled.append(user_id)
        if whole:
            self._load([user_id for user_id, _ in whole], [body for _, body in whole])
        return spoiled

    def _load(self, ids: list[Id], bodies: list[bytes]) -> None:
        rows = self._add(ids)
        flat = np.frombuffer(b"".join(body[HEADER.size :] for body in bodies), dtype=np.uint8)
        table, fields, start = flat.reshape(len(ids), -1), [], 0
        for value in self._initial:
            kind = value.numpy().dtype
            width = value[0].numel() * kind.itemsize
            part = table[:, start : start + width].copy().view(kind)
            fields.append(torch.from_numpy(part.reshape(len(ids), *value.shape[1:])))
            start += width
        with self._lock:
            self._write(rows, type(self._initial)(*fields))
            for row, body in zip(rows.tolist(), bodies, strict=True):
                self._watermarks[row] = HEADER.unpack_from(body)[3:]

    def clear(self) -> None:
        """Forgets everybody."""
        for user_id in list(self._rows):
            self.forget(user_id)
        self.offset, self.complete = 0, True

    def forget(self, user_id: Id) -> None:
        """Overwrites what is known of a user; the place is free for another."""
        row = self._rows.get(user_id)
        if row is None:
            return
        with self._lock:
            del self._rows[user_id]
            self._ids[row] = None
            self._free.append(row)
            self._write(np.array([row]), self._initial)
            self._watermarks[row], self._dirty[row] = np.zeros((), dtype=WATERMARK), False


def sealed(body: bytes, user_id: Id) -> bytes:
    """A body with a checksum that says whose it is."""
    return body + _checksum(body, user_id)


def _checksum(body: bytes, user_id: Id) -> bytes:
    return hashlib.blake2b(repr(user_id).encode() + body, digest_size=16).digest()


def opened(record: bytes, user_id: Id, digest: bytes, size: int) -> bytes:
    """The body of a user's record of a model, with a state of so many bytes.

    Raises:
        DamagedError: if it is not what was written, of another user, or of another model.
    """
    body, checksum = record[:-16], record[-16:]
    if len(body) != HEADER.size + size:
        raise DamagedError(
            f"a state record has {HEADER.size + size} bytes before its checksum, received "
            f"{len(body)}; rebuild the state from the log"
        )
    if _checksum(body, user_id) != checksum:
        raise DamagedError("a state record is not what was written; rebuild the state from the log")
    magic, version, model, *_ = HEADER.unpack_from(body)
    if (magic, version, model) != (MAGIC, RECORD_VERSION, digest):
        raise DamagedError("a state record is of another model; rebuild the state from the log")
    return body
