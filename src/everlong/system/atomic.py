"""Files and folders that appear whole or not at all."""

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
"""Temporary files and folders of that age belong to a process that was killed."""


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file so that a crash leaves the old one or the new one, never a part.

    Raises:
        OSError: if it cannot be written; the old file, if any, is untouched.
    """
    remove_stale(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only the owner reads
        Path(name).chmod(0o666 & ~_umask())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill, which takes the place of ``path`` when the block succeeds.

    A folder that was there is replaced whole; if the block fails it stays as it was. On Linux the
    two change places in one step; elsewhere a crash between two renames can leave the old folder
    beside, under a name that ends in ``.old``.

    Raises:
        OSError: if it cannot be written.
        ValueError: if ``path`` is a file.
    """
    path = path.absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(
            f"expected a folder or a free name at {path}, found a file; choose another"
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
    # by now this is what was there before, if anything was
    shutil.rmtree(temporary, ignore_errors=True)


def remove_stale(path: Path) -> None:
    """Removes what killed processes left beside ``path`` while they wrote it."""
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
            # somebody else was faster, or it is not ours to remove
            continue


def sync_folder(path: Path) -> None:
    """Makes the names in a folder durable."""
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
    """Moves ``new`` to ``path``; a folder that is there moves to ``new``."""
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
    """Whether two names changed places in one step; false where the system cannot do that."""
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
