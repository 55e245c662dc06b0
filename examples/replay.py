"""The test part of a log, replayed through a running service: the offline figures, found online.

    python examples/replay.py [LOG.csv] [--model lru] [--in-process]

A model is fitted under the protocol ``temporal``: all events after a point in time are targets.
The service gets the events before it, and then the rest, one at a time in the order of time. Just
before a target it is asked for recommendations at the target's time; where the target stands in
that list is its rank. This is what the offline evaluation does, so both agree
rank by rank:

- The state before a target is that of all events before it: what was acknowledged is in the state.
- Events of one user at one time are sent in the order that the log was read in, which is the order
  of the targets. Between users the order does not matter.
- Every event has an id of its own, because a log may hold the same event twice.
- Items that the model does not know change neither states nor lists, online as offline.
- Seen items are left out by the service as they are barred offline; a target among them ranks last.
- Equal scores count against the target: they are counted, whatever their order in the list.
- A list holds at most 1,000 items. A target beyond it ranks last; no metric looks that far.

What may differ is rounding: offline a history is read as a whole, online event by event. Two scores
that are equal in the first six digits may change places, and then two ranks differ by one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
import uvicorn

from everlong import TEMPORAL, Events, fit, load, read_events
from everlong.client import Client
from everlong.data.arrays import IntArray
from everlong.data.split import Split, split
from everlong.data.synthetic import markov_chain
from everlong.evaluation.interval import Estimate
from everlong.evaluation.metrics import DEFAULT, estimate
from everlong.evaluation.next_item import Evaluation, evaluate
from everlong.server.engine.served_model import ServedModel
from everlong.server.engine.service import Service
from everlong.server.http.app import make_app
from everlong.server.http.messages import MAX_K, ListOut

SHOWN = ("NDCG@10", "Recall@10", "MRR@10")


class Replayed(NamedTuple):
    """Ranks of all targets online, what they come to, and the evaluation offline."""

    ranks: IntArray
    metrics: dict[str, Estimate]
    offline: Evaluation

    @property
    def differing(self) -> int:
        """Targets whose ranks are not the same, as far as lists go."""
        end = min(MAX_K, self.offline.num_items)
        return int((self.ranks.clip(max=end) != self.offline.ranks.clip(max=end)).sum())


def replay(client: Client, events: Events, parts: Split) -> IntArray:
    """The rank of every target of the test, found by asking a service that has no events yet.

    Args:
        client: of a service with the model that was fitted on the split.
        events: the log.
        parts: its split by a cut in time.
    """
    known = parts.events.item_ids.rows(events.item_ids.ids(range(events.num_items))) >= 0
    held = known[events.items]
    # positions of the split do not count the events of unknown items
    place = np.cumsum(held) - 1
    spans = [np.arange(*span) for span in zip(parts.test.stop, parts.test.end, strict=True)]
    number = np.full(parts.events.num_events, -1)
    number[np.concatenate(spans)] = np.arange(sum(span.size for span in spans))
    ranks = np.zeros(number.max() + 1, dtype=np.int64)

    owners = np.repeat(np.arange(events.num_users), events.lengths)
    users = events.user_ids.ids(owners).to_list()
    items = events.item_ids.ids(events.items).to_list()
    times = events.times.tolist()

    def event(at: int) -> dict[str, Any]:
        return {
            "event_id": str(at),
            "user_id": users[at],
            "item_id": items[at],
            "timestamp": times[at],
            "fields": {name: values[at].item() for name, values in events.fields.items()},
        }

    # stable: what a user did at one time stays in its order
    order = np.argsort(events.times, kind="stable").tolist()
    cut = int((events.times < parts.facts["test_from"]).sum())
    client.send(event(at) for at in order[:cut])
    for at in order[cut:]:
        target = number[place[at]] if held[at] else -1
        if target >= 0:
            mask = parts.protocol.seen == "mask"
            found = client.recommend(users[at], k=MAX_K, at=times[at], filter_seen=mask)
            ranks[target] = rank_in(found, items[at], last=parts.events.num_items)
        client.send([event(at)])
    return ranks


def rank_in(found: ListOut, item: int | str, *, last: int) -> int:
    """The rank of an item in a list, from 1, ties counted against it; ``last`` if it is beyond."""
    scores = [one.score for one in found.items]
    own = next((one.score for one in found.items if one.item_id == item), None)
    # items with the score at the end of a list may go on behind it
    if own is None or (own == scores[-1] and len(scores) < last and len(scores) == MAX_K):
        return last
    return sum(score >= own for score in scores)


def compare(client: Client, folder: Path, events: Events) -> Replayed:
    """The figures of a model folder, by replay and by the offline evaluation."""
    recommender = load(folder)
    parts = split(events, recommender.origin.protocol)
    offline = evaluate(recommender.model, parts.events, parts.test, seen=parts.protocol.seen)
    ranks = replay(client, events, parts)
    return Replayed(ranks, estimate(ranks, offline.users, DEFAULT), offline)


@contextmanager
def process(model: Path, data: Path) -> Iterator[str]:
    """The address of a service that runs as a process of its own."""
    command = [sys.executable, "-c", "from everlong.cli.app import app; app()", "serve", str(model)]
    command += ["--data-dir", str(data), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(  # noqa: S603 (the command is our own)
        command, stdout=subprocess.PIPE, text=True, env=environment
    ) as running:
        assert running.stdout is not None  # noqa: S101
        try:
            first = running.stdout.readline()
            if not first:
                raise RuntimeError(f"expected a service, received its end: {running.wait()}")
            yield first.split()[-1]
        finally:
            running.terminate()


@contextmanager
def in_thread(model: Path, data: Path) -> Iterator[str]:
    """The address of a service in this process."""
    app = make_app(Service(data, ServedModel.read(model)))
    server = uvicorn.Server(uvicorn.Config(app, port=0, access_log=False, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def main(
    log: Annotated[
        Path | None, typer.Argument(help="user_id, item_id, timestamp; a made-up log without it")
    ] = None,
    model: Annotated[str, typer.Option(help="name of a built-in model")] = "lru",
    seen: Annotated[str, typer.Option(help="mask: no seen items; keep: all items")] = "keep",
    epochs: Annotated[int, typer.Option(min=1)] = 5,
    in_process: Annotated[bool, typer.Option(help="serve from a thread of this process")] = False,
) -> None:
    """Replays the test part of a log through a service and compares with the offline figures."""
    made = markov_chain(num_users=100, num_items=50, length=25).frame
    events = read_events(made if log is None else log)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        protocol = TEMPORAL.replace({"seen": seen})
        fit(events, model, protocol=protocol, training={"epochs": epochs}).save(folder)
        serve = in_thread if in_process else process
        with serve(folder, Path(name) / "data") as url, Client(url) as client:
            while not client.ready():
                time.sleep(0.1)
            began = time.monotonic()
            found = compare(client, folder, events)
    seconds = time.monotonic() - began
    print(f"{found.ranks.size} targets of {events.num_events} events in {seconds:.0f} s")
    for metric in SHOWN:
        offline, online = found.offline.metrics[metric].mean, found.metrics[metric].mean
        print(f"{metric:10} offline {offline:.6f}  online {online:.6f}")
    print(f"ranks that differ: {found.differing}")


if __name__ == "__main__":
    typer.run(main)
