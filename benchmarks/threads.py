"""Training on a machine that is shared: events per second of ``everlong fit``, and equal losses.

    python benchmarks/threads.py               # writes results/threads.json
    python benchmarks/threads.py --add         # adds rounds to those that are there

Loads: quiet; a busy loop on one of the cores; a CPU quota of 1.5 cores, by a cgroup that is made
for it, which takes root. Forms: ``everlong`` as it is; ``torch first``, the same in a process that
has imported torch before; and ``spinning``, what OpenMP does by itself, one thread a core of the
affinity mask that spins 300,000 times. Each round runs every form under every load, in turn; the
rate is that of the median epoch after the first.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from everlong.data.synthetic import demo_log
from everlong.system.threads import COUNTS, WAITING, cores
from record import RESULTS, write_result

LOG = Path(__file__).parents[2] / "shared" / "data" / "ml-100k" / "interactions.parquet"
QUOTA = 1.5
BY_ITSELF = {
    "GOMP_SPINCOUNT": "300000",
    "KMP_BLOCKTIME": "200",
    **dict.fromkeys(COUNTS, str(len(os.sched_getaffinity(0)))),
}
FORMS: Mapping[str, tuple[Mapping[str, str], str]] = {
    "everlong": ({}, ""),
    "torch first": ({}, "import torch; "),
    "spinning": (BY_ITSELF, ""),
}
LOADS = ("quiet", "busy", "quota")


def main(
    rounds: Annotated[int, typer.Option(help="rounds to time")] = 3,
    epochs: Annotated[int, typer.Option(help="epochs of a fit")] = 4,
    add: Annotated[bool, typer.Option(help="add to the rounds of the record")] = False,
    log: Annotated[Path, typer.Option(help="the log; where there is none one is made up")] = LOG,
) -> None:
    """Times all forms under all loads and writes results/threads.json."""
    before = json.loads((RESULTS / "threads.json").read_text())["rounds"] if add else []
    found: list[dict[str, dict[str, Any]]] = before
    with tempfile.TemporaryDirectory() as folder:
        name = log.parent.name if log.is_file() else "made up"
        if not log.is_file():
            log = Path(folder) / "log.parquet"
            demo_log().frame.write_parquet(log)
        fit("everlong", "quiet", log, 1, Path(folder))  # compiles
        for _ in range(rounds):
            one: dict[str, dict[str, Any]] = {}
            for load in LOADS:
                for form in FORMS:
                    result = fit(form, load, log, epochs, Path(folder))
                    one.setdefault(load, {})[form] = result
                    print(load, form, result, flush=True)
            found.append(one)
    figures = {"log": name, **summary(found)}
    print(json.dumps(figures, indent=2))
    print("written to", write_result("threads", {**figures, "rounds": found}))


def fit(form: str, load: str, log: Path, epochs: int, folder: Path) -> dict[str, Any]:
    """The rate of one run, its losses and the number of its threads; or why there is none."""
    variables, first = FORMS[form]
    environment = {
        k: v for k, v in os.environ.items() if k not in (*COUNTS, *WAITING, "MKL_NUM_THREADS")
    }
    out = Path(tempfile.mkdtemp(dir=folder)) / "model"
    command = [
        sys.executable,
        "-c",
        f"{first}from everlong.cli.app import app; app()",
        *("--quiet", "fit", str(log), "--out", str(out), "--train", f"epochs={epochs}"),
    ]
    try:
        with loaded(load) as into:
            subprocess.run(
                [*into, *command],
                env={**environment, **variables},
                check=True,
                stdout=subprocess.DEVNULL,
            )
    except OSError as error:
        return {"skipped": str(error)}
    lines = (out.with_name("model.run") / "train.jsonl").read_text().splitlines()
    history = [json.loads(line) for line in lines]
    rates = [record["events_per_second"] for record in history]
    threads = json.loads((out / "metrics.json").read_text())["validation"]["hardware"]["threads"]
    return {
        "events_per_second": median(rates[1:] or rates),
        "losses": [record["loss"] for record in history],
        "threads": threads,
    }


@contextmanager
def loaded(load: str) -> Iterator[list[str]]:
    """A block with a load, and words to put before a command that is to run under it."""
    if load == "busy":
        core = max(os.sched_getaffinity(0))
        command = [sys.executable, "-c", "while True: pass"]
        with subprocess.Popen(["taskset", "-c", str(core), *command]) as other:
            try:
                yield []
            finally:
                other.kill()
    elif load == "quota":
        group = make_group(QUOTA)
        try:
            yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
        finally:
            group.rmdir()
    else:
        yield []


def make_group(quota: float) -> Path:
    """A new cgroup with a CPU quota, of version 2 or 1.

    Raises:
        OSError: if none can be made here.
    """
    root, period = Path("/sys/fs/cgroup"), 100_000
    name = f"everlong-benchmark-{os.getpid()}"
    if (root / "cgroup.controllers").is_file():
        (root / "cgroup.subtree_control").write_text("+cpu")
        group = root / name
        group.mkdir()
        (group / "cpu.max").write_text(f"{int(quota * period)} {period}")
    else:
        group = root / "cpu" / name
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text(str(int(quota * period)))
    return group


def summary(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Median rates, and medians of ratios that were taken within a round."""
    rates: dict[str, dict[str, float | str]] = {}
    losses = set()
    for load in LOADS:
        rates[load] = {}
        for form in FORMS:
            found = [one[load][form] for one in rounds]
            skipped = [one["skipped"] for one in found if "skipped" in one]
            rates[load][form] = (
                skipped[0] if skipped else median(one["events_per_second"] for one in found)
            )
            losses |= {(one["threads"], *one["losses"]) for one in found if "losses" in one}

    def ratio(above: tuple[str, str], below: tuple[str, str]) -> float | None:
        pairs = [(one[above[0]][above[1]], one[below[0]][below[1]]) for one in rounds]
        known = [(a, b) for a, b in pairs if "skipped" not in a and "skipped" not in b]
        if not known:
            return None
        return round(median(a["events_per_second"] / b["events_per_second"] for a, b in known), 3)

    quiet = ("quiet", "spinning")
    return {
        "cores": cores(),
        "load_average_at_the_end": round(os.getloadavg()[0], 2),
        "quota_in_cores": QUOTA,
        "num_rounds": len(rounds),
        "events_per_second": rates,
        "against_spinning_when_quiet": {
            load: {form: ratio((load, form), quiet) for form in FORMS} for load in LOADS
        },
        "against_spinning_under_the_same_load": {
            load: ratio((load, "everlong"), (load, "spinning")) for load in LOADS
        },
        "equal_losses_of_equal_threads": len(losses) == len({one[0] for one in losses}),
    }


if __name__ == "__main__":
    typer.run(main)
