"""The event cache: a parsed log on disk as memory-mapped arrays, so that it is parsed only once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from everlong.data.events import EventFacts, Events, Ties, read_events
from everlong.data.ids import IdMap
from everlong.data.times import TimeUnit
from everlong.system.atomic import new_folder, write_bytes
from everlong.system.formats import NewerFormatError, Upgraded, check_version, migrate

MANIFEST = "index.json"
ARRAYS = ("items", "times", "offsets")

logger = logging.getLogger(__name__)


def _version_2(manifest: dict[str, Any]) -> dict[str, Any]:
    """Names the version of everlong that wrote it."""
    return {**manifest, "format": 2, "everlong": version("everlong")}


MIGRATIONS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (_version_2,)
"""From each version of the manifest to the next; the arrays are those of version 1."""

FORMAT = len(MIGRATIONS) + 1
KIND = "an event cache"


def write_event_cache(events: Events, folder: str | Path) -> None:
    """Writes events as an event cache: a new folder that appears complete or not at all.

    Raises:
        FileExistsError: if the folder exists already.
        OSError: if it cannot be written, as on a full disk; no partial folder remains.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it or choose another folder")
    try:
        with new_folder(folder) as temporary:
            _write_files(events, temporary)
    except pl.exceptions.PolarsError as error:
        raise OSError(f"cannot write {folder}: {error}") from error


def open_event_cache(folder: str | Path, *, verify: bool = False) -> Events:
    """Opens an event cache and returns its events, memory-mapped.

    Args:
        folder: what ``write_event_cache`` wrote.
        verify: also read every file and compare its sha256.

    Raises:
        NewerFormatError: if a later version of everlong wrote it.
        ValueError: if the folder is not a complete event cache, or a file is truncated or changed.
        FileNotFoundError: if the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no event cache at {folder}; write one with write_event_cache")
    try:
        manifest, _ = _read_manifest(folder)
        names = list(manifest["fields"])
        for name in _file_names(len(names)):
            _check_file(folder / name, manifest["files"][name], verify)
        items, times, offsets = (_open_array(folder / f"{name}.npy") for name in ARRAYS)
        facts = manifest["facts"] | {"messages": tuple(manifest["facts"]["messages"])}
        return Events(
            items=items,
            times=times,
            offsets=offsets,
            fields={name: _open_array(folder / f"field_{i}.npy") for i, name in enumerate(names)},
            user_ids=IdMap.read(folder / "user_ids.parquet"),
            item_ids=IdMap.read(folder / "item_ids.parquet"),
            facts=EventFacts(**facts),
        )
    except NewerFormatError:
        raise
    except (ValueError, KeyError, TypeError, EOFError, OSError) as error:
        raise ValueError(
            f"{folder} is not a complete event cache: {error}; delete it and read the log again"
        ) from error


def upgrade_event_cache(folder: Path) -> Upgraded:
    """Brings the manifest of an event cache up to this version; it is replaced whole.

    Raises:
        NewerFormatError: if a later version of everlong wrote it.
        OSError: if it cannot be written; then it is as before.
        ValueError: if the folder is not a complete event cache.
    """
    open_event_cache(folder, verify=True)
    manifest, found = _read_manifest(folder)
    if found < FORMAT:
        write_bytes(folder / MANIFEST, json.dumps(manifest, indent=2).encode())
    return Upgraded(KIND, found, FORMAT)


def open_events(
    path: str | Path | Sequence[str | Path],
    *,
    cache_dir: str | Path | None = None,
    user_id: str = "user_id",
    item_id: str = "item_id",
    timestamp: str | None = "timestamp",
    fields: Sequence[str] = (),
    ties: Ties = "stable",
    seed: int = 0,
    time_unit: TimeUnit | Literal["auto"] = "auto",
) -> Events:
    """Opens a log through the event cache: parses its files once and memory-maps them afterwards.

    The event cache lies in ``cache_dir``, default ``$EVERLONG_CACHE`` or ``~/.cache/everlong``, and
    is rebuilt when a file or a setting changes. Deleting it is safe at any time. If it cannot be
    written, a warning is logged and the events stay in memory. A folder that ``write_event_cache``
    wrote is opened directly.

    Args:
        path: a .csv, .tsv or .parquet file, several of them, or the folder of an event cache.
        cache_dir: the parent folder of event caches.
        user_id: this and all that follow as in ``read_events``.
        item_id: the column of item ids.
        timestamp: the column of timestamps, or None.
        fields: numeric columns to keep.
        ties: the order of events with equal timestamps.
        seed: the seed of random ties.
        time_unit: the unit of the timestamps.

    Raises:
        ValueError: if the log cannot be read.
        FileNotFoundError: if a file does not exist.
    """
    paths = [Path(path)] if isinstance(path, str | Path) else [Path(p) for p in path]
    if len(paths) == 1 and paths[0].is_dir():
        return open_event_cache(paths[0])
    settings = {
        "user_id": user_id,
        "item_id": item_id,
        "timestamp": timestamp,
        "fields": list(fields),
        "ties": ties,
        "seed": seed,
        "time_unit": time_unit,
    }
    folder = _cache_root(cache_dir) / "events" / _cache_key(paths, settings)
    if folder.is_dir():
        try:
            return open_event_cache(folder)
        except ValueError as error:
            logger.warning("reading the log again: %s", error)
            shutil.rmtree(folder, ignore_errors=True)
    events = read_events(
        paths,
        user_id=user_id,
        item_id=item_id,
        timestamp=timestamp,
        fields=fields,
        ties=ties,
        seed=seed,
        time_unit=time_unit,
    )
    try:
        write_event_cache(events, folder)
    except FileExistsError:
        logger.info("another process wrote the event cache %s at the same time", folder)
    except OSError as error:
        logger.warning(
            "cannot write the event cache %s: %s; the log will be parsed again next time",
            folder,
            error,
        )
        return events
    return open_event_cache(folder)


def _cache_root(cache_dir: str | Path | None) -> Path:
    default = os.environ.get("EVERLONG_CACHE") or "~/.cache/everlong"
    return Path(cache_dir or default).expanduser().absolute()


def _cache_key(paths: Sequence[Path], settings: dict[str, Any]) -> str:
    """A name that changes with the files and the settings."""
    files = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}; check the path")
        stat = path.stat()
        files.append([str(path.absolute()), stat.st_size, stat.st_mtime_ns])
    # of any version: one that is older is read as well
    text = json.dumps({"format": 1, "files": files, **settings}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read_manifest(folder: Path) -> tuple[dict[str, Any], int]:
    """The manifest as the latest version has it, and the version that it has."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    found = check_version(
        folder, KIND, manifest["format"], FORMAT, written_by=manifest.get("everlong")
    )
    return migrate(manifest, found, MIGRATIONS), found


def _file_names(num_fields: int) -> list[str]:
    # numbered, because the name of a field need not be a valid file name
    fields = [f"field_{i}.npy" for i in range(num_fields)]
    return [*(f"{name}.npy" for name in ARRAYS), *fields, "user_ids.parquet", "item_ids.parquet"]


def _write_files(events: Events, folder: Path) -> None:
    arrays = [events.items, events.times, events.offsets, *events.fields.values()]
    names = _file_names(len(events.fields))
    for name, array in zip(names, arrays, strict=False):
        _write_array(folder / name, array)
    events.user_ids.write(folder / "user_ids.parquet")
    events.item_ids.write(folder / "item_ids.parquet")
    manifest = {
        "format": FORMAT,
        "everlong": version("everlong"),
        "facts": asdict(events.facts),
        "fields": list(events.fields),
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)}
            for name in names
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _write_array(path: Path, array: np.ndarray) -> None:
    # np.save can truncate the array on a full disk without an error; a plain write raises
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)


def _check_file(path: Path, expected: dict[str, Any], verify: bool) -> None:
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise ValueError(f"{path.name} has {size} bytes, expected {expected['bytes']}")
    if verify and _sha256(path) != expected["sha256"]:
        raise ValueError(f"{path.name} has changed since it was written")


def _open_array(path: Path) -> np.ndarray:
    # an empty file region cannot be memory-mapped; the header alone takes at least 128 bytes
    empty = path.stat().st_size <= 128
    array = np.load(path, mmap_mode=None if empty else "r", allow_pickle=False)
    return np.asarray(array)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
