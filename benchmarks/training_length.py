"""Memory and speed of training by length of the histories.

    python benchmarks/training_length.py

HSTU over whole histories and PerSRec, three layers of width 64, one update of 8,192 events in
histories of 256 to 8,192 events, each length in its own process. The matrix of all pairs, which the
published form stores for each head and layer, would take 256 MB at 8,192 events, and its gradients
several times that. The required memory grows with the number of events only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from statistics import median
from typing import Annotated, Any

import numba
import torch
import typer

from everlong.models.batch import Batch
from everlong.models.hstu import HSTU, HSTUConfig
from everlong.models.persrec import PerSRec, PerSRecConfig
from everlong.models.user_model import UserModel
from everlong.training.next_item_losses import full_softmax
from record import peak_mib, write_result

ITEMS, EVENTS, ROUNDS = 3_416, 8_192, 3
LENGTHS = (256, 512, 1_024, 2_048, 4_096, 8_192)
MODELS = ("nothing", "hstu", "persrec")


def main(
    model: Annotated[str, typer.Option(help="one of the models, in this process")] = "",
    length: Annotated[int, typer.Option(help="events of a history")] = 2_048,
) -> None:
    """Measures one model at one length, or all of them and writes results/training_length.json."""
    if model:
        print(json.dumps(measure(model, length)))
        return
    figures: dict[str, Any] = {"threads": 1, "events": EVENTS, "items": ITEMS, "lengths": {}}
    for size in LENGTHS:
        figures["lengths"][size] = {name: in_a_process(name, size) for name in MODELS}
        print(size, figures["lengths"][size], flush=True)
    print("written to", write_result("training_length", figures))


def in_a_process(model: str, length: int) -> dict[str, float]:
    """Measures in a new process, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--model", model, "--length", str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(name: str, length: int) -> dict[str, float]:
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    torch.manual_seed(0)
    users = EVENTS // length
    batch = Batch(
        items=torch.randint(ITEMS, (EVENTS,)),
        times=torch.arange(EVENTS) * 3_600,
        offsets=torch.arange(users + 1) * length,
    )
    if name == "nothing":
        return {"peak_mib": round(peak_mib(), 1)}
    made: UserModel = (
        HSTU(HSTUConfig(num_items=ITEMS, layers=3, window=length))
        if name == "hstu"
        else PerSRec(PerSRecConfig(num_items=ITEMS, layers=3))
    )
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        full_softmax(made(batch), made.item_embeddings(), batch.items).backward()  # type: ignore[no-untyped-call]
        seconds.append(time.perf_counter() - began)
    rate = EVENTS / median(seconds[1:])
    return {"peak_mib": round(peak_mib(), 1), "events_per_second": round(rate)}


if __name__ == "__main__":
    typer.run(main)
