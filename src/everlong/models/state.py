"""The state of users: a flat named tuple of tensors, user axis first, the same shape for ever.

A state never has a time axis and is never changed in place: it is passed in and returned.
Floating fields are float32 in training and serving whatever the compute type, because a state
lives for millions of events and rounding would add up.
"""

from __future__ import annotations

import json
import struct
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor
from typing_extensions import TypeVar

State = tuple[Tensor, ...]
"""Any ``NamedTuple`` whose fields are tensors ``[B, ...]``; each model declares its own."""

S = TypeVar("S", bound=State, default=Any)
"""The state of one model, which goes in and comes out."""


class FieldSpec(NamedTuple):
    """What one field of a state looks like for one user."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def field_names(state: State) -> tuple[str, ...]:
    """The names of a state's fields, in order."""
    names: tuple[str, ...] = getattr(state, "_fields", ())
    if not names:
        raise TypeError(
            f"a state is a NamedTuple of tensors, received {type(state).__name__}; "
            "declare `class State(NamedTuple)` beside the model"
        )
    return names


def spec(state: State) -> tuple[FieldSpec, ...]:
    """Name, shape without the user axis, and dtype of every field."""
    return tuple(
        FieldSpec(name, tuple(value.shape[1:]), value.dtype)
        for name, value in zip(field_names(state), state, strict=True)
    )


def num_users(state: State) -> int:
    """How many users a state holds."""
    return state[0].shape[0]


def bytes_per_user(state: State) -> int:
    """Bytes that one user takes, all fields together."""
    return sum(field.num_bytes for field in spec(state))


def check_same(expected: State, received: State) -> None:
    """Raises ``ValueError`` if two states differ in fields, shapes, dtypes or number of users."""
    if spec(expected) != spec(received):
        raise ValueError(
            f"a state keeps its spec for ever: expected {spec(expected)}, "
            f"received {spec(received)}; return a state like the one that came in"
        )
    for name, a, b in zip(field_names(expected), expected, received, strict=True):
        if a.shape[0] != b.shape[0]:
            raise ValueError(f"field {name!r}: expected {a.shape[0]} users, received {b.shape[0]}")


def take(state: S, rows: Tensor) -> S:
    """The states of the users at ``rows [B']``."""
    return type(state)(*(value[rows] for value in state))


def put(state: S, rows: Tensor, part: S) -> S:
    """A copy of ``state`` in which the users at ``rows`` have the states of ``part``."""
    return type(state)(
        *(value.index_copy(0, rows, new) for value, new in zip(state, part, strict=True))
    )


def concat(states: list[S]) -> S:
    """The users of all states, one after the other."""
    return type(states[0])(*(torch.cat(values) for values in zip(*states, strict=True)))


def detach(state: S) -> S:
    """The same state without its autograd history."""
    return type(state)(*(value.detach() for value in state))


def to_device(state: S, device: torch.device | str) -> S:
    """The same state on another device."""
    return type(state)(*(value.to(device) for value in state))


def to_bytes(state: State) -> bytes:
    """A state as bytes: safetensors, with the order of the fields in the header."""
    names = field_names(state)
    # copies, because fields may share memory and the format forbids that
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in zip(names, state, strict=True)
    }
    return save_tensors(tensors, metadata={"fields": ",".join(names)})


def from_bytes(data: bytes, like: S) -> S:
    """The state that ``to_bytes`` wrote, checked against the spec of ``like``.

    Raises:
        ValueError: if the bytes are not a state of that spec.
    """
    try:
        (header_size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + header_size])
        tensors = load_tensors(data)
    except Exception as error:
        raise ValueError(
            "these bytes are not a stored state: expected safetensors as written by "
            f"to_bytes, received {len(data)} bytes ({error}); rebuild the state"
        ) from error
    names = field_names(like)
    stored = tuple(header.get("__metadata__", {}).get("fields", "").split(","))
    if stored != names:
        raise ValueError(
            f"the stored state has fields {stored}, expected {names}; "
            "it belongs to another model: rebuild it from the log"
        )
    if tensors.keys() != set(names):
        raise ValueError(
            f"the stored state has tensors {sorted(tensors)}, expected {sorted(names)}; "
            "it is damaged: rebuild it from the log"
        )
    state = type(like)(*(tensors[name] for name in names))
    if len({value.shape[:1] for value in state}) > 1:
        raise ValueError("the fields of the stored state differ in users: rebuild it from the log")
    if spec(state) != spec(like):
        raise ValueError(
            f"the stored state has spec {spec(state)}, expected {spec(like)}; "
            "it belongs to another model: rebuild it from the log"
        )
    return state
