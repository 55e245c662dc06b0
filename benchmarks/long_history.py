"""Quality of compressed histories: a comparison of models with the same training budget.

    python benchmarks/long_history.py run ml-1m paper persrec --seed 0
    python benchmarks/long_history.py all                 # every run that has no result yet
    python benchmarks/long_history.py requests            # milliseconds per request and per event
    python benchmarks/long_history.py table               # the tables of docs/compression.md

Histories are whole: no protocol has a window. HSTU attends to the whole history; or in each of its
three layers to the last r = 64 events, 3 (r - 1) + 1 = 190 in total; or in each to the last 22, r
in total. PerSRec has about r recent events and summaries of K tokens per segment for the p events
before them. Logs and settings of baselines are those of ``quality.py``. Each run writes
``results/long_history/<data>-<protocol>-<model>-<seed>.json``.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import numba
import numpy as np
import torch
import typer

from everlong.data.dataset import Dataset
from everlong.data.split import Protocol, Split, split
from everlong.evaluation.metrics import estimate, parse_metric
from everlong.evaluation.next_item import Evaluation, evaluate
from everlong.models.batch import Batch
from everlong.models.device import serving
from everlong.models.persrec import PerSRec
from everlong.models.registry import config_class, load_model_class
from everlong.models.state import State, bytes_per_user
from everlong.models.user_model import UserModel
from everlong.system.provenance import hardware, versions
from everlong.training.next_item import train
from everlong.training.settings import TrainConfig
from quality import DATA_DIR, protocol_for, read_log, recipe
from record import RESULTS, write_result
from tables import insert, spread

RUNS = RESULTS / "long_history"
PAGE = Path(__file__).parents[1] / "docs" / "compression.md"
REQUESTS = "long_history_requests"
REQUEST_EVENTS, REQUEST_ITEMS = 1_280, 3_416
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
"""Numbers of compressed (p) and recent (r) events; users with more than p + r events are long."""

WHOLE = {"ml-1m": 2_304, "ml-latest-small": 2_704, "ml-100k": 768, "online-retail": 2_304}
"""Windows longer than any history, except for six of 4,339 users of online-retail."""

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
    """Runs everything without a result, seed by seed."""
    for seed in SEEDS[:seeds]:
        for data, protocol in TABLE:
            for contestant, (model, _) in CONTESTANTS.items():
                name = file_name(data, protocol, contestant, seed)
                once = model not in LEARNING and seed > 0
                if only in name and not once and not (RUNS / f"{name}.json").exists():
                    run(data, protocol, contestant, seed, data_dir, "{}", "{}", "")


@app.command()
def requests(rounds: int = 15) -> None:
    """Times a request and an event of every contestant side by side, one user on one core."""
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(REQUEST_ITEMS, (REQUEST_EVENTS,), generator=generator)
    times = torch.arange(REQUEST_EVENTS) * 3_600  # an event an hour
    history = Batch(items=items, times=times, offsets=torch.tensor([0, REQUEST_EVENTS]))
    newest = Batch.one_event_each(items[:1], times[-1:] + 60)
    asked = times[-1:] + 120
    with ExitStack() as quiet:
        served: dict[str, tuple[UserModel, State]] = {}
        for contestant, (name, shape) in CONTESTANTS.items():
            if name in LEARNING:
                if contestant == "hstu, whole history":
                    shape = {**shape, "window": WHOLE["ml-1m"]}
                config = config_class(load_model_class(name))(num_items=REQUEST_ITEMS, **shape)
                torch.manual_seed(0)
                model = load_model_class(name)(config)  # type: ignore[arg-type]
                quiet.enter_context(serving(model))
                served[contestant] = model, model.encode(history)[1]
        seconds: dict[str, dict[str, list[float]]] = {
            name: {"request": [], "event": []} for name in served
        }
        for number in range(rounds + 1):
            for contestant, (model, state) in served.items():
                began = time.perf_counter()
                model.score(state, at=asked)
                middle = time.perf_counter()
                model.step(newest, state)
                if number > 0:
                    seconds[contestant]["request"].append(middle - began)
                    seconds[contestant]["event"].append(time.perf_counter() - middle)
    found = {
        contestant: {
            f"{kind}_ms": round(1e3 * statistics.median(v), 3) for kind, v in kinds.items()
        }
        for contestant, kinds in seconds.items()
    }
    facts = {"events": REQUEST_EVENTS, "items": REQUEST_ITEMS, "rounds": rounds}
    print(json.dumps(found, indent=1), write_result(REQUESTS, {**facts, "contestants": found}))


@app.command()
def table() -> None:
    """Writes the tables of the page from the records."""
    records = read_records()
    path = RESULTS / f"{REQUESTS}.json"
    timed = json.loads(path.read_text())["contestants"] if path.exists() else {}
    text = "\n".join((text_table(records, timed), "", length_table(records)))
    PAGE.write_text(insert(PAGE.read_text(), text))


def read_records() -> list[Mapping[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RUNS.glob("*.json"))]


def grouped(
    records: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[str, str, str, list[Mapping[str, Any]]]]:
    """Log, protocol, contestant and the records of its seeds, in the order of the table."""
    for data, protocol in TABLE:
        for contestant in CONTESTANTS:
            key = (data, protocol, contestant)
            mine = [
                r
                for r in records
                if (r["data"], r["protocol"]["protocol"]["name"], r["contestant"]) == key
            ]
            if mine:
                yield data, protocol, contestant, mine


def long_mean(record: Mapping[str, Any]) -> float:
    """NDCG@10 of the targets after more than p + r events."""
    value: float = record["test_long_histories"].get("NDCG@10", {}).get("mean", math.nan)
    return value


def text_table(
    records: Sequence[Mapping[str, Any]], timed: Mapping[str, Mapping[str, float]]
) -> str:
    """One row a log, protocol and contestant."""
    header = (
        "log",
        "protocol",
        "model",
        *METRICS,
        f"NDCG@10, more than {PAST + RECENT} events",
        "of whole HSTU",
        "seeds",
        "bytes per user",
        "request, ms",
        "event, ms",
        "training, events/s",
    )
    lines = [header, ["---"] * len(header)]
    whole_means = {
        (data, protocol): statistics.mean(long_mean(r) for r in mine)
        for data, protocol, contestant, mine in grouped(records)
        if contestant == "hstu, whole history"
    }
    for data, protocol, contestant, mine in grouped(records):
        long = [long_mean(r) for r in mine]
        rate = mine[0]["training_events_per_second"]
        best = whole_means.get((data, protocol), math.nan)
        times = timed.get(contestant, {})
        lines.append(
            (
                data,
                protocol,
                contestant,
                *(spread([r["test"][metric] for r in mine]) for metric in METRICS),
                "-" if math.isnan(long[0]) else spread(long),
                "-" if math.isnan(long[0] / best) else f"{statistics.mean(long) / best:.0%}",
                str(len(mine)),
                f"{mine[0]['bytes_per_user']:,}",
                *(f"{times[kind]:.2f}" if times else "-" for kind in ("request_ms", "event_ms")),
                f"{rate:,}" if rate else "-",
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def length_table(records: Sequence[Mapping[str, Any]]) -> str:
    """NDCG@10 by the length of the history before the target, mean over seeds."""
    groups = [row for r in records for row in r["test_by_history_length"]]
    names = sorted(
        {row["history"] for row in groups}, key=lambda name: int(name.rstrip("+").split("-")[0])
    )
    header = ("log", "protocol", "model", *(f"{name} events" for name in names))
    lines = [header, ["---"] * len(header)]
    for data, protocol, contestant, mine in grouped(records):
        cells = []
        for name in names:
            values = [
                row["mean"]
                for r in mine
                for row in r["test_by_history_length"]
                if (row["history"], row["metric"]) == (name, "NDCG@10")
            ]
            cells.append(f"{statistics.mean(values):.4f}" if values else "-")
        lines.append((data, protocol, contestant, *cells))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    app()
