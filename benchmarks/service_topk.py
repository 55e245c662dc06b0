"""The cost of top-k search in a catalogue: exact, exact after a coarse search, and by an index.

    python benchmarks/service_topk.py

One core. Item vectors of width 64 in clusters, with biases; a user vector is a mean of some items.
The limit of a search is memory bandwidth: 4 bytes per number for the plain product, 2 for the
coarse search.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
import typer
from torch import Tensor

from everlong.inference.catalogue import Catalogue
from everlong.inference.filters import Packed
from everlong.inference.index import made_up
from everlong.inference.topk import mask_items, top_k
from everlong.models.query import Query
from everlong.models.user_model import ItemEmbeddings
from record import write_result

DIM, K, SEEN = 64, 10, 50
BATCHES = (1, 8, 64)


def main(items: list[int] = [10_000, 100_000, 1_000_000], index_from: int = 1_000_000) -> None:  # noqa: B006
    """Measures catalogues of some sizes; those from ``index_from`` items on with an index too."""
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"threads": 1, "dim": DIM, "k": K, "seen_a_user": SEEN}
    for size in items:
        figures[f"{size}_items"] = measured(size, with_index=size >= index_from)
        print(json.dumps(figures[f"{size}_items"], indent=2), flush=True)
    print("written to", write_result("service_topk", figures))


def measured(size: int, *, with_index: bool) -> dict[str, Any]:
    """Milliseconds of one call by batch, and of an index its build, recall and cost."""
    head = clustered(size)
    plain, coarse = Catalogue(head, coarse=False), Catalogue(head, coarse=True)
    found: dict[str, Any] = {"milliseconds_by_batch": {}}
    users = made_up(head.weight, 8.0, 512)
    for batch in BATCHES:
        some = users[:batch]
        rows = [np.sort(own) for own in torch.randint(size, (batch, SEEN)).numpy()]
        pairs = Packed.of(rows).pairs()
        ways: dict[str, Callable[[], object]] = {
            "whole table in float32": lambda: whole(some, head, pairs),  # noqa: B023
            "coarse look in float32": lambda: plain.best(Query(some), K, rows),  # noqa: B023
            "coarse look in 8 bits": lambda: coarse.best(Query(some), K, rows),  # noqa: B023
        }
        # in turn, so that other work on the machine falls on all of them
        found["milliseconds_by_batch"][batch] = in_turn(ways, 15 if size * batch > 1e7 else 60)
    if with_index:
        began = time.perf_counter()
        built = coarse.build_index(users[:256])
        about = {"seconds_to_build": time.perf_counter() - began, "built": built}
        found["index"] = {**about, "recall_at_100": coarse.recall}
        if coarse.index is not None:
            found["index"]["lists_looked_into"] = coarse.index.probes
            found["index"]["milliseconds_by_batch"] = {
                batch: in_turn({"index": lambda: coarse.best(Query(users[:batch]), K)}, 60)  # noqa: B023
                for batch in BATCHES
            }
    return found


def whole(user: Tensor, head: ItemEmbeddings, pairs: tuple[Tensor, Tensor]) -> object:
    """The list from a table of all scores in float32, which is not exact."""
    return top_k(mask_items(torch.addmm(head.bias, user, head.weight.T), *pairs), K)


def clustered(size: int) -> ItemEmbeddings:
    """Item vectors around ``size / 250`` middles, and small biases."""
    seeded = torch.Generator().manual_seed(0)
    middles = torch.randn(size // 250, DIM, generator=seeded)
    own = torch.randint(len(middles), (size,), generator=seeded)
    weight = middles[own] + 0.5 * torch.randn(size, DIM, generator=seeded)
    return ItemEmbeddings(weight, 0.1 * torch.randn(size, generator=seeded))


def in_turn(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each: the least, and the median."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 2):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - began)
    return {
        name: {"least": 1e3 * min(some), "median": 1e3 * median(some)}
        for name, some in seconds.items()
    }


if __name__ == "__main__":
    typer.run(main)
