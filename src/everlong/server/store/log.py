"""The event log of a shard: the truth from which all else follows, and what every log must do.

An event has an offset, its place in the order of arrival, and an id by which a second delivery is
known. Offsets begin at 1, rise by one with each new event, and are never given twice.
``everlong.testing.check_event_log`` checks an implementation; ``SqliteLog`` is the built-in one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

NO_FIELDS: Mapping[str, float | int] = {}

Id = int | str
"""An id of a user or an item, as the client gave it: an integer of 64 bits, or a text."""


class Event(NamedTuple):
    """Something that a user did."""

    event_id: str
    """Two events with one id are one event, delivered twice."""
    user_id: Id
    item_id: Id
    time: int
    """Unix seconds, or a position where logs have no times."""
    fields: Mapping[str, float | int] = NO_FIELDS


class Receipt(NamedTuple):
    """What became of an event."""

    offset: int
    """Its place in the log; 0 for one that was erased and came again."""
    new: bool


class Stored(NamedTuple):
    """An event of the log."""

    offset: int
    event_key: bytes
    """16 bytes that stand for its id, as ``key_of`` returns them."""
    user_id: Id
    item_id: Id
    time: int
    fields: Mapping[str, float | int]


class Slice(NamedTuple):
    """``n`` events of the log, field by field: of many, this takes half the time."""

    offsets: tuple[int, ...]
    keys: tuple[bytes, ...]
    user_ids: tuple[Id, ...]
    item_ids: tuple[Id, ...]
    times: tuple[int, ...]
    fields: tuple[Mapping[str, float | int], ...]

    def __bool__(self) -> bool:
        return bool(self.offsets)

    @staticmethod
    def of(events: Sequence[Stored]) -> Slice:
        """Some events."""
        return Slice(*zip(*events, strict=True)) if events else Slice((), (), (), (), (), ())


class Total(NamedTuple):
    """How many events a log holds, and the last offset that it gave."""

    events: int = 0
    last: int = 0


class DamagedError(ValueError):
    """A file is not what was written to it."""


class EventReader(Protocol):
    """Events of a shard, read in one thread while the writer goes on.

    Every method raises ``DamagedError`` if what it reads is not what was written, and ``OSError``
    if it cannot be read.
    """

    total: Total
    """As of the last :meth:`look`; of the writer's own log always exact."""

    def look(self) -> Total:
        """Reads ``total`` anew: what the writer has made durable by now."""
        ...

    def key_of(self, event_id: str) -> bytes:
        """16 bytes that stand for an event id in this log; in another log, other ones."""
        ...

    def after(self, offset: int, limit: int) -> list[Stored]:
        """The events that follow an offset, in order, at most so many."""
        ...

    def slices(self, last: int, size: int) -> Iterator[Slice]:
        """All events up to an offset, in order, at most ``size`` at once."""
        ...

    def of_user(self, user_id: Id) -> list[Stored]:
        """All events of a user, in order."""
        ...

    def last_of_user(self, user_id: Id, count: int) -> list[Stored]:
        """The last events of a user, newest first."""
        ...

    def items_of_user(self, user_id: Id, after: int) -> list[tuple[int, Id]]:
        """Offsets and items of a user's events after an offset, in order."""
        ...

    def verify(self) -> int:
        """Reads the whole log; returns how many events it has.

        Raises:
            DamagedError: if an event was changed, lost or added.
        """
        ...

    def close(self) -> None:
        """Lets the log go; nothing is lost without it. A second time it does nothing."""
        ...


class EventLog(EventReader, Protocol):
    """The log of a shard as its one writer has it; called by one thread at a time."""

    @property
    def backlog(self) -> int:
        """Bytes that are durable and not yet in their final place; a long reader keeps them."""
        ...

    def append(self, events: Sequence[Event]) -> list[Receipt]:
        """Adds events in order; returns once they are durable.

        An event whose id is in the log, or was among these before, is not added again: its receipt
        has the offset of the first, or 0 if that was erased.

        Raises:
            OSError: if they cannot be written; then none of them is in the log. If the process
                dies before the next call, they may be: all of them, or none.
        """
        ...

    def erase(self, user_id: Id) -> int:
        """Overwrites the events of a user; returns how many there were.

        Their ids stay known by their keys, and their offsets are not given again.

        Raises:
            OSError: if that cannot be written; then nothing is erased.
        """
        ...

    def probe(self) -> None:
        """Raises ``OSError`` while nothing can be written."""
        ...

    def tidy(self) -> None:
        """Upkeep between two groups of events; returns at once if there is nothing to do."""
        ...

    def reader(self) -> EventReader:
        """A reader of this log for another thread."""
        ...
