"""Atomic writes of files and folders."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STALE_SECONDS = 3_600.0
"""Age in seconds from which temporary files and folders are leftovers of a killed process."""


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically and durably: after a crash it has the old or the new content.

    Raises:
        OSError: if it cannot be written; an existing file is unchanged.
    """
    remove_stale(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp creates files with mode 0600
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder that atomically replaces ``path`` when the block succeeds.

    If the block fails, an existing folder is unchanged. On Linux the two folders are exchanged by
    one system call; elsewhere a crash between two renames can leave the old folder beside ``path``,
    under a name that ends in ``.old``.

    Raises:
        OSError: if it cannot be written.
        ValueError: if ``path`` is a file.
    """
    path = path.absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(
            f"{path}: expected a folder or a new name, received a file; choose another path"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    temporary.chmod(0o777 & ~_umask())
    try:
        yield temporary
        _sync_all(temporary)
        _take_place(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(path.parent)
    # after the exchange, the temporary name is the old folder
    shutil.rmtree(temporary, ignore_errors=True)


def remove_stale(path: Path) -> None:
    """Removes temporary files of killed processes that were writing ``path``."""
    if not path.parent.is_dir():
        return
    for entry in path.parent.iterdir():
        if not (entry.name.startswith(f".{path.name}.") and entry.name.endswith(".tmp")):
            continue
        try:
            if time.time() - entry.lstat().st_mtime < STALE_SECONDS:
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink()
        except OSError:
            # another process removed it first, or permissions forbid it
            continue


def sync_folder(path: Path) -> None:
    """Makes the entries of a folder durable by an fsync."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_all(folder: Path) -> None:
    for entry in folder.rglob("*"):
        if entry.is_dir():
            sync_folder(entry)
        else:
            with entry.open("rb") as opened:
                os.fsync(opened.fileno())
    sync_folder(folder)


def _take_place(new: Path, path: Path) -> None:
    """Moves ``new`` to ``path``, and an existing folder from ``path`` to ``new``."""
    if not path.exists():
        new.rename(path)
        return
    if _exchange(new, path):
        return
    old = new.with_name(new.name.removesuffix(".tmp") + ".old")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    old.rename(new)


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges two names atomically; returns False where the system does not support it."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    # AT_FDCWD and RENAME_EXCHANGE, from linux/fcntl.h and linux/fs.h
    here, flag = -100, ctypes.c_uint(2)
    return int(rename(here, os.fsencode(first), here, os.fsencode(second), flag)) == 0


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
