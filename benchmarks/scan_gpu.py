"""Times the linear scan on a CUDA device: the published doubling against the Triton kernels.

    python benchmarks/scan_gpu.py --output scan_gpu.json

Each time is the median of runs with a cold second-level cache, by CUDA events, launches included.
`limit_ms` is the time that the least possible bytes take at the bandwidth of a plain copy on the
same device: forward reads `u` and writes `h`, backward reads `dh` and `h` and writes `du`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everlong.ops.linear_scan import doubling_scan

SHAPES = [(128, 200), (32, 1000), (1, 8192)]  # users, events of each
Timer = Callable[[Callable[[], object]], float]
"""Milliseconds that a call takes."""


def make_pack(users: int, length: int, channels: int, device: str) -> tuple[Tensor, ...]:
    """Inputs, decay, state and offsets of a scan, float32, the same on every run."""
    random = torch.Generator().manual_seed(0)
    radius = 0.8 + 0.19 * torch.rand(channels, generator=random)
    angle = 2 * torch.pi * torch.rand(channels, generator=random)
    decay = torch.stack([radius * angle.cos(), radius * angle.sin()])
    inputs = torch.randn(users * length, 2 * channels, generator=random)
    state = torch.randn(users, 2 * channels, generator=random)
    offsets = torch.arange(users + 1) * length
    return tuple(tensor.to(device) for tensor in (inputs, decay, state, offsets))


def forms() -> dict[str, Callable[..., Tensor]]:
    """What is timed, by name; every form returns ``hidden [N, 2H]``."""
    from everlong.ops.linear_scan_triton import CHUNK, TritonScan

    return {
        "doubling": lambda *pack: doubling_scan(*pack)[0],
        "triton single pass": lambda *pack: TritonScan.apply(*pack, 0),
        "triton chunked": lambda *pack: TritonScan.apply(*pack, CHUNK),
        "triton": lambda *pack: TritonScan.apply(*pack),
    }


def copy_bandwidth(timer: Timer, device: str, size: int = 1 << 30) -> float:
    """Bytes a second of a plain copy, read and written bytes both counted."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / (timer(lambda: target.copy_(source)) / 1000)


def measure(
    users: int, length: int, channels: int, *, bandwidth: float, device: str, timer: Timer
) -> list[dict[str, Any]]:
    """One row per form and direction.

    Raises:
        RuntimeError: if a form departs from the doubling form, whose times would mean nothing.
    """
    inputs, decay, state, offsets = make_pack(users, length, channels, device)
    leaves = [tensor.requires_grad_() for tensor in (inputs, decay, state)]
    weights = torch.randn_like(inputs)
    events = users * length
    rows: list[dict[str, Any]] = []
    expected: list[Tensor] = []
    for name, scan in forms().items():
        hidden = scan(*leaves, offsets)
        received = [hidden.detach(), *torch.autograd.grad(hidden, leaves, weights)]
        expected = expected or received
        errors = [
            float((a - b).abs().max() / b.abs().max())
            for a, b in zip(received, expected, strict=True)
        ]
        if not max(errors) < 1e-4:
            raise RuntimeError(
                f"{name} at B={users}, T={length}: expected the values and gradients of doubling "
                f"to 1e-4, received errors of {errors}; fix the kernel before timing it"
            )
        hidden = scan(*leaves, offsets)

        def forward(scan: Callable[..., Tensor] = scan) -> Tensor:
            with torch.no_grad():
                return scan(*leaves, offsets)

        def backward(hidden: Tensor = hidden) -> tuple[Tensor, ...]:
            return torch.autograd.grad(hidden, leaves, weights, retain_graph=True)

        for direction, call, floats in (("forward", forward, 4), ("backward", backward, 6)):
            moved = events * floats * channels * 4
            time, limit = timer(call), moved / bandwidth * 1000
            rows.append(
                {
                    "users": users,
                    "events_a_user": length,
                    "channels": channels,
                    "form": name,
                    "direction": direction,
                    "ms": time,
                    "limit_ms": limit,
                    "least_bytes": moved,
                    "share_of_peak": limit / time,
                    "worst_error": max(errors),
                }
            )
    return rows


def versions() -> dict[str, str]:
    """Hardware and software that the times belong to."""
    import triton

    return {
        "device": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def report(rows: list[dict[str, Any]]) -> str:
    """The rows as a table."""
    lines = [f"{'users':>6} {'events':>7} {'direction':9} {'form':19} {'ms':>9} {'of peak':>8}"]
    lines += [
        f"{row['users']:>6} {row['events_a_user']:>7} {row['direction']:9} {row['form']:19} "
        f"{row['ms']:>9.4f} {row['share_of_peak']:>8.1%}"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Measures, prints a table and writes JSON where asked; 1 without a CUDA device."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--channels", type=int, default=128, help="complex channels H")
    parser.add_argument("--output", type=Path, help="where to write the rows as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "this benchmark needs a CUDA device and torch sees none; "
            "run it on a machine with a GPU and a CUDA build of torch",
            file=sys.stderr,
        )
        return 1
    try:
        from triton.testing import do_bench
    except ModuleNotFoundError:
        print("this benchmark needs the package triton; run `pip install triton`", file=sys.stderr)
        return 1

    def timer(call: Callable[[], object]) -> float:
        return float(do_bench(call, warmup=50, rep=300, return_mode="median"))

    bandwidth = copy_bandwidth(timer, "cuda")
    rows = []
    for users, length in SHAPES:
        rows += measure(
            users, length, arguments.channels, bandwidth=bandwidth, device="cuda", timer=timer
        )
    print(report(rows))
    print(f"peak: {bandwidth / 1e12:.2f} TB/s, a plain copy on {torch.cuda.get_device_name()}")
    if arguments.output:
        result = {"versions": versions(), "copy_bytes_per_s": bandwidth, "rows": rows}
        arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
