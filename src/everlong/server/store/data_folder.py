"""A data folder of the service as a whole: the lock of the process that has it, and its version."""

from __future__ import annotations

import fcntl
import sqlite3
from contextlib import ExitStack, closing
from pathlib import Path
from typing import IO

from everlong.server.store import migrations, service_file
from everlong.server.store.log import DamagedError
from everlong.server.store.sqlite_file import SqliteFile, sqlite_errors
from everlong.server.store.sqlite_log import SqliteLog
from everlong.system.formats import Upgraded

LOCK = "service.lock"


def shard_paths(folder: Path) -> list[Path]:
    """The logs of a data folder."""
    return sorted(folder.glob("shard-*.sqlite"))


def lock_folder(folder: Path) -> IO[bytes]:
    """A file that only one process holds at a time; the system lets it go if that dies.

    Raises:
        OSError: if another process holds it.
    """
    file = (folder / LOCK).open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise OSError(f"{folder} is in use by another process; stop that first") from error
    return file


def upgrade_data_folder(folder: Path) -> list[Upgraded]:
    """Brings the logs and the description of a data folder up to this version.

    Nothing is kept of it unless all logs are what was written. If the process dies while the last
    step is made durable in several logs, calling it again goes on from there.

    Raises:
        DamagedError: if a log is not what was written.
        NewerFormatError: if a later version of everlong wrote it.
        OSError: if it cannot be written, or is in use.
    """
    with lock_folder(folder), ExitStack() as stack:
        found = [_upgrade_log(path, stack) for path in shard_paths(folder)]
        about = service_file.read_about(folder)
        version, _ = service_file.version_of(folder) if about else (service_file.VERSION, {})
        # all logs together, once each of them was read to its end
        stack.close()
        for path in shard_paths(folder):
            # empties the write-ahead log, and checks what there is now
            SqliteLog(path, new=False).close()
        if about and version < service_file.VERSION:
            service_file.write_about(folder, about)
        return [*found, Upgraded(service_file.KIND, version, service_file.VERSION)]


def _upgrade_log(path: Path, stack: ExitStack) -> Upgraded:
    """Brings a log up in a transaction that ends with the stack."""
    with sqlite_errors(path, "opened"):
        connection = stack.enter_context(closing(sqlite3.connect(path, isolation_level=None)))
        if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise DamagedError(f"{path} is empty; restore it from a copy")
        found = migrations.version_of(path, connection)
    if found < migrations.VERSION:
        for pragma in ("secure_delete=ON", "journal_mode=WAL", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")
        stack.enter_context(SqliteFile(path, connection).transaction())
        migrations.upgrade(path, connection, found)
    return Upgraded(f"{migrations.KIND}, {path.name},", found, migrations.VERSION)
