"""API keys: stored as hashes, compared in constant time, each with its scopes."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

Scope = Literal["ingest", "read", "admin"]


class Key(Struct, forbid_unknown_fields=True, frozen=True):
    """A key: the SHA-256 (hex) of its secret, and its scopes."""

    name: Annotated[str, Meta(min_length=1, max_length=64)]
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    scopes: Annotated[frozenset[Scope], Meta(min_length=1)]


class Keys:
    """All keys of a service; without any, everything is allowed.

    Two keys may have one name while one replaces the other.
    """

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        self._keys = tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Keys from a JSON file: a list of ``{"name", "sha256", "scopes"}``.

        Raises:
            ValueError: if the file does not hold such a list; the error does not quote the file.
        """
        try:
            found = msgspec.json.decode(path.read_bytes(), type=list[Key])
        except (OSError, ValueError) as error:
            # the file may hold a secret by mistake, so the error quotes nothing of it
            raise ValueError(
                f"{path}: expected a JSON list of keys with name, sha256 and scopes (ingest, read, "
                f"admin), received something else ({type(error).__name__})"
            ) from None
        if not found:
            raise ValueError(f"{path}: expected at least one key, received none")
        return cls(found)

    def allow(self, secret: str | None, scope: Scope) -> bool | None:
        """Whether a secret has a scope; None for a secret of no key."""
        if not self._keys:
            return True
        given = hashlib.sha256((secret or "").encode()).hexdigest()
        # compare with every key, so that the time does not depend on which one matches
        matching = [key for key in self._keys if hmac.compare_digest(key.sha256, given)]
        if not matching:
            return None
        return any(scope in key.scopes for key in matching)
