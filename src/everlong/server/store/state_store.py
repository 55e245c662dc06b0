"""Where records of states are kept, so that a start need not read the whole log.

A cache of the log: what is lost here is built again. ``everlong.testing.check_state_store`` checks
an implementation; ``SqliteStates``, in the file of the log, is the built-in one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from everlong.server.store.log import Id


class Mark(NamedTuple):
    """How far the records of a model go."""

    offset: int
    """Every state that an event up to here has changed was written after that."""
    complete: bool
    """Whether every user of the log has a record; else some states are built when needed."""


class StateStore(Protocol):
    """Records by model and user; called by one thread at a time.

    Writes become durable in the order of the calls, and need not be durable when a call returns:
    after a crash the store is as some call left it. A mark is never there without all records that
    were written before it.

    Every method raises ``OSError`` if the store cannot be read or written, and ``DamagedError`` if
    it is not what was written; of single records ``StateTable`` finds that by their checksums.
    """

    def mark(self, model: str) -> Mark | None:
        """The mark of a model; None if its records were never written to the end."""
        ...

    def records(self, model: str, size: int) -> Iterator[Sequence[tuple[Id, bytes]]]:
        """All users and records of a model, at most ``size`` at once."""
        ...

    def write(
        self, model: str, records: Sequence[tuple[Id, bytes]], mark: Mark | None = None
    ) -> None:
        """Replaces records of users, and the mark if one is given: all of it, or nothing."""
        ...

    def erase(self, user_id: Id) -> None:
        """Overwrites the records of a user in all models; durable when it returns."""
        ...

    def models(self) -> set[str]:
        """The models that have a record or a mark."""
        ...

    def delete_some(self, model: str) -> bool:
        """Deletes the mark of a model and some of its records; returns whether any are left."""
        ...
