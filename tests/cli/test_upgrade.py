"""``everlong upgrade``: what earlier versions stored is rewritten whole, or not at all."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests import test_formats as formats
from typer.testing import CliRunner, Result

import everlong
from everlong.cli.app import app
from everlong.data.event_cache import open_event_cache
from everlong.server.store.data_folder import lock_folder
from everlong.server.store.sqlite_log import SqliteReader
from everlong.training import checkpoint

STORED = formats.STORED
PATHS = {
    "a model folder": "models/lru",
    "a checkpoint": "checkpoint/run",
    "an event cache": "events/index",
    "an item table": "items/table",
    "a cache of vectors": "vectors/cache.sqlite",
    "an event log": "service/data",
}


def upgrade(path: Path) -> Result:
    return CliRunner().invoke(app, ["upgrade", str(path)])


def contents(path: Path) -> dict[str, bytes]:
    files = [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]
    # the lock is empty, and what SQLite keeps beside a file comes and goes
    return {one.name: one.read_bytes() for one in files if one.suffix in SUFFIXES}


SUFFIXES = (".json", ".jsonl", ".sqlite", ".safetensors", ".parquet", ".npy", ".md")


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    shutil.copytree(STORED, tmp_path / "v1")
    return tmp_path / "v1"


@pytest.mark.parametrize(("kind", "name"), PATHS.items())
def test_a_second_upgrade_has_nothing_to_do(kind: str, name: str, copied: Path) -> None:
    path = copied / name
    first = upgrade(path)
    assert first.exit_code == 0, first.stderr
    assert f"{path}: {kind}" in first.stdout
    assert "now" in first.stdout
    assert "nothing to do" not in first.stdout
    after = contents(path)
    second = upgrade(path)
    assert second.exit_code == 0, second.stderr
    assert second.stdout.count("nothing to do") == len(second.stdout.splitlines())
    assert contents(path) == after


@pytest.mark.parametrize("name", formats.MODELS)
def test_an_upgraded_model_answers_as_before(name: str, copied: Path) -> None:
    assert upgrade(copied / "models" / name).exit_code == 0
    events = everlong.open_events(STORED / "events" / "index")
    recommender = everlong.load(copied / "models" / name)
    formats.check_model(formats.ask_model(recommender, events), name)


@pytest.mark.parametrize("kind", ["service", "killed"])
def test_an_upgraded_data_folder_answers_as_before(kind: str, copied: Path) -> None:
    result = upgrade(copied / kind / "data")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("of version 2: now 3") == 2
    for path in sorted((copied / kind / "data").glob("shard-*.sqlite")):
        with closing(SqliteReader(path)) as log:
            assert log.verify() == log.total.events
    formats.test_a_data_folder(kind, copied)


@pytest.mark.parametrize(
    ("kind", "go_on"),
    [("checkpoint", formats.resume), ("checkpoint_ranker", formats.resume_ranker)],
)
def test_an_upgraded_checkpoint_goes_on(kind: str, go_on: Callable[..., Any], copied: Path) -> None:
    result = upgrade(copied / kind / "run")
    assert result.exit_code == 0, result.stderr
    events = everlong.open_events(STORED / "events" / "index")
    formats.test_a_run_goes_on_from_its_checkpoint(kind, go_on, copied, events)


def test_upgraded_caches_are_what_they_were(copied: Path) -> None:
    for name in ("events/index", "items/table", "vectors/cache.sqlite"):
        assert upgrade(copied / name).exit_code == 0
    formats.test_an_index_of_events(copied)
    formats.test_an_item_table(copied)
    formats.test_a_cache_of_vectors(copied)


def test_a_damaged_log_leaves_all_logs_as_they_are(copied: Path) -> None:
    folder = copied / "service" / "data"
    with closing(sqlite3.connect(folder / "shard-0001.sqlite")) as connection:
        connection.execute("UPDATE events SET time=time+1 WHERE offset=1")
        connection.commit()
    before = contents(folder)
    result = upgrade(folder)
    assert result.exit_code == 2
    assert "the event at offset 1 is not what was written" in result.stderr
    assert contents(folder) == before
    for path in sorted(folder.glob("shard-*.sqlite")):
        with pytest.raises(ValueError, match="of version 2, expected 3: run `everlong upgrade"):
            SqliteReader(path)


def test_a_damaged_model_is_left_as_it_is(copied: Path) -> None:
    folder = copied / "models" / "lru"
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    before = contents(folder)
    result = upgrade(folder)
    assert result.exit_code == 2
    assert "was cut or changed" in result.stderr
    assert contents(folder) == before


def test_a_folder_in_use_is_left_alone(copied: Path) -> None:
    folder = copied / "service" / "data"
    with lock_folder(folder):
        result = upgrade(folder)
    assert result.exit_code == 2
    assert "in use by another process" in result.stderr


def later(path: Path, name: str) -> None:
    """Makes something of the latest version say that it is of version 99, by everlong 7.1.0."""
    if path.is_file() or name == "service/data":
        for file in [path] if path.is_file() else path.glob("*.sqlite"):
            with closing(sqlite3.connect(file)) as connection:
                connection.execute("PRAGMA user_version=99")
                connection.commit()
    elif name == "checkpoint/run":
        file = path / checkpoint.FILE
        data = file.read_bytes()
        said = b'\\"format\\": %d' % checkpoint.FORMAT
        assert said in data
        header = int.from_bytes(data[:8], "little") + 1
        changed = data[8:].replace(said, b'\\"format\\": 99', 1)
        file.write_bytes(header.to_bytes(8, "little") + changed)
    else:
        (file,) = [one for one in path.glob("*.json") if "format" in json.loads(one.read_text())]
        about = json.loads(file.read_text()) | {"format": 99, "everlong": "7.1.0"}
        file.write_text(json.dumps(about))


@pytest.mark.parametrize(("kind", "name"), PATHS.items())
def test_what_a_later_version_wrote_says_what_to_install(
    kind: str, name: str, copied: Path
) -> None:
    path = copied / name
    assert upgrade(path).exit_code == 0
    later(path, name)
    result = upgrade(path)
    assert result.exit_code == 2
    assert f"is {kind} of version 99" in result.stderr, result.stderr
    assert "install" in result.stderr
    if name == "events/index":
        with pytest.raises(ValueError, match=r"install everlong 7\.1\.0 or later"):
            open_event_cache(path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "nothing at"),
        ("models", "expected a folder with one of service.json, .* not the one above it"),
        ("items/table/items.json", "expected a cache of vectors, or the folder"),
        ("service/data/shard-0000.sqlite", "name the folder that this file lies in"),
    ],
)
def test_what_is_not_known_is_refused(name: str, words: str, copied: Path) -> None:
    result = upgrade(copied / name)
    assert result.exit_code == 2
    assert re.search(words, result.stderr)
