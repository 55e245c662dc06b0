"""Ids of requests, checked against the types of the log."""

from __future__ import annotations

import re
from typing import Any

from starlette.exceptions import HTTPException

from everlong.server.http.messages import MAX_ID, MAX_INT
from everlong.server.store.log import Id


def check_id(name: str, value: Id, kind: type[Any]) -> Id:
    """An id of a message, of the type that the log has.

    Raises:
        HTTPException: 422 for an id of another type.
    """
    # clients fold these two away in a path, so that such a user could not be erased
    if value in (".", ".."):
        raise HTTPException(422, f"{name}: expected an id that can stand in a path, received dots")
    if type(value) is kind:
        return value
    raise HTTPException(
        422, f"{name}: expected {kind.__name__} as in the log, received {type(value).__name__}"
    )


def id_of_path(name: str, value: str, kind: type[Any]) -> Id:
    """An id of a path, as the type that the log has.

    Raises:
        HTTPException: 422 for text that is no such id.
    """
    if kind is str:
        if 1 <= len(value) <= MAX_ID:
            return value
        raise HTTPException(422, f"{name}: expected 1 to {MAX_ID} characters")
    # one way to write a number, so that one user has one address
    if re.fullmatch("0|-?[1-9][0-9]{0,18}", value, re.ASCII) and abs(int(value)) <= MAX_INT:
        return int(value)
    raise HTTPException(422, f"{name}: expected an integer, received something else")
