"""Whether the records of states are of the events of the log: each once, and in order."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from everlong.server.store.log import DamagedError, Id
from everlong.server.store.record import unpack_record
from everlong.server.store.sqlite_log import SqliteReader
from everlong.server.store.sqlite_states import SqliteStates
from everlong.server.store.watermark import WATERMARK, Watermark, note, numbers_of

log = logging.getLogger(__name__)

EVENTS = 1_024
"""Events that are read at once."""

RECORDS = 8_192
"""Records that are read at once."""


def verify_states(reader: SqliteReader) -> int:
    """Compares the watermark of every record with the log; returns how many records there are.

    A watermark has a hash of all events that were applied, in their order. A record that is
    damaged is no fault: its user is read anew at the next start.

    Raises:
        DamagedError: if a state has other events than the log has up to its offset.
        OSError: if the log cannot be read.
    """
    store, count = SqliteStates(reader), 0
    with reader.snapshot():
        for model in sorted(store.models()):
            count += _verify_model(reader, store, model)
    return count


def _verify_model(reader: SqliteReader, store: SqliteStates, model: str) -> int:
    row_of: dict[Id, int] = {}
    expected: list[Watermark] = []
    for some in store.records(model, RECORDS):
        for user_id, data in some:
            try:
                record = unpack_record(data, user_id)
            except DamagedError as error:
                log.warning("%s: user %r: %s", reader.path, user_id, error)
                continue
            row_of[user_id] = len(expected)
            expected.append(record.watermark)
    wanted = np.array(expected, dtype=WATERMARK)
    found = np.zeros(len(wanted), dtype=WATERMARK)
    last = int(wanted["offset"].max(initial=0))
    for events in reader.slices(last, EVENTS):
        rows = np.array([row_of.get(user_id, -1) for user_id in events.user_ids], dtype=np.int64)
        offsets = np.array(events.offsets, dtype=np.int64)
        mine = rows >= 0
        mine[mine] = offsets[mine] <= wanted["offset"][rows[mine]]
        times = np.array(events.times, dtype=np.int64)
        note(found, rows[mine], offsets[mine], numbers_of(events.keys)[mine], times[mine])
    wrong = np.flatnonzero(found != wanted)
    if wrong.size:
        users: Sequence[Id] = list(row_of)
        row = int(wrong[0])
        raise DamagedError(
            f"{reader.path}: {wrong.size:,} states of model {model} are not of the events of the "
            f"log, such as that of user {users[row]!r}: expected {Watermark(*found[row].item())}, "
            f"found {Watermark(*wanted[row].item())}; run `everlong verify --forget-states` on the "
            "folder while it is not served, and the states are built from the log at the next start"
        )
    return len(expected)


def forget_states(log: SqliteReader) -> None:
    """Deletes the records of all models from a log that its writer has open."""
    store = SqliteStates(log)
    for model in store.models():
        while store.delete_some(model):
            pass
