import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from everlong.system import atomic
from everlong.system.atomic import new_folder, write_bytes


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    for data in (b"old", b"", b"new" * 1000):
        write_bytes(path, data)
        assert path.read_bytes() == data
    assert names(tmp_path) == ["file.bin"]


def test_files_and_folders_have_the_usual_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "file", b"")
        with new_folder(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_on_a_full_disk_the_old_file_remains(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    write_bytes(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_bytes(path, b"n" * 5000)
        with pytest.raises(OSError, match="File too large"), new_folder(tmp_path / "new") as folder:
            (folder / "large").write_bytes(b"n" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        write_bytes(tmp_path / "file" / "below", b"data")
    with pytest.raises(OSError, match="none"):
        write_bytes(tmp_path / "none" / "below", b"data")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    (folder / "file").write_bytes(b"old")
    folder.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            write_bytes(folder / "file", b"new")
        with pytest.raises(PermissionError), new_folder(folder / "new"):
            pass
        assert (folder / "file").read_bytes() == b"old"
    finally:
        folder.chmod(0o700)


def fill(folder: Path, text: str) -> None:
    (folder / "one").write_text(text)
    (folder / "deep").mkdir()
    (folder / "deep" / "two").write_text(text)


def test_a_folder_is_written_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "parent" / "folder"
    with new_folder(path) as folder:
        fill(folder, "old")
        (folder / "gone").write_text("")
        assert not path.exists()
    with new_folder(path) as folder:
        fill(folder, "new")
        assert (path / "one").read_text() == "old"
    assert names(path) == ["deep", "one"]
    assert (path / "deep" / "two").read_text() == "new"
    assert names(path.parent) == ["folder"]


def fill_and_fail(path: Path, error: type[BaseException]) -> None:
    with new_folder(path) as folder:
        fill(folder, "new")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_the_old_folder(
    error: type[BaseException], tmp_path: Path
) -> None:
    path = tmp_path / "folder"
    with pytest.raises(error):
        fill_and_fail(path, error)
    assert names(tmp_path) == []
    with new_folder(path) as folder:
        fill(folder, "old")
    with pytest.raises(error):
        fill_and_fail(path, error)
    assert (path / "one").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_a_folder_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="received a file"), new_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_folders_are_replaced_without_an_atomic_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic.sys, "platform", "darwin")
    path = tmp_path / "folder"
    for text in ("old", "new"):
        with new_folder(path) as folder:
            fill(folder, text)
        assert (path / "one").read_text() == text
    assert names(tmp_path) == ["folder"]

    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"), new_folder(path) as folder:
        fill(folder, "newer")
    assert (path / "one").read_text() == "new"
    assert names(tmp_path) == ["folder"]


# the module alone, by its path: what starts in a moment can be killed often
WRITER = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("atomic", sys.argv[1])
atomic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(atomic)
file, path = Path(sys.argv[2]) / "file", Path(sys.argv[2]) / "folder"
for number in range(10**6):
    text = str(number % 10)
    atomic.write_bytes(file, text.encode() * 50_000)
    with atomic.new_folder(path) as folder:
        for part in "abc":
            (folder / part).write_text(text * 1000)
"""


def test_after_a_kill_the_old_or_the_new_content_exists(tmp_path: Path) -> None:
    write_bytes(tmp_path / "file", b"0" * 50_000)
    with new_folder(tmp_path / "folder") as folder:
        for part in "abc":
            (folder / part).write_text("0" * 1000)
    for turn in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITER, atomic.__file__, str(tmp_path)])
        began, before = time.monotonic(), (tmp_path / "file").stat().st_mtime_ns
        while (tmp_path / "file").stat().st_mtime_ns == before:
            assert time.monotonic() - began < 60
            time.sleep(0.001)
        time.sleep(0.001 * turn)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        data = (tmp_path / "file").read_bytes()
        assert len(data) == 50_000
        assert len(set(data)) == 1
        assert names(tmp_path / "folder") == ["a", "b", "c"]
        texts = {(tmp_path / "folder" / part).read_text() for part in "abc"}
        assert len(texts) == 1
        assert len(texts.pop()) == 1000
    # what was left behind goes once it is old, and not before
    kept = names(tmp_path)
    write_bytes(tmp_path / "file", b"")
    assert names(tmp_path) == kept
    # one more of each, so that there is something to remove
    (tmp_path / ".file.x.tmp").write_bytes(b"part")
    (tmp_path / ".folder.y.tmp").mkdir()
    (tmp_path / ".folder.y.tmp" / "a").write_text("part")
    (tmp_path / "..file.tmp").write_text("mine")
    old = time.time() - atomic.STALE_SECONDS - 10
    for path in tmp_path.iterdir():
        os.utime(path, (old, old))
    write_bytes(tmp_path / "file", b"new")
    with new_folder(tmp_path / "folder"):
        pass
    assert names(tmp_path) == ["..file.tmp", "file", "folder"]
