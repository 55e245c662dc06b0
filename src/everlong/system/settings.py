"""Strict settings: an unknown or ill-typed key is an error that suggests the most similar one."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

T = TypeVar("T")


class Settings(BaseModel):
    """A frozen group of settings, loaded strictly."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def load_settings(kind: type[T], values: Mapping[str, Any]) -> T:
    """Creates an instance of ``kind`` (a ``Settings`` class or a dataclass) from plain values.

    Numbers may be text, as on a command line, and lists may be JSON.

    Raises:
        ValueError: if a key is unknown or a value invalid; names the key, and what was expected and
            received.
    """
    names = _names(kind)
    for key in values:
        if key not in names:
            raise ValueError(unknown("setting", key, names, of=kind.__name__))
    try:
        return TypeAdapter(kind).validate_python({k: _list(v) for k, v in values.items()})
    except ValidationError as error:
        problems = "; ".join(_problem(details) for details in error.errors())
        raise ValueError(f"{kind.__name__}: {problems}") from None


def unknown(what: str, received: str, valid: Iterable[str], of: str = "") -> str:
    """The message of an error about an unknown name; suggests the most similar valid name."""
    valid = sorted(valid)
    near = difflib.get_close_matches(received, valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    place = f" of {of}" if of else ""
    return f"unknown {what} {received!r}{place}: {hint}Valid names: {', '.join(valid)}"


def _problem(details: ErrorDetails) -> str:
    """Formats one validation error."""
    text = details["msg"].removeprefix("Value error, ")
    # an error without a location concerns several settings, and its message has their values
    if not details["loc"]:
        return text
    return f"{'.'.join(map(str, details['loc']))}: {text}, received {details['input']!r}"


def _list(value: Any) -> Any:
    """Parses text such as ``[[256, 4]]`` as a list; returns any other value unchanged."""
    if not (isinstance(value, str) and value.startswith("[")):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _names(kind: type[Any]) -> set[str]:
    if dataclasses.is_dataclass(kind):
        return {field.name for field in dataclasses.fields(kind)}
    return set(kind.model_fields)
