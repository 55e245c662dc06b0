"""Ablations of PerSRec: one command per ablation, each with a plot.

    python benchmarks/ablations.py tokens         # 1, 2, 4, 8 or 16 tokens
    python benchmarks/ablations.py placement      # the same 8 tokens after 1, 2 or 4 segments
    python benchmarks/ablations.py recent         # a quarter to twice as many recent events
    python benchmarks/ablations.py bias           # relative bias or learned positions
    python benchmarks/ablations.py gap            # trained with gaps, tested at several ages
    python benchmarks/ablations.py tokens --log synthetic

The log is ml-1m without users of up to p + r = 320 events, so that every target has a past to
compress; or the synthetic log of ``long_dependency.py`` with the cue in the past segment, where
the effect is known. All other settings are those of ``long_history.py``. Each run writes its result
to ``results/ablations``; a run with a result is skipped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from everlong.data.dataset import Dataset, gather
from everlong.data.events import read_events
from everlong.data.split import PAPER, Split, TrainSegments, split
from everlong.data.synthetic import long_dependency
from everlong.evaluation.metrics import estimate, parse_metric
from everlong.evaluation.next_item import evaluate
from everlong.inference.encode import encode_histories
from everlong.inference.topk import mask_items, rank_of
from everlong.models.device import serving
from everlong.models.persrec_paper import PublishedPerSRecHSTU
from everlong.models.registry import config_class, load_model_class
from everlong.models.state import put, take
from everlong.models.user_model import UserModel
from everlong.system.provenance import hardware, versions
from everlong.training.next_item import train
from everlong.training.settings import TrainConfig
from long_history import DROPOUT, PAST, RECENT, SHAPE, build, whole
from quality import DATA_DIR, read_log
from record import RESULTS
from tables import insert

FOLDER = RESULTS / "ablations"
PAGE = Path(__file__).parents[1] / "docs" / "compression.md"


class Log(StrEnum):
    real = "ml-1m"
    synthetic = "synthetic"


class Setting(NamedTuple):
    """Events p of the past and r recent ones, and how many of each the synthetic log has."""

    past: int
    recent: int
    dropout: float
    budget: Mapping[str, Any]

    @property
    def ages(self) -> tuple[int, ...]:
        """Events since the summary was made, at which a model is read in the gap ablation."""
        return tuple(self.past * share // 16 for share in (0, 1, 4, 8, 16))

    def base(self) -> dict[str, Any]:
        placement = ((self.past, 4),)
        return {**SHAPE, "dropout": self.dropout, "placement": placement, "recent": self.recent}

    def variants(self, ablation: str) -> dict[str, dict[str, Any]]:
        """What changes, by name of the variant."""
        past, recent = self.past, self.recent
        found: dict[str, dict[str, dict[str, Any]]] = {
            "tokens": {str(k): {"placement": ((past, k),)} for k in (1, 2, 4, 8, 16)},
            "placement": {
                f"{n} of {8 // n}": {
                    "placement": tuple((past * (i + 1) // n, 8 // n) for i in range(n))
                }
                for n in (1, 2, 4)
            },
            "recent": {
                str(r): {"recent": r} for r in (recent // 4, recent // 2, recent, 2 * recent)
            },
            "bias": {"relative bias": {}, "learned positions": {"relative_bias": False}},
            # the same budget for all; each sees what it can
            "models": {
                "hstu, whole history": {"model": "hstu", "window": 2 * (past + recent)},
                f"hstu, recent {recent - recent % 3 + 1}": {
                    "model": "hstu",
                    "window": recent // 3 + 1,
                },
                "persrec, one segment": {"placement": ((past, 8),)},
                "persrec, four segments": {
                    "placement": tuple((past * (i + 1) // 4, 2) for i in range(4))
                },
                "persrec, stream": {
                    "model": "persrec",
                    "segment": recent,
                    "keep": recent // 2,
                    "tokens": 8,
                    "groups": 4,
                },
                "lru": {"model": "lru", "min_radius": 0.9, "max_radius": 0.999},
                "sasrec, whole history": {"model": "sasrec", "window": 2 * (past + recent)},
                f"sasrec, recent {recent}": {"model": "sasrec", "window": recent},
                "popularity": {"model": "popularity"},
                "markov": {"model": "markov"},
            },
            "gap": {f"gaps up to {g}": {"max_gap": g} for g in (0, recent, 4 * recent)},
        }
        return found[ablation]


BUDGET = {"epochs": 20, "batch_events": 8_192, "lr": 4e-3, "validate_every": 5, "patience": 3}
SETTINGS = {
    Log.real: Setting(PAST, RECENT, DROPOUT["ml-1m"], BUDGET),
    Log.synthetic: Setting(96, 32, 0.0, {**BUDGET, "batch_events": 4_096, "epochs": 30}),
}
ABLATIONS = ("models", "tokens", "placement", "recent", "bias", "gap")


def main(ablation: str, log: Log = Log.real, seeds: int = 1, data_dir: Path = DATA_DIR) -> None:
    """Trains all variants of an ablation that have no result yet, and draws the figure."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if ablation not in ABLATIONS:
        raise typer.BadParameter(f"expected one of {', '.join(ABLATIONS)}, received {ablation!r}")
    setting = SETTINGS[log]
    path = FOLDER / f"{log.value}-{ablation}.json"
    record = json.loads(path.read_text()) if path.exists() else {"runs": []}
    record |= {"ablation": ablation, "log": log.value, "base": setting.base()}
    record |= {"ages": setting.ages, "budget": setting.budget}
    parts = real(data_dir) if log is Log.real else synthetic()
    for seed in range(seeds):
        for label, change in setting.variants(ablation).items():
            if any((r["variant"], r["seed"]) == (label, seed) for r in record["runs"]):
                continue
            found = one(parts, {**setting.base(), **change}, seed, setting, ablation)
            record["runs"].append({"variant": label, "seed": seed, **found})
            record |= {"versions": versions(), "hardware": hardware(), **parts.record()}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
            print(ablation, label, seed, found, flush=True)
    draw(record, path.with_suffix(".png"))
    write_page()


def real(data_dir: Path) -> Split:
    """ml-1m, users with more than p + r events and the two that are held out."""
    protocol = whole("ml-1m", "paper").replace({"min_user_events": PAST + RECENT + 3})
    return split(read_log("ml-1m", data_dir, 0), protocol)


def synthetic() -> Split:
    """The cue of every answer is 40 to 120 events back: beyond what is recent, inside the past."""
    log = long_dependency(
        2_000, distances=tuple(range(40, 121, 8)), num_cues=8, num_fillers=20, seed=0
    )
    protocol = PAPER.replace(
        {"name": "whole", "window": None, "drop_immediate_repeats": False, "seen": "keep"}
    )
    parts = split(read_events(log.frame), protocol)
    # the answers of the first episode are all that can be learned: the rest is random
    first = parts.events.offsets[parts.train.user]
    length = parts.events.offsets[parts.train.user + 1] - first
    stop = first + length // 2
    return Split(
        protocol=parts.protocol,
        events=parts.events,
        train=TrainSegments(parts.train.user, first, stop, stop - 2),
        validation=parts.validation,
        test=parts.test,
        facts=parts.facts,
    )


def one(
    parts: Split, shape: Mapping[str, Any], seed: int, setting: Setting, ablation: str
) -> dict[str, Any]:
    """A variant trained, chosen on validation and tested."""
    name = str(shape.get("model", "persrec_paper"))
    known = {f.name for f in fields(config_class(load_model_class(name)))}
    model = build(name, {k: v for k, v in shape.items() if k in known}, parts, seed)
    train(
        model,
        Dataset(parts.events, parts.train),
        TrainConfig(**setting.budget, seed=seed),
        validate=lambda trained: measure(trained, parts),
    )
    found: dict[str, Any] = measure(model, parts, test=True)
    if ablation == "gap" and isinstance(model, PublishedPerSRecHSTU):
        found["by age"] = {str(age): at_age(model, parts, age) for age in setting.ages}
    return found


def measure(model: UserModel, parts: Split, *, test: bool = False) -> dict[str, float]:
    targets = parts.test if test else parts.validation
    found = evaluate(
        model, parts.events, targets, seen=parts.protocol.seen, metrics=("NDCG@10", "HitRate@1")
    )
    return {name: value.mean for name, value in found.metrics.items()}


def at_age(model: PublishedPerSRecHSTU, parts: Split, age: int) -> float:
    """NDCG@10 of the test targets when the summary was made so many events ago.

    The recent events are always the last r; what came between is in neither.
    """
    events, test = parts.events, parts.test
    made = np.maximum(test.stop - age, test.start)
    state = encode_histories(model, events, test.start, made)
    with serving(model):
        for number in range(age):
            rows = torch.from_numpy(np.flatnonzero(made + number < test.stop))
            at = made[rows.numpy()] + number
            older = model.append(gather(events, at, at + 1), take(state, rows))
            state = put(state, rows, older)
        target = gather(events, test.stop, test.stop + 1)
        scores = model.score(state, at=target.times)
        if parts.protocol.seen == "mask":
            past = gather(events, test.start, test.stop)
            scores = mask_items(scores, past.user_rows, past.items)
        ranks = rank_of(scores, target.items).numpy()
    return estimate(ranks, test.user, [parse_metric("NDCG@10")])["NDCG@10"].mean


def draw(record: Mapping[str, Any], path: Path) -> None:
    """A PNG: bars of the metric by variant, or for gaps its curve over the age of the summary."""
    metric = "NDCG@10" if record["log"] == Log.real.value else "HitRate@1"
    figure = Figure(figsize=(6.0, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labels = list(dict.fromkeys(r["variant"] for r in record["runs"]))
    by_label = {label: [r for r in record["runs"] if r["variant"] == label] for label in labels}
    if record["ablation"] == "gap":
        for label, runs in by_label.items():
            curve = [np.mean([r["by age"][str(age)] for r in runs]) for age in record["ages"]]
            axes.plot(record["ages"], curve, "o-", label=label)
        axes.set(xlabel="events since the summary was made", ylabel="NDCG@10")
        axes.legend(fontsize=8)
    else:
        bars(axes, labels, [[r[metric] for r in by_label[label]] for label in labels])
        axes.set(xlabel=record["ablation"], ylabel=metric)
    axes.grid(alpha=0.3, axis="y")
    axes.set_title(f"{record['log']}: {record['ablation']}")
    figure.savefig(path, dpi=110, format="png")


def write_page() -> None:
    """The tables of the page, from all records on the synthetic log."""
    record = {a: FOLDER / f"{Log.synthetic.value}-{a}.json" for a in ABLATIONS}
    runs = {a: json.loads(p.read_text())["runs"] for a, p in record.items() if p.exists()}
    rows = [("", "", "HitRate@1 of each seed"), ("---",) * 3]
    for ablation, found in runs.items():
        for label in dict.fromkeys(r["variant"] for r in found):
            hits = (f"{r['HitRate@1']:.2f}" for r in found if r["variant"] == label)
            rows.append((ablation, label, ", ".join(hits)))
    page = insert(PAGE.read_text(), as_table(rows), "ablations")
    ages = list(runs["gap"][0]["by age"])
    rows = [("", *(f"{age} events" for age in ages)), ("---",) * (len(ages) + 1)]
    for run in runs["gap"]:
        rows.append((run["variant"], *(f"{x:.2f}" for x in run["by age"].values())))
    PAGE.write_text(insert(page, as_table(rows), "ages"))


def as_table(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def bars(axes: Any, labels: Sequence[str], values: Sequence[Sequence[float]]) -> None:
    for place, found in enumerate(values):
        axes.bar(place, np.mean(found), color="#7fb0de", width=0.6)
        axes.plot([place] * len(found), found, ".", color="#1f3f68")
    axes.set_xticks(range(len(labels)), labels)


if __name__ == "__main__":
    typer.run(main)
