"""Speed of pointwise attention, forward and backward: fused blocks against the published form.

    python benchmarks/attention.py

One user, causal, 2 heads of width 32, one thread. The limit: 14 products of 32 numbers per pair and
head (4 E operations forward, 10 E backward) and two exponentials. The published form materialises a
matrix of all queries by all keys for each head, and stores several of them for the backward pass.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Annotated, Any

import numba
import torch
import typer

from everlong.ops import pointwise_attention as module
from everlong.ops.attention_mask import MaskRuns, block_mask, split_runs
from everlong.ops.pointwise_attention import (
    RelativeBias,
    dense_attention,
    elapsed_bucket,
    pointwise_attention,
)
from record import peak_mib, write_result

HEADS, SIZE, ROUNDS = 2, 32, 5
LENGTHS = (512, 1_024, 2_048, 4_096)
FORMS = ("fused", "torch", "published")


def main(
    form: Annotated[str, typer.Option(help="peak memory of one form, in this process")] = "",
    length: Annotated[int, typer.Option(help="events of the user")] = 2_048,
) -> None:
    """Writes results/attention.json."""
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    if form:
        calls(length)[form]()
        print(peak_mib())
        return
    figures: dict[str, Any] = {
        "threads": 1,
        "heads": HEADS,
        "size": SIZE,
        "operations_per_pair_and_head": 14 * SIZE,
        "product_operations_per_second": product_rate(),
        "lengths": {},
    }
    for number in LENGTHS:
        figures["lengths"][number] = compare(number, figures["product_operations_per_second"])
        print(number, json.dumps(figures["lengths"][number], indent=1), flush=True)
    print("written to", write_result("attention", figures))


def calls(length: int) -> dict[str, Callable[[], None]]:
    """Each form, forward and backward on the same numbers."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(length, HEADS, SIZE, generator=generator, requires_grad=True) for _ in range(3)
    )
    distance = torch.randn(length, generator=generator, requires_grad=True)
    elapsed = torch.randn(64, generator=generator, requires_grad=True)
    gradient = torch.randn(length, HEADS, SIZE, generator=generator)
    place = torch.arange(length)
    times = place * 3_600
    _, begin, queries = split_runs(torch.tensor([length]))
    spans = MaskRuns(begin * 0, begin, queries, begin, begin * 0)
    mask = block_mask(spans, lambda owner, column: owner + column)
    bias = RelativeBias(distance, elapsed, times, times)

    def blocks(fused: bool) -> None:
        before, module._fused = module._fused, lambda scores: fused
        pointwise_attention(query, key, value, mask, bias).backward(gradient)
        module._fused = before

    def published() -> None:
        between = place[:, None] - place
        table = distance[between.clamp(min=0)] + elapsed[elapsed_bucket(between * 3_600)]
        dense_attention(query, key, value, between >= 0, table).backward(gradient)

    return {"fused": lambda: blocks(True), "torch": lambda: blocks(False), "published": published}


def compare(length: int, rate: float) -> dict[str, Any]:
    """Median seconds in turns, ratios, peak memory, and the share of the limit."""
    forms = calls(length)
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    for turn in range(ROUNDS + 1):
        for name in FORMS:
            began = time.perf_counter()
            forms[name]()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    limit = HEADS * length * (length + 1) / 2 * 14 * SIZE / rate
    paired = zip(seconds["published"], seconds["fused"], strict=True)
    return {
        "milliseconds": {name: round(1e3 * median(s), 2) for name, s in seconds.items()},
        "fused against published": round(median(a / b for a, b in paired), 2),
        "share_of_limit": round(limit / median(seconds["fused"]), 3),
        "peak_mib": {name: round(in_a_process(name, length), 1) for name in FORMS},
    }


def in_a_process(form: str, length: int) -> float:
    command = [sys.executable, __file__, "--form", form, "--length", str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def product_rate() -> float:
    """Operations a second of products in the shape of a block."""
    a, b = torch.randn(4, 128, SIZE), torch.randn(4, SIZE, 2_048)
    seconds = []
    for _ in range(30):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * a.numel() * b.shape[-1] / min(seconds)


if __name__ == "__main__":
    typer.run(main)
