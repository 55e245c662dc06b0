"""The conformance suite of :class:`~everlong.server.store.state_codec.StateCodec`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from everlong.models import state as states
from everlong.models.state import State
from everlong.server.store.state_codec import WIDE, StateCodec
from everlong.testing.contract import ContractBroken, expect


class _Everything(NamedTuple):
    """A state with a field of every kind that models have."""

    hidden: Tensor
    wide: Tensor
    one: Tensor
    half: Tensor
    brain: Tensor
    times: Tensor
    codes: Tensor
    small: Tensor
    flags: Tensor
    none: Tensor


def check_state_codec(codec: StateCodec, *, error: float, users: int = 50, seed: int = 0) -> float:
    """Checks a codec on random states; returns the largest error that it makes.

    Args:
        codec: the codec.
        error: how far a float32 or float64 may be off, as a part of the largest number in its row,
            the last axis of its field. All other fields must come back bit by bit.
        users: how many states.
        seed: of the states.

    Raises:
        ContractBroken: names what differs.
    """
    if not (codec.name.isascii() and 1 <= len(codec.name) <= 8):
        raise ContractBroken(f"name: expected 1 to 8 ASCII letters, received {codec.name!r}")
    state = _random(users, torch.Generator().manual_seed(seed))
    like = states.take(state, torch.tensor([0]))
    rows = codec.encode(state)
    expect("the shape of the rows", rows.shape, (users, codec.num_bytes(like)))
    expect("their dtype", str(rows.dtype), "uint8")
    back = codec.decode(rows, like)
    expect("the spec that comes back", states.spec(back), states.spec(state))
    worst = _worst(state, back)
    if worst > error:
        raise ContractBroken(f"error: expected at most {error}, received {worst}")
    # nothing more is lost
    again = codec.encode(back)
    expect("the rows of what came back", again.tobytes(), rows.tobytes())
    for user in range(0, users, 7):
        alone = codec.encode(states.take(state, torch.tensor([user])))
        expect("a user alone", alone.tobytes(), rows[user : user + 1].tobytes())
        one = codec.decode(alone, like)
        for a, b in zip(one, back, strict=True):
            expect("a user alone, back", torch.equal(a[0], b[user]), True)
    none = states.take(state, torch.zeros(0, dtype=torch.int64))
    expect("rows of no users", codec.encode(none).shape, (0, codec.num_bytes(like)))
    return worst


def _random(users: int, generator: torch.Generator) -> _Everything:
    def normal(*shape: int) -> Tensor:
        scale = torch.rand(users, *[1] * len(shape), generator=generator) * 8 - 4
        return torch.randn(users, *shape, generator=generator) * 10**scale

    def integers(dtype: torch.dtype, *shape: int) -> Tensor:
        bounds = torch.iinfo(dtype)
        low, high = max(bounds.min, -(1 << 62)), min(bounds.max, 1 << 62)
        return torch.randint(low, high, (users, *shape), generator=generator).to(dtype)

    hidden = normal(3, 8)
    # users without events have zeros
    hidden[::5] = 0.0
    return _Everything(
        hidden,
        normal(2, 5).double(),
        normal(),
        normal(6).clamp(-6e4, 6e4).half(),
        normal(6).bfloat16(),
        integers(torch.int64, 7),
        integers(torch.int32, 3, 2),
        integers(torch.int8, 4),
        integers(torch.int8, 3) > 0,
        torch.zeros(users, 4, 0),
    )


def _worst(state: State, back: State) -> float:
    """The largest error, as a part of the largest number in its row."""
    worst = 0.0
    for name, a, b in zip(states.field_names(state), state, back, strict=True):
        if a.dtype not in WIDE:
            if not torch.equal(a, b):
                raise ContractBroken(f"field {name}: expected the same bits, received others")
        elif a.numel():
            rows = a.double().reshape(len(a), -1, a.shape[-1] if a.ndim > 1 else 1)
            off = (b.double().reshape(rows.shape) - rows).abs()
            largest = rows.abs().amax(dim=2, keepdim=True)
            worst = max(worst, float((off / largest).nan_to_num(0.0, posinf=2.0).max()))
    return worst
