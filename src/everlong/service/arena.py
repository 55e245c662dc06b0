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
import polars as pl
import torch

from everlong import state as states
from everlong.batch import Batch
from everlong.encode import serving
from everlong.ids import IdMap
from everlong.model import UserModel
from everlong.service.log import DamagedError, Id, Stored
from everlong.state import State

MAGIC = b"elst"
HEADER = struct.Struct("<4sI16sqqQQq")
"""Magic, version and model; then the standing: last offset, events, chain, sum, newest time."""

STANDING = np.dtype(
    [("offset", "<i8"), ("events", "<i8"), ("chain", "<u8"), ("sum", "<u8"), ("newest", "<i8")]
)

RECORD_VERSION = 1


class Applied(NamedTuple):
    """What became of events that were read into states."""

    events: int
    """Events that changed what is known of a user, also those of unknown items."""
    repeated: int
    """Events that a state had already."""
    unknown_items: int
    """Events of items that the model does not know: counted, and in no state."""
    late: int
    """Events older than one that was read before."""


class Standing(NamedTuple):
    """How far the state of a user goes."""

    offset: int
    """Of the newest event that was applied."""
    events: int
    chain: int
    """A hash of the ids of all events in their order."""
    sum: int
    """A hash of the ids of all events in any order."""
    newest: int
    """The time of the newest."""


class Arena:
    """States of one model.

    Args:
        model: in evaluation mode.
        item_ids: its catalogue.
        digest: 16 bytes that stand for what its states depend on.
    """

    def __init__(self, model: UserModel, item_ids: IdMap, digest: bytes) -> None:
        self.model, self.item_ids, self.digest = model, item_ids, digest
        self.name = digest.hex()
        self.offset = 0
        """Every event of the log up to here is in the states; kept by whoever applies them."""
        with serving(model):
            self._initial = states.detach(model.initial_state(1))
        self._rows: dict[Id, int] = {}
        self._free: list[int] = []
        self._ids: list[Id | None] = []
        self._states = states.take(self._initial, torch.zeros(0, dtype=torch.int64))
        self._standing = np.zeros(0, dtype=STANDING)
        self._dirty = np.zeros(0, dtype=np.bool_)
        # a reader must not see a state half of which is of before
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def bytes_per_user(self) -> int:
        """State and standing."""
        return states.bytes_per_user(self._initial) + STANDING.itemsize + 1

    def standing(self, user_id: Id) -> Standing | None:
        """How far the state of a user goes; None of one who is not known."""
        row = self._rows.get(user_id)
        return None if row is None else Standing(*self._standing[row].item())

    def read(self, user_ids: Sequence[Id]) -> State:
        """The states of users; of those who are not known the initial one."""
        rows = [self._rows.get(user_id) for user_id in user_ids]
        found = states.take(self._initial, torch.zeros(len(rows), dtype=torch.int64))
        known = [n for n, row in enumerate(rows) if row is not None]
        if not known:
            return found
        with self._lock:
            mine = states.take(self._states, torch.tensor([rows[n] for n in known]))
        return states.put(found, torch.tensor(known), mine)

    def apply(self, events: Sequence[Stored]) -> Applied:
        """Reads events, in the order of their offsets, into the states of their users.

        An event whose offset a state has passed already is left out.
        """
        if not events:
            return Applied(0, 0, 0, 0)
        rows = self._add([event.user_id for event in events])
        offsets = np.array([event.offset for event in events], dtype=np.int64)
        fresh = np.flatnonzero(offsets > self._standing["offset"][rows])
        order = fresh[np.argsort(rows[fresh], kind="stable")]
        if order.size == 0:
            return Applied(0, len(events), 0, 0)
        items = self.item_ids.rows(pl.Series([events[n].item_id for n in order]))
        times = np.array([events[n].time for n in order], dtype=np.int64)
        known = items >= 0
        new_states, touched = self._advanced(rows[order], items, times, known, events, order)
        with self._lock:
            if new_states is not None:
                self._write(touched, new_states)
            late = self._note([events[n] for n in order], rows[order])
        return Applied(len(order), len(events) - len(order), int((~known).sum()), late)

    def _advanced(
        self,
        rows: np.ndarray,
        items: np.ndarray,
        times: np.ndarray,
        known: np.ndarray,
        events: Sequence[Stored],
        order: np.ndarray,
    ) -> tuple[State | None, np.ndarray]:
        """The states of users ``[U]`` after the events of known items, and who they are."""
        touched, counts = np.unique(rows[known], return_counts=True)
        if touched.size == 0:
            return None, touched
        fields = {
            name: torch.tensor([events[n].fields[name] for n in order[known]])
            for name in self.model.event_fields
        }
        batch = Batch(
            items=torch.from_numpy(items[known]),
            times=torch.from_numpy(times[known]),
            offsets=torch.from_numpy(np.concatenate([[0], counts.cumsum()])),
            fields=fields,
        )
        before = states.take(self._states, torch.from_numpy(touched))
        with serving(self.model):
            return self.model.advance(batch, before), touched

    def _note(self, events: Iterable[Stored], rows: np.ndarray) -> int:
        """Moves the standing of users past events; returns how many of these were late."""
        late = 0
        for event, row in zip(events, rows.tolist(), strict=True):
            before = Standing(*self._standing[row].item())
            late += before.events > 0 and event.time < before.newest
            self._standing[row] = (
                event.offset,
                before.events + 1,
                chained(before.chain, event.event_key),
                added(before.sum, event.event_key),
                max(event.time, before.newest) if before.events else event.time,
            )
            self._dirty[row] = True
        return late

    def _add(self, user_ids: Sequence[Id]) -> np.ndarray:
        """The row of each user; those who are new get one."""
        for user_id in user_ids:
            if user_id not in self._rows:
                row = self._free.pop() if self._free else len(self._ids)
                if row == len(self._ids):
                    self._ids.append(None)
                    self._reserve(row + 1)
                self._ids[row] = user_id
                self._rows[user_id] = row
        return np.array([self._rows[user_id] for user_id in user_ids], dtype=np.int64)

    def _reserve(self, size: int) -> None:
        """Room for so many users; an eighth more, so that adding one at a time stays cheap."""
        have = self._dirty.size
        if size <= have:
            return
        more = max(size, have + have // 8 + 64) - have
        fresh = states.take(self._initial, torch.zeros(more, dtype=torch.int64))
        with self._lock:
            self._states = states.concat([self._states, fresh])
            self._standing = np.append(self._standing, np.zeros(more, dtype=STANDING))
            self._dirty = np.append(self._dirty, np.zeros(more, dtype=np.bool_))

    def _write(self, rows: np.ndarray, new: State) -> None:
        where = torch.from_numpy(rows)
        states.check_same(states.take(self._states, where), new)
        for stored, value in zip(self._states, new, strict=True):
            stored.index_copy_(0, where, value)

    # records

    def dirty(self) -> np.ndarray:
        """Rows of users whose states changed since their records were taken."""
        return np.flatnonzero(self._dirty)

    def records(self, rows: np.ndarray) -> list[tuple[Id, bytes]]:
        """Users and their records, which count as written from then on."""
        with self._lock:
            rows = rows[[self._ids[row] is not None for row in rows.tolist()]]
            ids = [self._ids[row] for row in rows.tolist()]
            self._dirty[rows] = False
            stored = states.take(self._states, torch.from_numpy(rows))
            stands = [self._standing[row].item() for row in rows.tolist()]
        if not ids:
            return []
        parts = [
            value.contiguous().numpy().reshape(len(rows), -1).view(np.uint8) for value in stored
        ]
        table = np.concatenate(parts, axis=1)
        return [
            (
                user_id,
                sealed(HEADER.pack(MAGIC, RECORD_VERSION, self.digest, *stand) + body.tobytes()),
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
                whole.append((user_id, opened(record, self.digest, size)))
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
            part = np.ascontiguousarray(table[:, start : start + width]).view(kind)
            fields.append(torch.from_numpy(part.reshape(len(ids), *value.shape[1:])))
            start += width
        with self._lock:
            self._write(rows, type(self._initial)(*fields))
            for row, body in zip(rows.tolist(), bodies, strict=True):
                self._standing[row] = HEADER.unpack_from(body)[3:]

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
            self._standing[row], self._dirty[row] = np.zeros((), dtype=STANDING), False


def chained(chain: int, key: bytes) -> int:
    """The hash of a sequence of event keys with one more at its end."""
    data = chain.to_bytes(8, "little") + key
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def added(total: int, key: bytes) -> int:
    """The hash of a set of event keys with one more."""
    return (total + int.from_bytes(key[:8], "little")) % (1 << 64)


def sealed(body: bytes) -> bytes:
    """A body with its checksum."""
    return body + hashlib.blake2b(body, digest_size=16).digest()


def opened(record: bytes, digest: bytes, size: int) -> bytes:
    """The body of a record of a model, with a state of so many bytes.

    Raises:
        DamagedError: if it is not what was written, or of another model.
    """
    body, checksum = record[:-16], record[-16:]
    if len(body) != HEADER.size + size:
        raise DamagedError(
            f"a state record has {HEADER.size + size} bytes before its checksum, received "
            f"{len(body)}; rebuild the state from the log"
        )
    if hashlib.blake2b(body, digest_size=16).digest() != checksum:
        raise DamagedError("a state record is not what was written; rebuild the state from the log")
    magic, version, model, *_ = HEADER.unpack_from(body)
    if (magic, version, model) != (MAGIC, RECORD_VERSION, digest):
        raise DamagedError("a state record is of another model; rebuild the state from the log")
    return body
