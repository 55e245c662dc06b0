import json
import logging
import os
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

import everlong.data.event_cache
import everlong.data.events
from everlong.data.event_cache import open_event_cache, open_events, write_event_cache
from everlong.data.events import Events, read_events
from everlong.data.ids import IdMap

FRAME = pl.DataFrame(
    {
        "user_id": ["b", "a", "b", "a"],
        "item_id": [3, 1, None, 2],
        "timestamp": [1.5e9, 1.5e9 + 5, 1.5e9, 1.5e9 + 2.5],
        "rating": [1.0, 2.0, 3.0, 4.0],
        "a/../b": [1, 2, 3, 4],
    }
)


@pytest.fixture
def events() -> Events:
    return read_events(FRAME, fields=["rating", "a/../b"])


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.parquet"
    FRAME.write_parquet(path)
    return path


def assert_same(one: Events, two: Events) -> None:
    assert one.fingerprint == two.fingerprint
    assert one.facts == two.facts
    assert list(one.fields) == list(two.fields)
    for name in one.fields:
        np.testing.assert_array_equal(one.fields[name], two.fields[name])
        assert one.fields[name].dtype == two.fields[name].dtype
    assert (one.user_ids, one.item_ids) == (two.user_ids, two.item_ids)


def test_written_and_opened_events_are_the_same_and_memory_mapped(tmp_path, events):
    write_event_cache(events, tmp_path / "cache")
    opened = open_event_cache(tmp_path / "cache", verify=True)
    assert_same(events, opened)
    assert type(opened.items) is np.ndarray
    assert isinstance(opened.items.base, np.memmap)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]


def test_an_event_cache_of_an_empty_log_can_be_written(tmp_path):
    none = Events(
        items=np.zeros(0, np.int32),
        times=np.zeros(0, np.int64),
        offsets=np.zeros(1, np.int64),
        user_ids=IdMap.from_values([]),
        item_ids=IdMap.from_values([]),
    )
    write_event_cache(none, tmp_path / "cache")
    assert_same(none, open_event_cache(tmp_path / "cache", verify=True))


def test_an_existing_folder_is_never_overwritten(tmp_path, events):
    write_event_cache(events, tmp_path / "cache")
    with pytest.raises(FileExistsError, match="exists already"):
        write_event_cache(events, tmp_path / "cache")


@pytest.mark.parametrize(
    "name", ["items.npy", "times.npy", "field_1.npy", "user_ids.parquet", "index.json"]
)
def test_a_truncated_absent_or_changed_file_is_an_error(tmp_path, events, name):
    folder = tmp_path / "cache"
    write_event_cache(events, folder)
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="not a complete event cache"):
        open_event_cache(folder)
    path.unlink()
    with pytest.raises(ValueError, match="not a complete event cache"):
        open_event_cache(folder)
    if name != "index.json":
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{name} has changed"):
            open_event_cache(folder, verify=True)
    with pytest.raises(FileNotFoundError, match="no event cache at"):
        open_event_cache(tmp_path / "absent")


def test_a_manifest_with_other_paths_or_another_format_is_refused(tmp_path, events):
    write_event_cache(events, tmp_path / "cache")
    path = tmp_path / "cache" / "index.json"
    manifest = json.loads(path.read_text())
    for change in (
        {"format": "2"},
        {"files": {}},
        {"facts": {"unknown": 1}},
        {"fields": ["a", "b", "c"]},
        {"files": {**manifest["files"], "items.npy": None}},
    ):
        path.write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match="not a complete event cache"):
            open_event_cache(tmp_path / "cache")


def test_pickled_arrays_are_refused(tmp_path, events):
    write_event_cache(events, tmp_path / "cache")
    path = tmp_path / "cache" / "items.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    manifest = tmp_path / "cache" / "index.json"
    content = json.loads(manifest.read_text())
    content["files"]["items.npy"]["bytes"] = path.stat().st_size
    manifest.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="not a complete event cache"):
        open_event_cache(tmp_path / "cache")


def test_a_log_is_parsed_once_until_it_or_a_setting_changes(tmp_path, log, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("EVERLONG_CACHE", str(cache))
    reads = []
    read = everlong.data.events.read_table
    monkeypatch.setattr(
        everlong.data.events, "read_table", lambda *args: reads.append(args) or read(*args)
    )
    first = open_events(log, fields=["rating"])
    assert_same(first, open_events(str(log), fields=["rating"]))
    assert len(reads) == 1
    open_events(log, fields=["rating"], ties="random")
    assert len(reads) == 2
    open_events([log], fields=["rating"], cache_dir=tmp_path / "other")
    assert len(reads) == 3
    os.utime(log, ns=(1, 1))
    assert_same(first, open_events(log, fields=["rating"]))
    assert len(reads) == 4
    assert len(list((cache / "events").iterdir())) == 3


def test_a_damaged_event_cache_is_rebuilt(tmp_path, log, caplog):
    first = open_events(log, cache_dir=tmp_path / "cache")
    (folder,) = (tmp_path / "cache" / "events").iterdir()
    (folder / "items.npy").write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="everlong"):
        again = open_events(log, cache_dir=tmp_path / "cache")
    assert "reading the log again" in caplog.text
    assert rows_equal(first, again)
    open_event_cache(folder, verify=True)


def rows_equal(one: Events, two: Events) -> bool:
    # the arrays of the first may be mapped from a file that the test has cut
    return one.facts == two.facts and one.item_ids == two.item_ids


def test_open_events_opens_the_folder_of_an_event_cache(tmp_path, events):
    write_event_cache(events, tmp_path / "written")
    assert_same(events, open_events(tmp_path / "written", cache_dir=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
    with pytest.raises(FileNotFoundError, match="no file at"):
        open_events(tmp_path / "absent.csv", cache_dir=tmp_path / "cache")


# the limit on file sizes is the nearest thing to a full disk that a test may make; the limits
# stop at a header, inside an array, in the last bytes of an array, and in the id maps
FULL_DISK = """
import logging, resource, sys
from pathlib import Path
from everlong.data.event_cache import open_events
logging.basicConfig()
log, cache = sys.argv[1:]
for limit in (0, 100, 8_100, 20_120, 40_050):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    events = open_events(log, cache_dir=cache)
    print(events.num_events, [p.name for p in (Path(cache) / "events").iterdir()])
"""


def test_on_a_full_disk_no_partial_cache_remains_and_events_are_returned(tmp_path):
    n = 5_000
    log, cache = tmp_path / "log.parquet", tmp_path / "cache"
    frame = pl.DataFrame({"user_id": range(n), "item_id": range(n), "timestamp": range(n)})
    frame.write_parquet(log)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, log, cache], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{n} []"] * 5
    assert done.stderr.count("will be parsed again next time") == 5


def test_an_event_cache_that_cannot_be_written_is_a_warning(tmp_path, log, caplog):
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING, logger="everlong"):
        events = open_events(log, cache_dir=tmp_path / "file")
    assert events.num_events == 3
    assert "will be parsed again next time" in caplog.text
