from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from everlong.models import state as states


class Memory(NamedTuple):
    hidden: Tensor  # [B, 2, 3]
    count: Tensor  # [B]


class Other(NamedTuple):
    hidden: Tensor
    number: Tensor


def memory(users: int, seed: int = 0) -> Memory:
    random = torch.Generator().manual_seed(seed)
    return Memory(torch.randn(users, 2, 3, generator=random), torch.arange(users))


def same(first: Memory, second: Memory) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_what_a_state_is() -> None:
    state = memory(4)
    assert states.field_names(state) == ("hidden", "count")
    assert states.num_users(state) == 4
    assert states.bytes_per_user(state) == 2 * 3 * 4 + 8
    assert states.spec(state)[0] == states.FieldSpec("hidden", (2, 3), torch.float32)
    with pytest.raises(TypeError, match="NamedTuple"):
        states.field_names((torch.zeros(2),))


@pytest.mark.parametrize("users", [0, 1, 5])
def test_bytes_and_back(users: int) -> None:
    state = memory(users)
    back = states.from_bytes(states.to_bytes(state), memory(1))
    assert type(back) is Memory
    assert same(back, state)


def test_bytes_hold_values_alone() -> None:
    base = torch.arange(24.0, requires_grad=True).reshape(2, 3, 4)
    # a view in another order of memory, and two fields that share memory
    view = base.transpose(1, 2)[:, 1:3]
    back = states.from_bytes(
        states.to_bytes(Memory(view, torch.zeros(2))), Memory(view, view[:, 0, 0])
    )
    assert torch.equal(back.hidden, view)
    assert not back.hidden.requires_grad
    shared = Other(base, base)
    assert torch.equal(states.from_bytes(states.to_bytes(shared), shared).number, base)


@settings(max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_damaged_bytes_are_refused_or_still_a_state(place: float, flip: int, cut: bool) -> None:
    data = bytearray(states.to_bytes(memory(3)))
    # the values carry no checksum: only what describes them can be checked
    described = 8 + int.from_bytes(data[:8], "little")
    if cut:
        data = data[: int(place * len(data))]
    else:
        data[int(place * described)] ^= flip
    try:
        state = states.from_bytes(bytes(data), memory(1))
    except ValueError:
        return
    assert not cut
    assert states.spec(state) == states.spec(memory(1))
    assert len({len(field) for field in state}) == 1


def test_a_state_of_another_model_is_refused() -> None:
    data = states.to_bytes(memory(2))
    with pytest.raises(ValueError, match="belongs to another model"):
        states.from_bytes(data, Other(*memory(2)))
    wider = Memory(torch.zeros(2, 2, 4), torch.arange(2))
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        states.from_bytes(data, wider)
    doubled = Memory(torch.zeros(2, 2, 3, dtype=torch.float64), torch.arange(2))
    with pytest.raises(ValueError, match="float64"):
        states.from_bytes(data, doubled)
    for damaged in (b"", b"abc", b"\xff" * 50):
        with pytest.raises(ValueError, match="not a stored state"):
            states.from_bytes(damaged, memory(1))


def test_check_same_names_the_difference() -> None:
    states.check_same(memory(3), memory(3, seed=1))
    with pytest.raises(ValueError, match="expected 3 users, received 2"):
        states.check_same(memory(3), memory(2))
    with pytest.raises(ValueError, match="keeps its spec"):
        states.check_same(memory(3), memory(3)._replace(count=torch.zeros(3)))
    with pytest.raises(ValueError, match="keeps its spec"):
        states.check_same(memory(3), Other(*memory(3)))


@settings(max_examples=20)
@given(st.lists(st.integers(0, 4), max_size=5, unique=True))
def test_take_and_put_are_inverse(rows: list[int]) -> None:
    state, new = memory(5), memory(5, seed=1)
    where = torch.tensor(rows, dtype=torch.int64)
    mixed = states.put(state, where, states.take(new, where))
    for user in range(5):
        one = torch.tensor([user])
        expected = states.take(new if user in rows else state, one)
        assert same(states.take(mixed, one), expected)
    # nothing was changed in place
    assert same(state, memory(5))


def test_concat_puts_users_one_after_the_other() -> None:
    parts = [memory(2), memory(0), memory(3, seed=1)]
    whole = states.concat(parts)
    assert type(whole) is Memory
    assert same(states.take(whole, torch.arange(2)), parts[0])
    assert same(states.take(whole, torch.arange(2, 5)), parts[2])


def test_detach_and_devices() -> None:
    state = Memory(torch.zeros(1, 2, 3, requires_grad=True), torch.zeros(1))
    assert not states.detach(state).hidden.requires_grad
    assert states.to_device(state, "meta").hidden.device.type == "meta"
