"""The states of a shard's users in memory: what requests are answered from.

A cache of the log. Of each user it says up to which event the state goes and what the events before
came to, so that an event is applied once, in order, whatever is delivered again after a crash.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from everlong.data.ids import IdMap
from everlong.inference.encode import read_batch
from everlong.models import state as states
from everlong.models.state import State
from everlong.models.user_model import UserModel
from everlong.server.store.decoded_events import DecodedEvents
from everlong.server.store.log import Id, Slice
from everlong.server.store.record import Record, pack_record, unpack_record
from everlong.server.store.state_blocks import StateBlocks
from everlong.server.store.state_codec import CODECS, StateCodec
from everlong.server.store.watermark import WATERMARK, Watermark, note
from everlong.system.memory import MemoryBudget, process_memory

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
        codec: of the records that are taken; others are read by the codec that they name.
        budget: where memory is reserved; that of the process by default.
    """

    def __init__(
        self,
        model: UserModel,
        item_ids: IdMap,
        digest: bytes,
        *,
        codec: StateCodec = CODECS["float32"],
        budget: MemoryBudget | None = None,
    ) -> None:
        self.model, self.item_ids, self.digest = model.eval(), item_ids, digest
        self.codec = codec
        self.name = digest.hex()
        self.offset = 0
        """Every event of the log up to here is in the states; the caller that applies sets it."""
        self.complete = True
        """Whether every user of the log is here; else some are built when they are asked for."""
        with torch.no_grad():
            self._initial: State = states.detach(model.initial_state(1))
        self._spec = states.spec(self._initial)
        self._rows: dict[Id, int] = {}
        self._free: list[int] = []
        self._ids: list[Id | None] = []
        self._states = StateBlocks(
            self._initial, budget or process_memory(), overhead=WATERMARK.itemsize + 1
        )
        self._watermarks = np.zeros(0, dtype=WATERMARK)
        self._dirty = np.zeros(0, dtype=np.bool_)
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
        """The watermark of a user; None for an unknown user."""
        # the row may be reused and the watermark moved in between
        with self._lock:
            row = self._rows.get(user_id)
            return None if row is None else Watermark(*self._watermarks[row].item())

    def read(self, user_ids: Sequence[Id]) -> State:
        """The states of users; the initial state for unknown users."""
        with self._lock:
            rows = [self._rows.get(user_id, -1) for user_id in user_ids]
            if min(rows, default=-1) >= 0:
                return self._states.take(np.array(rows, dtype=np.int64))
            known = [place for place, row in enumerate(rows) if row >= 0]
            mine = self._states.take(np.array([row for row in rows if row >= 0], dtype=np.int64))
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
            user_ids: their ids.
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
        """The rows of users with new events, and their states; events lie user by user."""
        known = columns.items >= 0
        mine = rows[known]
        if mine.size == 0:
            return mine, None
        # where the next user begins
        inner = np.flatnonzero(mine[1:] != mine[:-1]) + 1
        cuts = np.concatenate([[0], inner, [mine.size]])
        touched, lengths = mine[cuts[:-1]], cuts[1:] - cuts[:-1]
        batch = columns.at(known).batch(lengths, self.model.event_fields)
        before = self._states.take(touched)
        with torch.no_grad():
            return touched, read_batch(self.model, batch, before)

    def _note(self, rows: np.ndarray, columns: DecodedEvents) -> int:
        """Moves the watermark of users past events; returns how many of these were late."""
        self._dirty[rows] = True
        late: int = note(self._watermarks, rows, columns.offsets, columns.numbers, columns.times)
        return late

    def _add(self, user_ids: Sequence[Id]) -> np.ndarray:
        """The row of each user; new users get one, with the initial state."""
        new = [user_id for user_id in dict.fromkeys(user_ids) if user_id not in self._rows]
        if new:
            self._place(new)
        return np.array([self._rows[user_id] for user_id in user_ids], dtype=np.int64)

    def _place(self, new: Sequence[Id]) -> None:
        reused = self._free[len(self._free) - min(len(new), len(self._free)) :][::-1]
        first = len(self._ids)
        rows = [*reused, *range(first, first + len(new) - len(reused))]
        where = np.array(rows, dtype=np.int64)
        with self._lock:
            self._reserve(first + len(new) - len(reused))
            fresh = states.take(self._initial, torch.zeros(len(rows), dtype=torch.int64))
            self._states.put(where, fresh)
        del self._free[len(self._free) - len(reused) :]
        self._ids += [None] * (len(new) - len(reused))
        for user_id, row in zip(new, rows, strict=True):
            self._ids[row] = user_id
            self._rows[user_id] = row

    def _reserve(self, size: int) -> None:
        """Room for so many users."""
        self._states.grow(size)
        if size > len(self._dirty):
            # by doubling: beside a state, this is little to copy
            more = max(1_024, size, 2 * len(self._dirty)) - len(self._dirty)
            self._watermarks = np.concatenate([self._watermarks, np.zeros(more, dtype=WATERMARK)])
            self._dirty = np.concatenate([self._dirty, np.zeros(more, dtype=np.bool_)])

    def _write(self, rows: np.ndarray, new: State | None) -> None:
        if new is None:
            return
        if states.spec(new) != self._spec:
            raise ValueError(
                f"a state keeps its spec: expected {self._spec}, received {states.spec(new)}"
            )
        self._states.put(rows, new)

    # records

    def dirty(self) -> np.ndarray:
        """Rows of users whose states changed since their records were taken."""
        return np.flatnonzero(self._dirty[: len(self._ids)])

    def records(self, rows: np.ndarray) -> list[tuple[Id, bytes]]:
        """Users and their records, which count as written from then on."""
        with self._lock:
            rows = rows[[self._ids[row] is not None for row in rows.tolist()]]
            ids = [self._ids[row] for row in rows.tolist()]
            if not ids:
                return []
            stored = self._states.take(rows)
            marks = [Watermark(*self._watermarks[row].item()) for row in rows.tolist()]
            self._dirty[rows] = False
        return [
            (
                user_id,
                pack_record(Record(self.codec.name, self.digest, mark, row.tobytes()), user_id),
            )
            for user_id, mark, row in zip(ids, marks, self.codec.encode(stored), strict=True)
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
        spoiled, whole = list[Id](), dict[str, list[tuple[Id, Record]]]()
        for user_id, data in records:
            try:
                record = unpack_record(data, user_id)
            # one of a later version cannot be read either
            except ValueError:
                spoiled.append(user_id)
                continue
            codec = self._codec(record.codec)
            if (
                record.model != self.digest
                or codec is None
                or len(record.state) != codec.num_bytes(self._initial)
            ):
                spoiled.append(user_id)
                continue
            whole.setdefault(record.codec, []).append((user_id, record))
        for name, some in whole.items():
            self._load(self._codec(name) or self.codec, some)
        return spoiled

    def _codec(self, name: str) -> StateCodec | None:
        return self.codec if name == self.codec.name else CODECS.get(name)

    def _load(self, codec: StateCodec, records: Sequence[tuple[Id, Record]]) -> None:
        rows = self._add([user_id for user_id, _ in records])
        flat = np.frombuffer(b"".join(record.state for _, record in records), dtype=np.uint8)
        state = codec.decode(flat.reshape(len(records), -1), self._initial)
        with self._lock:
            self._write(rows, state)
            for row, (_, record) in zip(rows.tolist(), records, strict=True):
                self._watermarks[row] = record.watermark

    def clear(self) -> None:
        """Forgets all users."""
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
