"""The forms of the linear scan agree with each other, with oracles and with laws of scans."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from everlong.ops.linear_scan import (
    as_complex,
    as_planar,
    doubling_scan,
    last_states,
    linear_scan,
    reference_scan,
)

Scan = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

FAST: dict[str, Scan] = {"linear": linear_scan, "doubling": doubling_scan}
ALL: dict[str, Scan] = {**FAST, "reference": reference_scan}
RAGGED = {
    "empty users": [0, 3, 0, 0, 5, 0],
    "one event each": [1] * 5,
    "awkward": [2, 3, 50, 63, 64, 65],
    "long": [200, 1, 0, 7],
    "many users": [3, 0, 1, 2] * 6,
    "no events": [0, 0, 0],
    "no users": [],
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


class Pack(NamedTuple):
    """The arguments of a scan."""

    inputs: Tensor
    decay: Tensor
    state: Tensor
    offsets: Tensor


def make_pack(
    lengths: list[int], channels: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Pack:
    random = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> Tensor:
        values = torch.randn(rows, 2 * channels, generator=random, dtype=torch.float64)
        return values.to(dtype)

    radius = 0.5 + 0.49 * torch.rand(channels, generator=random, dtype=torch.float64)
    angle = 2 * torch.pi * torch.rand(channels, generator=random, dtype=torch.float64)
    decay = torch.stack([radius * angle.cos(), radius * angle.sin()]).to(dtype)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Pack(draw(sum(lengths)), decay, draw(len(lengths)), offsets)


def run(scan: Scan, pack: Pack, seed: int = 1) -> list[Tensor]:
    """Values, final states, and the gradients of a random weighing of both."""
    leaves = [tensor.clone().requires_grad_() for tensor in pack[:3]]
    hidden, final = scan(*leaves, pack.offsets)
    random = torch.Generator().manual_seed(seed)
    loss = torch.zeros((), dtype=hidden.dtype)
    for part in (hidden, final):
        weights = torch.randn(part.shape, generator=random, dtype=torch.float64).to(part.dtype)
        loss = loss + (part * weights).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [hidden.detach(), final.detach(), *grads]


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    if expected.numel():
        scale = expected.abs().max().clamp(min=1).item()
        worst = (actual.to(expected.dtype) - expected).abs().max().item()
        assert worst <= tolerance * scale, f"off by {worst:.3g} at a scale of {scale:.3g}"


def numpy_loop(pack: Pack) -> np.ndarray:
    """An oracle that shares no code with the library: complex128, one event after the other."""
    half = pack.decay.shape[1]
    u, h0 = pack.inputs.double().numpy(), pack.state.double().numpy()
    decay = pack.decay[0].double().numpy() + 1j * pack.decay[1].double().numpy()
    out = np.empty_like(u)
    for user in range(len(h0)):
        h = h0[user, :half] + 1j * h0[user, half:]
        for event in range(int(pack.offsets[user]), int(pack.offsets[user + 1])):
            h = decay * h + u[event, :half] + 1j * u[event, half:]
            out[event, :half], out[event, half:] = h.real, h.imag
    return out


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads(), numba.get_num_threads()
    yield
    torch.set_num_threads(before[0])
    numba.set_num_threads(before[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [1, 5, 32])
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("form", FAST)
def test_equals_reference_in_values_states_and_gradients(
    form: str, lengths: list[int], channels: int, dtype: torch.dtype
) -> None:
    pack = make_pack(lengths, channels, dtype)
    wide = Pack(*(tensor.double() for tensor in pack[:3]), pack.offsets)
    expected = run(reference_scan, wide)
    for received, wanted in zip(run(FAST[form], pack), expected, strict=True):
        assert received.dtype == dtype
        assert_near(received, wanted, TOLERANCE[dtype])


@pytest.mark.parametrize("form", ALL)
def test_equals_a_plain_loop(form: str) -> None:
    pack = make_pack([5, 0, 1, 64, 17], channels=3)
    hidden, final = ALL[form](*pack)
    expected = numpy_loop(pack)
    assert_near(hidden, torch.from_numpy(expected), 1e-12)
    ends = pack.offsets[1:].numpy() - 1
    for user, end in enumerate(ends):
        wanted = pack.state[user].numpy() if user == 1 else expected[end]
        assert_near(final[user], torch.from_numpy(wanted), 1e-12)


@pytest.mark.parametrize("form", ALL)
def test_equals_the_closed_form(form: str) -> None:
    # h_t = sum_s decay^(t - s) u_s + decay^(t + 1) h_before
    length = 40
    pack = make_pack([length], channels=4)
    decay = torch.complex(pack.decay[0], pack.decay[1])
    place = torch.arange(length)
    gap = (place[:, None] - place[None, :]).clamp(min=0)
    powers = decay[:, None, None] ** gap * torch.ones(length, length).tril()
    expected = torch.einsum("hts,sh->th", powers, as_complex(pack.inputs))
    expected = expected + decay ** (place[:, None] + 1) * as_complex(pack.state)
    assert_near(ALL[form](*pack)[0], as_planar(expected), 1e-12)


@pytest.mark.parametrize("length", [1000, 8192])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_long_history(length: int, dtype: torch.dtype) -> None:
    # 64 channels and one user: the work is cut along the channels
    pack = make_pack([length], 64, dtype)
    hidden, final = linear_scan(*pack)
    assert_near(hidden.double(), torch.from_numpy(numpy_loop(pack)), TOLERANCE[dtype])
    assert torch.equal(final[0], hidden[-1])


def test_gradients_of_a_long_history() -> None:
    expected = run(doubling_scan, make_pack([3000, 40], 8))
    for dtype in (torch.float64, torch.float32):
        for received, wanted in zip(
            run(linear_scan, make_pack([3000, 40], 8, dtype)), expected, strict=True
        ):
            # the powers of the decay in the doubling form round on their own
            assert_near(received.double(), wanted, max(TOLERANCE[dtype], 1e-11))


@pytest.mark.parametrize("form", ALL)
def test_layout_in_memory_does_not_matter(form: str) -> None:
    pack = make_pack([4, 0, 9, 2], 6)
    expected = run(ALL[form], pack)

    def turned(tensor: Tensor) -> Tensor:
        return tensor.t().contiguous().t()

    def every_second(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]

    for lay in (turned, every_second):
        leaves = [lay(tensor).detach().requires_grad_() for tensor in pack[:3]]
        assert not leaves[0].is_contiguous()

        def scan(*tensors: Tensor, lay: Callable[[Tensor], Tensor] = lay) -> tuple[Tensor, Tensor]:
            return ALL[form](*(lay(tensor) for tensor in tensors[:3]), every_second(tensors[3]))

        for received, wanted in zip(run(scan, pack), expected, strict=True):
            assert_near(received, wanted, 1e-14)
        # leaves that lie like this themselves get their gradients too
        hidden, final = ALL[form](*leaves, pack.offsets)
        hidden.square().sum().add(final.square().sum()).backward()
        plain = [tensor.clone().requires_grad_() for tensor in pack[:3]]
        hidden, final = ALL[form](*plain, pack.offsets)
        hidden.square().sum().add(final.square().sum()).backward()
        for leaf, other in zip(leaves, plain, strict=True):
            assert leaf.grad is not None
            assert other.grad is not None
            assert_near(leaf.grad, other.grad, 1e-14)


@pytest.mark.parametrize("form", ALL)
def test_gradcheck(form: str) -> None:
    pack = make_pack([3, 0, 1], channels=2)
    leaves = [tensor.requires_grad_() for tensor in pack[:3]]

    def scan(inputs: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return ALL[form](inputs, decay, state, pack.offsets)

    assert torch.autograd.gradcheck(scan, leaves)


def test_a_second_derivative_is_refused() -> None:
    pack = make_pack([4], 2)
    inputs = pack.inputs.requires_grad_()
    hidden, _ = linear_scan(*pack)
    (grad,) = torch.autograd.grad(hidden.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    channels=st.integers(1, 4),
    seed=st.integers(0, 99),
    scale=st.floats(-3, 3),
)
@settings(max_examples=15)
def test_superposition(lengths: list[int], channels: int, seed: int, scale: float) -> None:
    one, two = make_pack(lengths, channels, seed=seed), make_pack(lengths, channels, seed=seed + 1)
    for scan in ALL.values():
        first = scan(one.inputs, one.decay, one.state, one.offsets)
        second = scan(two.inputs, one.decay, two.state, one.offsets)
        inputs, state = one.inputs + scale * two.inputs, one.state + scale * two.state
        both = scan(inputs, one.decay, state, one.offsets)
        for a, b, sum_ in zip(first, second, both, strict=True):
            assert_near(sum_, a + scale * b, 1e-12)


@given(delay=st.integers(0, 12), length=st.integers(1, 20))
@settings(max_examples=15)
def test_a_later_start_moves_the_outputs(delay: int, length: int) -> None:
    pack = make_pack([length], 3)
    quiet = torch.zeros_like(pack.state)
    plain, final = linear_scan(pack.inputs, pack.decay, quiet, pack.offsets)
    inputs = torch.cat([torch.zeros(delay, 6, dtype=torch.float64), pack.inputs])
    offsets = torch.tensor([0, delay + length])
    moved, moved_final = linear_scan(inputs, pack.decay, quiet, offsets)
    assert torch.equal(moved[delay:], plain)
    assert torch.equal(moved_final, final)
    assert not moved[:delay].any()


@pytest.mark.parametrize("form", ALL)
def test_impulse_response(form: str) -> None:
    pack = make_pack([30], 3)
    inputs, state = torch.zeros_like(pack.inputs), torch.zeros_like(pack.state)
    inputs[4, :3] = 1.0
    hidden = as_complex(ALL[form](inputs, pack.decay, state, pack.offsets)[0])
    decay = torch.complex(pack.decay[0], pack.decay[1])
    assert not hidden[:4].abs().any()
    for place in range(4, 30):
        assert_near(as_planar(hidden[place]), as_planar(decay ** (place - 4)), 1e-12)


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("event", [0, 6, 7, 11])
def test_causal_to_the_bit(form: str, event: int) -> None:
    pack = make_pack([7, 0, 5], 3)
    owner = 0 if event < 7 else 2
    before, _ = ALL[form](*pack)
    changed = pack.inputs.clone()
    changed[event] += 1.0
    after, _ = ALL[form](changed, *pack[1:])
    stop = int(pack.offsets[owner + 1])
    same = torch.ones(12, dtype=torch.bool)
    same[event:stop] = False
    assert torch.equal(after[same], before[same])
    assert (after[event:stop] != before[event:stop]).any(1).all()


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    data=st.data(),
    channels=st.integers(1, 3),
)
@settings(max_examples=25)
def test_cut_anywhere_and_resume(lengths: list[int], data: st.DataObject, channels: int) -> None:
    pack = make_pack(lengths, channels)
    cuts = [data.draw(st.integers(0, length)) for length in lengths]
    starts = pack.offsets[:-1].tolist()
    early = [start + i for start, cut in zip(starts, cuts, strict=True) for i in range(cut)]
    late = [
        start + i
        for start, cut, length in zip(starts, cuts, lengths, strict=True)
        for i in range(cut, length)
    ]
    rest = [length - cut for length, cut in zip(lengths, cuts, strict=True)]
    for scan in ALL.values():
        whole, final = scan(*pack)
        offsets = torch.tensor([0, *cuts]).cumsum(0)
        first, carried = scan(pack.inputs[early], pack.decay, pack.state, offsets)
        offsets = torch.tensor([0, *rest]).cumsum(0)
        second, resumed = scan(pack.inputs[late], pack.decay, carried, offsets)
        assert_near(first, whole[early], 1e-12)
        assert_near(second, whole[late], 1e-12)
        assert_near(resumed, final, 1e-12)


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize("poisoned", [0, 1, 2, 3])
def test_nan_of_one_user_reaches_no_other_user(form: str, poisoned: int) -> None:
    pack = make_pack([4, 9, 0, 3], 3)
    clean = run(ALL[form], pack)
    start, stop = int(pack.offsets[poisoned]), int(pack.offsets[poisoned + 1])
    pack.inputs[start:stop] = float("nan")
    pack.state[poisoned] = float("nan")
    hidden, final, d_inputs, _, d_state = run(ALL[form], pack)
    others = torch.arange(4) != poisoned
    events = others.repeat_interleave(pack.offsets.diff())
    assert torch.equal(hidden[events], clean[0][events])
    assert torch.equal(final[others], clean[1][others])
    assert torch.equal(d_inputs[events], clean[2][events])
    assert torch.equal(d_state[others], clean[4][others])
    # the NaN shows in the user's own outputs
    assert final[poisoned].isnan().all()


def test_alone_equals_together_to_the_bit() -> None:
    # 24 users at once, then one by one: another cut of the work, the same bits
    lengths = [3, 0, 17, 1] * 6
    pack = make_pack(lengths, 64, torch.float32)
    hidden, final = linear_scan(*pack)
    for user, length in enumerate(lengths):
        own = slice(int(pack.offsets[user]), int(pack.offsets[user + 1]))
        offsets = torch.tensor([0, length])
        state = pack.state[user : user + 1]
        alone, alone_final = linear_scan(pack.inputs[own], pack.decay, state, offsets)
        assert torch.equal(alone, hidden[own])
        assert torch.equal(alone_final[0], final[user])


def test_stable_over_a_hundred_thousand_events() -> None:
    length, radius = 100_000, torch.tensor([0.5, 0.99, 0.9999, 0.99999], dtype=torch.float64)
    pack = make_pack([length], 4)
    angle = torch.tensor([0.0, 0.1, 3.0, 0.0], dtype=torch.float64)
    decay = torch.stack([radius * angle.cos(), radius * angle.sin()]).float()
    narrow = Pack(pack.inputs.float(), decay, pack.state.float(), pack.offsets)
    wide = Pack(*(tensor.double() for tensor in narrow[:3]), pack.offsets)
    hidden, _ = linear_scan(*narrow)
    exact, _ = linear_scan(*wide)
    assert torch.isfinite(hidden).all()
    # a rounding error fades like the state itself: about eps / (1 - |decay|) at worst
    scale = exact.abs().amax(0).clamp(min=1)
    error = (hidden.double() - exact).abs().amax(0) / scale
    bound = 2.0**-24 / (1 - radius.repeat(2)) + 1e-6
    assert (error <= bound).all(), (error, bound)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads to compare")
@pytest.mark.parametrize("lengths", [[150, 3, 40], [9, 0, 31, 5] * 10], ids=["few", "many"])
@pytest.mark.usefixtures("threads")
def test_equal_bits_for_any_number_of_threads(lengths: list[int]) -> None:
    pack = make_pack(lengths, 64, torch.float32)
    results = []
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        numba.set_num_threads(count)
        results.append(run(linear_scan, pack))
    for received in results[1:]:
        for one, many in zip(results[0], received, strict=True):
            assert torch.equal(one, many)


def test_inputs_are_not_changed() -> None:
    pack = make_pack([4, 0, 3], 2)
    copies = [tensor.clone() for tensor in pack]
    for scan in ALL.values():
        run(scan, pack)
        for tensor, copy in zip(pack, copies, strict=True):
            assert torch.equal(tensor, copy)


def test_last_states_of_users_without_events() -> None:
    state = torch.arange(6.0).reshape(3, 2)
    hidden = torch.tensor([[7.0, 8.0]])
    final = last_states(hidden, state, torch.tensor([0, 0, 1, 1]))
    assert final.tolist() == [[0.0, 1.0], [7.0, 8.0], [4.0, 5.0]]


@pytest.mark.parametrize("form", ALL)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": torch.zeros(5, 3)}, r"inputs \(5, 3\)"),
        ({"decay": torch.zeros(2, 3)}, r"decay \(2, 3\)"),
        ({"decay": torch.zeros(2)}, r"decay \(2,\)"),
        ({"state": torch.zeros(3, 4)}, r"state \(3, 4\)"),
        ({"state": torch.zeros(2, 2)}, r"state \(2, 2\)"),
        ({"offsets": torch.tensor([0, 5])}, "2 offsets"),
        ({"offsets": torch.tensor([0, 2, 4])}, "from 0 to 5"),
        ({"offsets": torch.tensor([1, 2, 5])}, "from 0 to 5"),
        ({"offsets": torch.tensor([0, 7, 5])}, "never falling"),
        ({"state": torch.zeros(2, 4, dtype=torch.float64)}, "cast them first"),
        ({"inputs": torch.zeros(5, 4, dtype=torch.bfloat16)}, "cast them first"),
    ],
    ids=str,
)
def test_the_errors_of_invalid_shapes_name_them(
    form: str, change: dict[str, Tensor], message: str
) -> None:
    pack = make_pack([2, 3], 2, torch.float32)._replace(**change)
    with pytest.raises(ValueError, match=message):
        ALL[form](*pack)
