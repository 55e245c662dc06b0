"""``service.json``: what a data folder says of itself, replaced as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from everlong.server.store.log import DamagedError, Id
from everlong.system.atomic import write_bytes
from everlong.system.formats import NewerFormatError, check_version, migrate

ABOUT = "service.json"


class StoredModel(NamedTuple):
    """A model that is served."""

    folder: str
    """Where it was read from."""
    digest: str
    """What its states depend on, in hexadecimal digits."""


class About(NamedTuple):
    """What a data folder says of itself."""

    shards: int
    asked: str = ""
    """Digest of the model that the service was asked for the last time."""
    live: StoredModel | None = None
    previous: StoredModel | None = None
    hidden: Sequence[Id] = ()
    """Items that are in no list."""


def _version_2(about: dict[str, Any]) -> dict[str, Any]:
    """Names the version of everlong that wrote it."""
    return {**about, "version": 2, "everlong": version("everlong")}


MIGRATIONS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (_version_2,)

VERSION = len(MIGRATIONS) + 1
KIND = "the description of a data folder"


def read_about(folder: Path) -> About | None:
    """What a data folder says of itself; None if it says nothing.

    Raises:
        DamagedError: if that is not what was written.
        NewerFormatError: if a later version of everlong wrote it.
    """
    path = folder / ABOUT
    if not path.is_file():
        return None
    try:
        found, about = version_of(folder)
        about = migrate(about, found, MIGRATIONS)
        live, previous = (_model(about[name]) for name in ("live", "previous"))
        if not about["shards"] >= 1:
            raise ValueError(f"{about['shards']} shards")
        return About(about["shards"], about["asked"], live, previous, about["hidden"])
    except NewerFormatError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{path} is not what was written: {error}; restore it from a copy"
        ) from error


def version_of(folder: Path) -> tuple[int, dict[str, Any]]:
    """The version of a data folder's ``service.json``, and what it holds.

    Raises:
        NewerFormatError: if a later version of everlong wrote it.
        ValueError, KeyError: if it is not what was written.
    """
    about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    found = check_version(
        folder / ABOUT,
        KIND,
        about["version"],
        VERSION,
        written_by=about.get("everlong"),
    )
    return found, about


def write_about(folder: Path, about: About) -> None:
    """Replaces what a data folder says of itself.

    Raises:
        OSError: if it cannot be written; then it is as before.
    """
    models = {
        name: None if model is None else model._asdict()
        for name, model in (("live", about.live), ("previous", about.previous))
    }
    facts = {"version": VERSION, "everlong": version("everlong"), **about._asdict(), **models}
    write_bytes(folder / ABOUT, (json.dumps(facts, indent=2) + "\n").encode())


def _model(facts: dict[str, str] | None) -> StoredModel | None:
    return None if facts is None else StoredModel(facts["folder"], facts["digest"])
