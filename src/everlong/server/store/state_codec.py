"""How a state becomes the bytes of its record, and a state again.

Numbers that are not float32 or float64 keep their bits in every codec: integers are places and
times, half floats are small already. ``everlong.testing.check_state_codec`` checks a codec.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from everlong.models import state as states
from everlong.models.state import FieldSpec, State

S = TypeVar("S", bound=State)

WIDE = (torch.float32, torch.float64)
"""What codecs may shorten."""


class StateCodec(Protocol):
    """From the states of users to rows of bytes and back."""

    @property
    def name(self) -> str:
        """Names the codec in every record, in 1 to 8 ASCII letters; never given to another."""
        ...

    def num_bytes(self, like: State) -> int:
        """Bytes of a user whose state has the spec of ``like``."""
        ...

    def encode(self, state: State) -> np.ndarray:
        """The states of ``n`` users as ``[n, num_bytes]`` uint8."""
        ...

    def decode(self, rows: np.ndarray, like: S) -> S:
        """The states that ``encode`` made rows ``[n, num_bytes]`` of, with the spec of ``like``.

        Encoding them again loses nothing more.
        """
        ...


class Float32:
    """Every field bit by bit: nothing is lost."""

    name = "float32"

    def num_bytes(self, like: State) -> int:
        """As many as the state has in memory."""
        return states.bytes_per_user(like)

    def encode(self, state: State) -> np.ndarray:
        """The fields one after the other."""
        return _joined([_bits(value) for value in state])

    def decode(self, rows: np.ndarray, like: S) -> S:
        """The same states."""
        return _split(rows, like, [field.num_bytes for field in states.spec(like)], _from_bits)


class BFloat16:
    """Wide floats with 8 bits of precision: a relative error of at most 2^-8."""

    name = "bfloat16"

    def num_bytes(self, like: State) -> int:
        """Two for each wide float."""
        return sum(map(self._size, states.spec(like)))

    def encode(self, state: State) -> np.ndarray:
        """Wide floats rounded to the nearest."""
        return _joined(
            [_bits(value.bfloat16() if value.dtype in WIDE else value) for value in state]
        )

    def decode(self, rows: np.ndarray, like: S) -> S:
        """States with rounded floats."""
        return _split(rows, like, list(map(self._size, states.spec(like))), self._field)

    @staticmethod
    def _size(field: FieldSpec) -> int:
        return field.num_bytes * 2 // field.dtype.itemsize if _wide(field) else field.num_bytes

    @staticmethod
    def _field(part: np.ndarray, field: FieldSpec) -> Tensor:
        if not _wide(field):
            return _from_bits(part, field)
        return _from_bits(part, field._replace(dtype=torch.bfloat16)).to(field.dtype)


class Int8:
    """Wide floats in 255 steps of the largest in their row, the last axis of a field.

    The error is at most 1/254 of that; a row with a number that is not finite comes back as NaN.
    """

    name = "int8"

    def num_bytes(self, like: State) -> int:
        """One for each wide float, and four for each row of them."""
        return sum(map(self._size, states.spec(like)))

    def encode(self, state: State) -> np.ndarray:
        """Scales and steps of each field."""
        parts = []
        for value in state:
            numbers, width = value.shape[1:].numel(), _width(value.shape[1:])
            if value.dtype not in WIDE or numbers == 0:
                parts.append(_bits(value))
                continue
            rows = value.reshape(len(value), numbers // width, width).double()
            scale = (rows.abs().amax(dim=2) / 127).float()
            scale[~rows.isfinite().all(dim=2)] = torch.nan
            steps = (rows / scale.double()[..., None]).nan_to_num(0.0).round().to(torch.int8)
            parts += [_bits(scale), _bits(steps)]
        return _joined(parts)

    def decode(self, rows: np.ndarray, like: S) -> S:
        """States with rounded floats."""
        return _split(rows, like, list(map(self._size, states.spec(like))), self._field)

    @staticmethod
    def _size(field: FieldSpec) -> int:
        if not _wide(field):
            return field.num_bytes
        numbers = torch.Size(field.shape).numel()
        return numbers + 4 * (numbers // max(1, _width(field.shape)))

    @staticmethod
    def _field(part: np.ndarray, field: FieldSpec) -> Tensor:
        if not _wide(field) or part.shape[1] == 0:
            return _from_bits(part, field)
        width = _width(field.shape)
        count = torch.Size(field.shape).numel() // width
        scale = _from_bits(part[:, : 4 * count], FieldSpec("scale", (count,), torch.float32))
        steps = _from_bits(part[:, 4 * count :], FieldSpec("steps", (count, width), torch.int8))
        value = steps.double() * scale.double()[..., None]
        return value.to(field.dtype).reshape(len(part), *field.shape)


CODECS: Mapping[str, StateCodec] = MappingProxyType(
    {codec.name: codec for codec in (Float32(), BFloat16(), Int8())}
)
"""The built-in ones, by name."""


def _wide(field: FieldSpec) -> bool:
    return field.dtype in WIDE


def _width(shape: tuple[int, ...] | torch.Size) -> int:
    """Numbers in a row of a field: its last axis, and all of a field without axes."""
    return shape[-1] if len(shape) else 1


def _bits(value: Tensor) -> np.ndarray:
    """``[n, bytes]`` uint8 of a tensor ``[n, ...]``, the least byte of a number first."""
    if sys.byteorder != "little":
        raise OSError("records of states have the least byte first, as this machine does not")
    numbers = value.shape[1:].numel()
    if value.numel() == 0:
        return np.zeros((len(value), numbers * value.dtype.itemsize), dtype=np.uint8)
    flat = value.detach().cpu().contiguous().reshape(len(value), numbers)
    return flat.view(torch.uint8).numpy()


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts, axis=1)


def _from_bits(part: np.ndarray, field: FieldSpec) -> Tensor:
    if part.size == 0:
        return torch.zeros(len(part), *field.shape, dtype=field.dtype)
    flat = torch.from_numpy(part.copy())
    return flat.view(field.dtype).reshape(len(part), *field.shape)


def _split(
    rows: np.ndarray, like: S, sizes: list[int], read: Callable[[np.ndarray, FieldSpec], Tensor]
) -> S:
    """A state from the bytes of its fields, so many each."""
    cuts = np.cumsum([0, *sizes])
    fields = [
        read(rows[:, cuts[place] : cuts[place + 1]], field)
        for place, field in enumerate(states.spec(like))
    ]
    return type(like)(*fields)
