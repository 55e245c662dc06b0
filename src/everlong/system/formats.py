"""Versions of stored formats: migration of older versions, errors for newer ones.

Versions of a format count from 1. Its migrations are an append-only tuple of functions; the
function at index ``n - 1`` migrates from version ``n`` to ``n + 1``. So the version that this
package writes is the length of the tuple plus one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class NewerFormatError(ValueError):
    """Raised if a file or folder has a later version of its format than this package reads."""


class Upgraded(NamedTuple):
    """What an upgrade did."""

    kind: str
    """What was found, such as "a model folder"."""
    before: int
    after: int


def check_version(
    path: Path, kind: str, version: object, current: int, *, written_by: object = None
) -> int:
    """Validates the stored version of a format.

    Args:
        path: the file or folder.
        kind: its format, for example "a model folder".
        version: the stored version.
        current: the latest version that this package reads.
        written_by: the version of everlong that wrote it, if known.

    Raises:
        NewerFormatError: if the version is later than ``current``; names the everlong to install.
        ValueError: if the stored value is not a version.
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
    """Migrates a value from a version of its format to the latest."""
    for step in migrations[version - 1 :]:
        value = step(value)
    return value
