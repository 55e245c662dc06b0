"""Versions of stored formats: what is older is brought up step by step, what is newer is named.

Every format counts its versions from 1. Its migrations are a tuple of functions, the one at place
``n - 1`` from version ``n`` to ``n + 1``; the tuple only ever grows at its end, so the version that
this package writes is its length plus one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


class NewerFormatError(ValueError):
    """A file or folder has a later version of its format than this package reads."""


def check_version(
    path: Path, kind: str, version: object, current: int, *, written_by: object = None
) -> int:
    """The version of a format, found at a path.

    Args:
        path: the file or folder.
        kind: what it is, such as "a model folder".
        version: as it was found there.
        current: the latest that this package reads.
        written_by: the version of everlong that wrote it, if that is known.

    Raises:
        NewerFormatError: if the version is later than ``current``; says what to install.
        ValueError: if it is no version at all.
    """
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ValueError(
            f"{path}: expected the version of {kind}, from 1 to {current}, received {version!r}"
        )
    if version > current:
        wanted = f"everlong {written_by} or later" if written_by else "a later everlong"
        raise NewerFormatError(
            f"{path} is {kind} of version {version}; this everlong reads versions up to {current}: "
            f"install {wanted}"
        )
    return version


def migrate(value: T, version: int, migrations: Sequence[Callable[[T], T]]) -> T:
    """A value of some version of its format as one of the latest."""
    for step in migrations[version - 1 :]:
        value = step(value)
    return value
