"""What compression keeps of a long history: models side by side, with the same budget of training.

    python benchmarks/long_history.py run ml-1m paper persrec --seed 0
    python benchmarks/long_history.py all                 # every run that has no result yet
    python benchmarks/long_history.py table               # the table of docs/compression.md

Histories are read whole: no protocol cuts them to a window. HSTU sees all of a history, or in each
of its three layers the last r events, 3 (r - 1) + 1 = 190 in all; PerSRec sees r recent events,
give or take a few, and of the p before them what K tokens a segment tell. The logs are those of
``quality.py``, as are its baselines' settings.
Each run writes ``results/long_history/<data>-<protocol>-<model>-<seed>.json``.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from everlong.dataset import Dataset
from everlong.evaluate import Evaluation, evaluate
from everlong.metrics import estimate, parse_metric
from everlong.model import UserModel
from everlong.models import config_class, load_model_class
from everlong.models.persrec import PerSRec
from everlong.provenance import hardware, versions
from everlong.split import Protocol, Split, split
from everlong.state import bytes_per_user
from everlong.train import TrainConfig, train
from quality import DATA_DIR, protocol_for, read_log, recipe
from record import RESULTS
from tables import insert, spread

RUNS = RESULTS / "long_history"
PAGE = Path(__file__).parents[1] / "docs" / "compression.md"
METRICS = ("NDCG@10", "Recall@10")
SEEDS = (0, 1, 2)
TABLE = (
    ("ml-1m", "paper"),
    ("ml-latest-small", "paper"),
    ("ml-latest-small", "temporal"),
    ("ml-100k", "paper"),
    ("ml-100k", "temporal"),
    ("online-retail", "temporal"),
)

PAST, RECENT = 256, 64
"""Events p that are compressed and r that are not. Users with more than p + r are long."""

WHOLE = {"ml-1m": 2_304, "ml-latest-small": 2_704, "ml-100k": 768, "online-retail": 2_304}
"""Windows longer than any history, but for six of 4,339 users of online-retail."""

SHAPE = {"layers": 3, "heads": 2}
DROPOUT = {"ml-1m": 0.2, "ml-latest-small": 0.3, "ml-100k": 0.3, "online-retail": 0.3}
CONTESTANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "hstu, whole history": ("hstu", SHAPE),
    "hstu, recent 190": ("hstu", {**SHAPE, "window": RECENT}),
    "hstu, recent 64": ("hstu", {**SHAPE, "window": (RECENT - 1) // SHAPE["layers"] + 1}),
    "persrec, one segment": (
        "persrec_paper",
        {**SHAPE, "placement": ((PAST, 4),), "recent": RECENT},
    ),
    "persrec, four segments": (
        "persrec_paper",
        {**SHAPE, "placement": ((64, 4), (128, 4), (192, 4), (256, 4)), "recent": RECENT},
    ),
    "persrec, stream": (
        "persrec",
        {**SHAPE, "segment": RECENT, "tokens": 4, "groups": 4, "keep": RECENT // 2},
    ),
    "lru": ("lru", {}),
    "sasrec": ("sasrec", {}),
    "gru4rec": ("gru4rec", {}),
    "popularity": ("popularity", {}),
    "markov": ("markov", {}),
}
LEARNING = ("lru", "sasrec", "gru4rec", "hstu", "persrec", "persrec_paper")
BUDGETS: Mapping[str, Mapping[str, Any]] = {
    "ml-1m": {"epochs": 30, "batch_events": 8192, "lr": 4e-3, "validate_every": 5, "patience": 4},
    "ml-latest-small": {"epochs": 40, "batch_events": 2048, "lr": 2e-3, "validate_every": 2},
    "ml-100k": {"epochs": 40, "batch_events": 2048, "lr": 2e-3, "validate_every": 2},
    "online-retail": {"epochs": 25, "batch_events": 4096, "lr": 2e-3, "validate_every": 2},
}
app = typer.Typer(help=__doc__, add_completion=False)


def whole(data: str, name: str) -> Protocol:
    """A named protocol that reads whole histories."""
    return protocol_for(data, name).replace({"window": None})


@app.command()
def run(
    data: str,
    protocol: str,
    contestant: str,
    seed: int = 0,
    data_dir: Path = DATA_DIR,
    architecture: Annotated[str, typer.Option(help="JSON of changes, for a search")] = "{}",
    training: Annotated[str, typer.Option(help="JSON of changes, for a search")] = "{}",
    name: Annotated[str, typer.Option(help="result file, default by the settings")] = "",
) -> None:
    """Trains and evaluates one contestant on one log."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    model_name, shape = CONTESTANTS[contestant]
    if contestant == "hstu, whole history":
        shape = {**shape, "window": WHOLE[data]}
    if "layers" in shape:
        shape = {"dropout": DROPOUT[data], **shape}
    shape = {**recipe(data, protocol, model_name).architecture, **shape, **json.loads(architecture)}
    budget = {"patience": 6, **BUDGETS[data], "seed": seed, **json.loads(training)}
    name = name or file_name(data, protocol, contestant, seed)
    parts = split(read_log(data, data_dir, seed), whole(data, protocol))
    model = build(model_name, shape, parts, seed)
    settings = TrainConfig(**budget)
    began = time.perf_counter()
    result = train(
        model,
        Dataset(parts.events, parts.train),
        settings,
        validate=lambda trained: means(measure(trained, parts, "validation")),
        folder=Path("runs") / "long_history" / name,
        resume=True,
    )
    seconds = time.perf_counter() - began
    rates = [row["events_per_second"] for row in result.history]
    test, validation = (measure(model, parts, part) for part in ("test", "validation"))
    record = {
        "data": data,
        "protocol": parts.record(),
        "contestant": contestant,
        "model": model_name,
        "seed": seed,
        "fingerprint": parts.events.fingerprint,
        "architecture": shape,
        "training": settings.model_dump(),
        "best_epoch": result.best_epoch,
        "seconds": round(seconds, 1),
        "training_events_per_second": round(statistics.median(rates)) if rates else None,
        "bytes_per_user": bytes_per_user(model.initial_state(1)),
        "validation": means(validation),
        "test": means(test),
        "test_by_history_length": [
            row for row in test.by_history_length().to_dicts() if row["metric"] in METRICS
        ],
        "test_long_histories": long_histories(test),
        "test_by_summary_age": by_summary_age(test, model),
        "versions": versions(),
        "hardware": hardware(),
    }
    path = RUNS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(name, record["validation"], record["test"], record["test_long_histories"], flush=True)


def file_name(data: str, protocol: str, contestant: str, seed: int) -> str:
    return f"{data}-{protocol}-{contestant.replace(', ', '_').replace(' ', '_')}-{seed}"


def build(name: str, shape: Mapping[str, Any], parts: Split, seed: int) -> UserModel:
    """A fresh model, initialised by a seed."""
    model_class = load_model_class(name)
    config = config_class(model_class)(num_items=parts.events.num_items, **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config)  # type: ignore[arg-type]


def measure(model: UserModel, parts: Split, part: str) -> Evaluation:
    targets = parts.test if part == "test" else parts.validation
    return evaluate(model, parts.events, targets, seen=parts.protocol.seen, metrics=METRICS)


def means(found: Evaluation) -> dict[str, float]:
    return {name: value.mean for name, value in found.metrics.items()}


def long_histories(found: Evaluation) -> dict[str, Any]:
    """The metrics of targets after more than p + r events."""
    inside = found.history_lengths > PAST + RECENT
    if not inside.any():
        return {"targets": 0}
    parsed = [parse_metric(name) for name in METRICS]
    values = estimate(found.ranks[inside], found.users[inside], parsed)
    facts = {name: value._asdict() for name, value in values.items()}
    return {"targets": int(inside.sum()), "users": len(set(found.users[inside])), **facts}


def by_summary_age(found: Evaluation, model: UserModel) -> list[dict[str, Any]]:
    """On a stream, NDCG@10 in four parts by the events since the last fold."""
    if not isinstance(model, PerSRec):
        return []
    size, capacity = model.config.segment, model.config.capacity
    age = (found.history_lengths - capacity - 1) % size + 1
    part = np.where(found.history_lengths > capacity, (4 * (age - 1)) // size, -1)
    rows = []
    for number in range(4):
        inside = part == number
        if inside.any():
            metric = parse_metric("NDCG@10")
            value = estimate(found.ranks[inside], found.users[inside], [metric])["NDCG@10"]
            events = f"{number * size // 4 + 1} to {(number + 1) * size // 4}"
            rows.append({"events since": events, "targets": int(inside.sum()), **value._asdict()})
    return rows


@app.command("all")
def run_all(data_dir: Path = DATA_DIR, only: str = "", seeds: int = len(SEEDS)) -> None:
    """Runs whatever has no result yet, one seed after the other."""
    for seed in SEEDS[:seeds]:
        for data, protocol in TABLE:
            for contestant, (model, _) in CONTESTANTS.items():
                name = file_name(data, protocol, contestant, seed)
                once = model not in LEARNING and seed > 0
                if only in name and not once and not (RUNS / f"{name}.json").exists():
                    run(data, protocol, contestant, seed, data_dir, "{}", "{}", "")


@app.command()
def table() -> None:
    """Writes the table of the page from the records."""
    PAGE.write_text(insert(PAGE.read_text(), text_table(read_records())))


def read_records() -> list[Mapping[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RUNS.glob("*.json"))]


def text_table(records: Sequence[Mapping[str, Any]]) -> str:
    """One row a log, protocol and contestant."""
    header = (
        "log",
        "protocol",
        "model",
        *METRICS,
        f"NDCG@10, more than {PAST + RECENT} events",
        "seeds",
        "bytes per user",
        "training, events/s",
    )
    lines = [header, ["---"] * len(header)]
    for data, protocol in TABLE:
        for contestant in CONTESTANTS:
            mine = [
                r
                for r in records
                if (r["data"], r["protocol"]["protocol"]["name"], r["contestant"])
                == (data, protocol, contestant)
            ]
            if not mine:
                continue
            long = [r["test_long_histories"].get("NDCG@10", {}).get("mean") for r in mine]
            rate = mine[0]["training_events_per_second"]
            lines.append(
                (
                    data,
                    protocol,
                    contestant,
                    *(spread([r["test"][metric] for r in mine]) for metric in METRICS),
                    spread(long) if None not in long else "-",
                    str(len(mine)),
                    f"{mine[0]['bytes_per_user']:,}",
                    f"{rate:,}" if rate else "-",
                )
            )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    app()
