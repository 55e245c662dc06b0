"""The Triton scan equals the reference: in the interpreter anywhere, on CUDA where there is one.

The interpreter proves the arithmetic of the kernels on CPU tensors; compiling for a named device
proves that the compiler takes them; only the tests marked ``gpu`` run what it made.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.forms import slow
from torch import Tensor

import everlong.ops.linear_scan as linear

NAME = "everlong.ops.linear_scan_triton"
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="the package triton is not installed")
needs_gpu = pytest.mark.skipif(
    not (HAS_TRITON and torch.cuda.is_available()), reason="needs triton and a CUDA device"
)
RAGGED = {
    "empty users": [0, 3, 0, 0, 5, 0],
    "around a chunk": [7, 8, 9, 16, 17],
    "one long": [45],
    "no events": [0, 0],
    "no users": [],
}
# the single pass, tiny chunks, several chunks a user, and what the rule chooses
CHUNKS = [0, 2, 8, None]
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


def run(scan: Any, pack: Pack) -> list[Tensor]:
    """Values, final states, and the gradients of a random weighing of both, on the CPU."""
    leaves = [tensor.clone().requires_grad_() for tensor in pack[:3]]
    hidden = scan(*leaves, pack.offsets)
    final = linear.last_states(hidden, leaves[2], pack.offsets)
    random = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
    for part in (hidden, final):
        weights = torch.randn(part.shape, generator=random, dtype=torch.float64)
        loss = loss + (part * weights.to(part)).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [tensor.detach().cpu() for tensor in (hidden, final, *grads)]


def expected_of(pack: Pack) -> list[Tensor]:
    wide = Pack(*(tensor.double() for tensor in pack[:3]), pack.offsets)
    return run(lambda *tensors: linear.reference_scan(*tensors)[0], wide)


def assert_all_near(received: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for part, wanted in zip(received, expected, strict=True):
        assert part.shape == wanted.shape
        if wanted.numel():
            scale = wanted.abs().max().clamp(min=1).item()
            worst = (part.double() - wanted).abs().max().item()
            assert worst <= tolerance * scale, f"off by {worst:.3g} at a scale of {scale:.3g}"


def load() -> ModuleType:
    """A private copy of the module: how it decorates its kernels is decided when it loads."""
    spec = importlib.util.find_spec(NAME)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def interpreted() -> ModuleType:
    pytest.importorskip("triton", reason="the package triton is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        return load()


@pytest.mark.parametrize("chunk", [0, slow(2), 8, slow(None)])
@pytest.mark.parametrize("lengths", RAGGED.values(), ids=RAGGED)
def test_equals_reference(interpreted: ModuleType, lengths: list[int], chunk: int | None) -> None:
    for channels, dtype in ((5, torch.float64), (33, torch.float32)):
        pack = make_pack(lengths, channels, dtype)
        received = run(lambda *tensors: interpreted.TritonScan.apply(*tensors, chunk), pack)
        assert received[0].dtype == dtype
        assert_all_near(received, expected_of(pack), TOLERANCE[dtype])


def test_default_chunks_cross_their_borders(interpreted: ModuleType) -> None:
    chunk = interpreted.CHUNK
    pack = make_pack([chunk - 1, 0, chunk, chunk + 1, 2 * chunk + 5], 3)
    assert interpreted.chunk_length(pack.inputs.shape[0], 5, 3) == chunk
    assert_all_near(run(interpreted.TritonScan.apply, pack), expected_of(pack), 1e-12)


@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    chunk=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
@settings(max_examples=8)
def test_any_ragged_pack_in_any_chunks(
    interpreted: ModuleType, lengths: list[int], chunk: int, seed: int
) -> None:
    pack = make_pack(lengths, 2, seed=seed)
    received = run(lambda *tensors: interpreted.TritonScan.apply(*tensors, chunk), pack)
    assert_all_near(received, expected_of(pack), 1e-12)


@pytest.mark.parametrize("chunk", [0, 2])
def test_gradcheck(interpreted: ModuleType, chunk: int) -> None:
    pack = make_pack([0, 3], channels=1)
    leaves = [tensor.requires_grad_() for tensor in pack[:3]]

    def scan(inputs: Tensor, decay: Tensor, state: Tensor) -> Tensor:
        hidden: Tensor = interpreted.TritonScan.apply(inputs, decay, state, pack.offsets, chunk)
        return hidden

    assert torch.autograd.gradcheck(scan, leaves)


@pytest.mark.parametrize("chunk", [0, 4])
def test_layout_in_memory_does_not_matter(interpreted: ModuleType, chunk: int) -> None:
    pack = make_pack([4, 0, 9, 2], 3)

    def scan(*tensors: Tensor) -> Tensor:
        turned = [tensor.t().contiguous().t() for tensor in tensors[:3]]
        offsets = tensors[3].repeat_interleave(2)[::2]
        assert not turned[0].is_contiguous()
        hidden: Tensor = interpreted.TritonScan.apply(*turned, offsets, chunk)
        return hidden

    assert_all_near(run(scan, pack), expected_of(pack), 1e-12)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("chunk", [0, 4])
@pytest.mark.parametrize("poisoned", [0, 1, 2])
def test_nan_of_one_user_reaches_no_other_user(
    interpreted: ModuleType, poisoned: int, chunk: int
) -> None:
    def scan(*tensors: Tensor) -> Tensor:
        hidden: Tensor = interpreted.TritonScan.apply(*tensors, chunk)
        return hidden

    pack = make_pack([6, 9, 3], 3)
    clean = run(scan, pack)
    start, stop = int(pack.offsets[poisoned]), int(pack.offsets[poisoned + 1])
    pack.inputs[start:stop] = float("nan")
    pack.state[poisoned] = float("nan")
    hidden, final, d_inputs, _, d_state = run(scan, pack)
    others = torch.arange(3) != poisoned
    events = others.repeat_interleave(pack.offsets.diff())
    for received, wanted in ((hidden, clean[0]), (d_inputs, clean[2])):
        assert torch.equal(received[events], wanted[events])
    for received, wanted in ((final, clean[1]), (d_state, clean[4])):
        assert torch.equal(received[others], wanted[others])
    assert final[poisoned].isnan().all()


def test_carried_states_join_two_halves(interpreted: ModuleType) -> None:
    pack = make_pack([20], 3)
    whole = interpreted.TritonScan.apply(*pack, 8)
    first = interpreted.TritonScan.apply(
        pack.inputs[:13], pack.decay, pack.state, torch.tensor([0, 13]), 8
    )
    second = interpreted.TritonScan.apply(
        pack.inputs[13:], pack.decay, first[-1:], torch.tensor([0, 7]), 8
    )
    assert_all_near([first, second], [whole[:13], whole[13:]], 1e-12)


def test_the_form_is_chosen_by_shapes(interpreted: ModuleType) -> None:
    choose = interpreted.chunk_length
    assert choose(interpreted.CHUNK, 1, 128) == 0  # no history is longer than a chunk
    assert choose(8192, 1, 128) == interpreted.CHUNK
    assert choose(128 * 200, 128, 128) == interpreted.CHUNK
    assert choose(2048 * 200, 2048, 128) == 0  # users alone fill the device
    assert choose(2048 * 2000, 2048, 128) == interpreted.CHUNK  # but these are long


def test_a_chunk_length_is_a_power_of_two(interpreted: ModuleType) -> None:
    with pytest.raises(ValueError, match="power of two, received 48"):
        interpreted.TritonScan.apply(*make_pack([3], 2), 48)


def test_a_second_derivative_is_refused(interpreted: ModuleType) -> None:
    pack = make_pack([4], 2)
    inputs = pack.inputs.requires_grad_()
    hidden = interpreted.TritonScan.apply(*pack)
    (grad,) = torch.autograd.grad(hidden.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@needs_triton
@pytest.mark.parametrize("number", ["*fp32", "*fp64"])
def test_the_compiler_takes_every_kernel(
    number: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    # an empty cache, so that every kernel is compiled here
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module = load()
    constants = {"LANES": module.BLOCK, "CHUNK_LENGTH": module.CHUNK}
    tables = {"offsets", "starts", "stops", "users"}
    compiled_ones = [one for one in vars(module).values() if isinstance(one, triton.JITFunction)]
    # a function that kernels call has no table of its own to read
    kernels = [kernel for kernel in compiled_ones if tables & {*kernel.arg_names}]
    assert len(kernels) == 5
    for kernel in kernels:
        for reverse in (False, True) if "REVERSE" in kernel.arg_names else (False,):
            known = {**constants, "REVERSE": reverse}
            signature = {
                name: "constexpr"
                if name in known
                else "*i64"
                if name in tables
                else "i32"
                if name == "channels"
                else number
                for name in kernel.arg_names
            }
            used = {name: known[name] for name in kernel.arg_names if name in known}
            source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=used)
            compiled = triton.compile(
                source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}
            )
            assert compiled.asm["cubin"]
            # memory is read ahead of the walk, but for the table, which reads two numbers
            assert ("cp.async" in compiled.asm["ptx"]) == ("channels" in kernel.arg_names)


def test_triton_is_not_imported_on_cpu() -> None:
    code = (
        "import sys, torch\n"
        "from everlong.ops.linear_scan import linear_scan\n"
        "offsets = torch.tensor([0, 3])\n"
        "linear_scan(torch.ones(3, 2), torch.ones(2, 1), torch.ones(1, 2), offsets)\n"
        f"assert {NAME!r} not in sys.modules\n"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ModuleNotFoundError, match="pip install triton"):
        load()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("chunk", [*CHUNKS, 64])
def test_cuda_equals_cpu(chunk: int | None, dtype: torch.dtype) -> None:
    from everlong.ops.linear_scan_triton import TritonScan

    packs = [*RAGGED.values(), [3000, 1, 64], [200] * 40]
    for lengths, channels in product(packs, (1, 5, 128)):
        pack = make_pack(lengths, channels, dtype)
        wide = Pack(*(tensor.double() for tensor in pack[:3]), pack.offsets)
        expected = run(lambda *tensors: linear.linear_scan(*tensors)[0], wide)
        device = Pack(*(tensor.cuda() for tensor in pack))
        received = run(lambda *tensors: TritonScan.apply(*tensors, chunk), device)
        assert_all_near(received, expected, TOLERANCE[dtype])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("chunk", [0, 64])
def test_cuda_gives_equal_bits_on_every_run(chunk: int) -> None:
    from everlong.ops.linear_scan_triton import TritonScan

    pack = Pack(*(tensor.cuda() for tensor in make_pack([900, 3, 0, 77], 128, torch.float32)))
    first = run(lambda *tensors: TritonScan.apply(*tensors, chunk), pack)
    for _ in range(5):
        again = run(lambda *tensors: TritonScan.apply(*tensors, chunk), pack)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_linear_scan_takes_cuda_tensors() -> None:
    pack = make_pack([4, 0, 90], 6, torch.float32)
    hidden, final = linear.linear_scan(*(tensor.cuda() for tensor in pack))
    expected = linear.linear_scan(*(tensor.double() for tensor in pack[:3]), pack.offsets)
    assert_all_near([hidden.cpu(), final.cpu()], list(expected), 1e-5)
