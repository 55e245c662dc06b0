"""Linear against softmax attention: one relevant event among many irrelevant ones.

    python benchmarks/planted_match.py

A history has one of 16 keys at a random position among L fillers. Each of five candidates is the
partner of a key; the target is the partner of the key in the history (chance 0.2). Each reader is
trained separately for each L, with the same number of updates. Linear attention accesses the
history only through sums, so its feature map limits the sharpness of attention. With recent events,
softmax attention also covers the last 32; the key is one of them in 32 of L cases.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from everlong.models.batch import Batch, RequestBatch
from everlong.models.ifa import IFA, IFAConfig
from everlong.models.ranker import Ranker
from everlong.models.target_attention import TargetAttention, TargetAttentionConfig
from everlong.system.provenance import hardware, versions
from everlong.training.ranker_losses import ranker_loss
from record import RESULTS

KEYS, FILLERS, SHOWN = 16, 200, 5
LENGTHS = (32, 100, 316, 1_000)
BATCH = 32
READERS: Mapping[str, Mapping[str, Any]] = {
    "mean": {"reader": "mean"},
    "softmax": {"reader": "softmax"},
    "SIM soft": {"reader": "sim_soft"},
    "linear, elu": {"feature_map": "elu", "window": 0},
    "linear, exp": {"feature_map": "exp", "window": 0},
    "linear, random": {"feature_map": "random", "window": 0},
    "linear, taylor": {"feature_map": "taylor", "window": 0},
    "linear, elu, and recent": {"feature_map": "elu", "window": 32},
}


def main(updates: int = 1_600, seeds: int = 1) -> None:
    """Trains and tests all readers at all lengths, except those with a result."""
    path = RESULTS / "planted_match.json"
    record = json.loads(path.read_text()) if path.exists() else {"runs": []}
    record |= {"updates": updates, "batch": BATCH, "keys": KEYS, "fillers": FILLERS}
    for seed in range(seeds):
        for length in LENGTHS:
            for name, shape in READERS.items():
                key = {"reader": name, "length": length, "seed": seed}
                if any(key.items() <= run.items() for run in record["runs"]):
                    continue
                right = one(shape, length, updates, seed)
                record["runs"].append({**key, "HitRate@1": right})
                record |= {"versions": versions(), "hardware": hardware()}
                path.write_text(json.dumps(record, indent=1) + "\n")
                print(key, right, flush=True)
    draw(record, path.with_suffix(".png"))


def one(shape: Mapping[str, Any], length: int, updates: int, seed: int) -> float:
    """The share of requests whose first place is right, of a reader trained at a length."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    common = {"num_items": 2 * KEYS + FILLERS, "dim": 32, "heads": 2, "dropout": 0.0}
    common |= {"clock": False, "candidate_attention": False}
    model: Ranker
    if "reader" in shape:
        model = TargetAttention(TargetAttentionConfig(**{**common, **shape, "window": length + 1}))
    else:
        model = IFA(IFAConfig(**{**common, **shape, "layers": 1}))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        batch = draw_requests(generator, length)
        optimizer.zero_grad()
        loss = ranker_loss(model.rank(batch), batch.labels, batch.offsets, {"listwise": 1.0})
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        rate.step()
    model.eval()
    right = []
    with torch.no_grad():
        for _ in range(20):
            batch = draw_requests(generator, length)
            best = model.rank(batch).reshape(-1, SHOWN).argmax(1)
            right.append(batch.labels.reshape(-1, SHOWN).gather(1, best[:, None]))
    return float(torch.cat(right).mean())


def draw_requests(generator: np.random.Generator, length: int) -> RequestBatch:
    """Histories of L fillers and a key, and five candidates of which one is its partner."""
    histories = 2 * KEYS + generator.integers(FILLERS, size=(BATCH, length + 1))
    partners = np.stack([generator.permutation(KEYS)[:SHOWN] for _ in range(BATCH)])
    answer = generator.integers(SHOWN, size=BATCH)
    rows = np.arange(BATCH)
    histories[rows, generator.integers(length + 1, size=BATCH)] = partners[rows, answer]
    labels = np.zeros((BATCH, SHOWN), dtype=np.float32)
    labels[rows, answer] = 1.0
    users = torch.arange(BATCH)
    times = torch.arange(length + 1).repeat(BATCH)
    return RequestBatch(
        events=Batch(
            items=torch.from_numpy(histories.flatten()),
            times=times,
            offsets=torch.arange(BATCH + 1) * (length + 1),
        ),
        user=users,
        cut=torch.full((BATCH,), length + 1),
        times=torch.full((BATCH,), length + 1),
        offsets=torch.arange(BATCH + 1) * SHOWN,
        items=torch.from_numpy(KEYS + partners.flatten()),
        labels=torch.from_numpy(labels.flatten()),
        rows=users,
    )


def draw(record: Mapping[str, Any], path: Path) -> None:
    """A PNG: the share of right answers over the length of the history."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name in READERS:
        curve = [
            np.mean(
                [
                    r["HitRate@1"]
                    for r in record["runs"]
                    if (r["reader"], r["length"]) == (name, length)
                ]
            )
            for length in LENGTHS
        ]
        axes.plot(LENGTHS, curve, "o-", label=name, linewidth=1)
    axes.axhline(1 / SHOWN, color="grey", linestyle=":", label="chance")
    axes.set(xscale="log", xlabel="events of which one matters", ylabel="HitRate@1", ylim=(0, 1.02))
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110, format="png")


if __name__ == "__main__":
    typer.run(main)
