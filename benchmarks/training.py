"""Training speed at the shape of ML-1M, compared with LRURec as published in one run.

    python benchmarks/training.py            # speed, equality of losses, memory
    python benchmarks/training.py --rounds 9

Each round trains both on the same 1,280 windows (about 155,000 labelled events): the published
algorithm on padded batches of 128 rows with complex recursive doubling and full logits,
``everlong`` with its own training loop. Ratios are computed within a round, because the speed of
the machine varies.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import torch
import typer
from torch import Tensor

from everlong.data.dataset import Dataset
from everlong.data.events import Events, read_events
from everlong.data.split import PAPER, Split, TrainSegments, split
from everlong.models.lru import LRU, LRUConfig
from everlong.training.next_item import train
from everlong.training.next_item_losses import full_softmax
from everlong.training.settings import TrainConfig
from published_lru import PublishedLRU
from record import peak_mib, write_result

ROWS = 128
BATCHES = 10
LOG = Path(__file__).parents[2] / "shared" / "data" / "ml-1m" / "interactions.parquet"
PRECISIONS = {"everlong_float32": "float32", "everlong_bfloat16": "bfloat16"}


def main(
    rounds: Annotated[int, typer.Option(help="rounds to time")] = 5,
    memory_of: Annotated[str, typer.Option(help="internal: measure the peak of one form")] = "",
) -> None:
    """Times both, checks that they compute the same loss, and writes results/training.json."""
    parts = split(log_like_ml1m(), PAPER)
    if memory_of:
        run_form(memory_of, parts, chosen(parts, 0), torch.Generator().manual_seed(0))
        print(json.dumps({"peak_mib": peak_mib()}))
        return
    losses = compare_losses(parts)
    print("loss of the same parameters on the same windows:", losses)
    forms = ["published", *PRECISIONS]
    rates: dict[str, list[float]] = {form: [] for form in forms}
    generator = torch.Generator().manual_seed(0)
    for number in range(rounds + 1):
        for form in forms:
            rate = run_form(form, parts, chosen(parts, number), generator)
            if number:  # the first round warms caches and compiles
                rates[form].append(rate)
                print(f"round {number}: {form:18} {rate:10,.0f} labelled events/s", flush=True)
    memory = {form: peak(form) for form in ["nothing", *forms]}
    figures = summary(rates, memory, losses, parts)
    print(json.dumps(figures, indent=2))
    print("written to", write_result("training", figures))


def log_like_ml1m() -> Events:
    """ML-1M if available, else random items in histories of the same lengths."""
    if LOG.is_file():
        return read_events(LOG, timestamp="order")
    random = np.random.default_rng(0)
    lengths = np.clip(np.exp(random.normal(4.6, 0.98, 6_040)), 18, 2_277).astype(int)
    frame = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(6_040), lengths),
            "item_id": random.integers(0, 3_416, lengths.sum()),
        }
    )
    return read_events(frame, timestamp=None)


def chosen(parts: Split, number: int) -> TrainSegments:
    """1,280 windows, others in each round."""
    order = np.random.default_rng(number).permutation(len(parts.train.start))[: ROWS * BATCHES]
    return TrainSegments(*(values[order] for values in parts.train))


def fresh(parts: Split, dropout: float = 0.2) -> LRU:
    torch.manual_seed(0)
    config = LRUConfig(num_items=parts.events.num_items)
    return LRU(replace(config, dropout=dropout, recurrence_dropout=dropout))


def run_form(form: str, parts: Split, windows: TrainSegments, generator: torch.Generator) -> float:
    """Labelled events per second of one form over some windows."""
    if form == "nothing":
        return 0.0
    if form == "published":
        return run_published(PublishedLRU(fresh(parts)), parts, windows)
    dataset = Dataset(parts.events, windows)
    config = TrainConfig(epochs=1, precision=PRECISIONS[form], batch_events=16_384)  # type: ignore[arg-type]
    result = train(fresh(parts), dataset, config)
    return float(result.history[-1]["events_per_second"])


def run_published(model: PublishedLRU, parts: Split, windows: TrainSegments) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-9, weight_decay=0.01)
    labels, began = 0, time.perf_counter()
    for start in range(0, len(windows.start), ROWS):
        items, targets = padded(parts, windows, slice(start, start + ROWS))
        optimizer.zero_grad()
        model.loss(items, targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        labels += int((targets > 0).sum())
    return labels / (time.perf_counter() - began)


def padded(parts: Split, windows: TrainSegments, rows: slice) -> tuple[Tensor, Tensor]:
    """Rows of 200 inputs and labels, items from 1, zeros on the left (the published layout)."""
    length = PAPER.window or 200
    inputs, targets = np.zeros((2, len(windows.start[rows]), length), dtype=np.int64)
    for row, (begin, stop, first) in enumerate(
        zip(windows.start[rows], windows.stop[rows], windows.label_start[rows], strict=True)
    ):
        items = parts.events.items[begin:stop].astype(np.int64) + 1
        labelled = items[first - begin :]
        targets[row, length - len(labelled) :] = labelled
        inputs[row, length - len(items) + 1 :] = items[:-1]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def compare_losses(parts: Split) -> dict[str, float]:
    """The loss of equal parameters without dropout, by each form, on one published batch."""
    windows = TrainSegments(*(values[:ROWS] for values in chosen(parts, 0)))
    model = fresh(parts, dropout=0.0)
    # far from the flat start, so that equal losses mean something
    train(model, Dataset(parts.events, chosen(parts, 1)), TrainConfig(epochs=2, lr=3e-3))
    model.train()
    items, targets = padded(parts, windows, slice(0, ROWS))
    found = {"published": PublishedLRU(model).loss(items, targets).item()}
    batch = next(Dataset(parts.events, windows).batches(1 << 20, seed=0, epoch=0))
    answers = batch.events.items[batch.labels]
    for form, name in PRECISIONS.items():
        dtype = getattr(torch, name)
        with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            vectors = model(batch.events)[batch.labels].float()
            found[form] = float(
                full_softmax(vectors, model.item_embeddings(), answers, dtype=dtype)
            )
    return found


def peak(form: str) -> float:
    """Peak memory (MiB) of a process that trains one form only."""
    command = [sys.executable, __file__, "--memory-of", form]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


def summary(
    rates: dict[str, list[float]], memory: dict[str, float], losses: dict[str, float], parts: Split
) -> dict[str, Any]:
    config = LRUConfig(num_items=parts.events.num_items)
    operations = limit_operations(config)
    figures: dict[str, Any] = {
        "shape": "ml-1m, paper protocol, window 200" if LOG.is_file() else "random, ml-1m lengths",
        "labelled_events_per_second": {k: sorted(v)[len(v) // 2] for k, v in rates.items()},
        "rounds": rates,
        "allocator": "glibc malloc with its default settings, for all forms",
        "peak_memory_mib": memory,
        "loss": losses,
        "loss_difference": {k: abs(losses[k] - losses["published"]) for k in PRECISIONS},
        "limit": {"operations_per_event": operations, "bytes_per_event": limit_bytes(config)},
        "ratio": {},
        "memory_ratio": {},
        "share_of_limit": {},
    }
    for form, precision in PRECISIONS.items():
        pairs = [a / b for a, b in zip(rates[form], rates["published"], strict=True)]
        figures["ratio"][form] = {"median": sorted(pairs)[len(pairs) // 2], "min": min(pairs)}
        above = memory[form] - memory["nothing"]
        figures["memory_ratio"][form] = above / (memory["published"] - memory["nothing"])
        peak_rate = product_rate(getattr(torch, precision))
        figures["limit"][f"{precision}_operations_per_second"] = peak_rate
        achieved = figures["labelled_events_per_second"][form]
        figures["share_of_limit"][form] = achieved * operations / peak_rate
    return figures


def limit_operations(config: LRUConfig) -> int:
    """Operations of the matrix products per labelled event: forward and two products backward."""
    block = 2 * config.dim * 2 * config.channels * 2 + 2 * config.dim * 4 * config.dim * 2
    return 3 * (config.layers * block + 2 * config.dim * config.num_items)


def limit_bytes(config: LRUConfig) -> int:
    """Bytes per event that must move if each layer's activations are written and read once."""
    layer = 4 * (2 * 2 * config.channels + 2 * 4 * config.dim + 4 * config.dim)
    return 3 * config.layers * layer


def product_rate(dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product on this machine."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


if __name__ == "__main__":
    typer.run(main)
