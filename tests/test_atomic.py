"""Files and folders appear whole or not at all, also when a process is killed while it writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from everlong.atomic import STALE_SECONDS, new_folder, remove_stale, write_bytes

WRITER = """
import sys
from pathlib import Path
from everlong.atomic import new_folder, write_bytes
root = Path(sys.argv[1])
print("ready", flush=True)
number = 0
while True:
    number += 1
    write_bytes(root / "file", str(number).encode() * 200_000)
    with new_folder(root / "folder") as folder:
        for name in ("a", "b"):
            (folder / name).write_text(str(number))
"""


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"old")
    write_bytes(tmp_path / "file", b"new and longer")
    assert (tmp_path / "file").read_bytes() == b"new and longer"
    assert names(tmp_path) == ["file"]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_bytes(tmp_path / "file", b"data")
    assert names(tmp_path) == ["file"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for number in range(3):
        with new_folder(tmp_path / "folder") as folder:
            (folder / f"only-{number}").write_text("x")
    assert names(tmp_path / "folder") == ["only-2"]
    assert names(tmp_path) == ["folder"]


def test_an_error_inside_leaves_the_old_folder(tmp_path: Path) -> None:
    with new_folder(tmp_path / "folder") as folder:
        (folder / "old").write_text("x")

    def fail() -> None:
        with new_folder(tmp_path / "folder") as folder:
            (folder / "new").write_text("x")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert names(tmp_path / "folder") == ["old"]
    assert names(tmp_path) == ["folder"]


def test_a_file_in_the_way_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "name").write_text("precious")
    with pytest.raises(ValueError, match="found a file"), new_folder(tmp_path / "name"):
        pass
    assert (tmp_path / "name").read_text() == "precious"


def test_a_killed_writer_leaves_old_or_new(tmp_path: Path) -> None:
    for wait in (0.02, 0.05, 0.11):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (tmp_path / "file").exists():
            data = (tmp_path / "file").read_bytes()
            number = data[: len(data) // 200_000]
            assert data == number * 200_000
        if (tmp_path / "folder").exists():
            assert names(tmp_path / "folder") == ["a", "b"]
            a, b = ((tmp_path / "folder" / name).read_text() for name in ("a", "b"))
            assert a == b


def test_what_a_killed_writer_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    (tmp_path / ".folder.abc.tmp").mkdir()
    (tmp_path / ".folder.new.tmp").mkdir()
    (tmp_path / ".other.abc.tmp").mkdir()
    old = time.time() - 2 * STALE_SECONDS
    os.utime(tmp_path / ".folder.abc.tmp", (old, old))
    remove_stale(tmp_path / "folder")
    assert names(tmp_path) == [".folder.new.tmp", ".other.abc.tmp"]
