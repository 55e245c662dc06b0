"""API keys: kept as hashes, compared in constant time, each with what it may do."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

Scope = Literal["ingest", "read", "admin"]


class Key(BaseModel):
    """A key that is known by its SHA-256 (hex), and what it may do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=64)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    scopes: frozenset[Scope] = Field(min_length=1)


class Keys:
    """All keys of a service; without any, everything is allowed.

    Two keys of one name may live side by side while one takes the place of the other.
    """

    def __init__(self, keys: Sequence[Key] = ()) -> None:
        self._keys = tuple(keys)

    def __len__(self) -> int:
        return len(self._keys)

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Keys from a JSON file: a list of ``{"name", "sha256", "scopes"}``.

        Raises:
            ValueError: if the file does not hold such a list; its content is not told.
        """
        try:
            found = TypeAdapter(list[Key]).validate_python(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError, ValidationError) as error:
            # nothing of what is in the file: it may hold a secret by mistake
            raise ValueError(
                f"{path}: expected a JSON list of keys with name, sha256 and scopes (ingest, read, "
                f"admin), received something else ({type(error).__name__})"
            ) from None
        if not found:
            raise ValueError(f"{path}: expected at least one key, received none")
        return cls(found)

    def allow(self, secret: str | None, scope: Scope) -> bool | None:
        """Whether a secret may do something; None if it is not known at all."""
        if not self._keys:
            return True
        given = hashlib.sha256((secret or "").encode()).hexdigest()
        # all are compared, whichever fits, so that time tells nothing
        matching = [key for key in self._keys if hmac.compare_digest(key.sha256, given)]
        if not matching:
            return None
        return any(scope in key.scopes for key in matching)
