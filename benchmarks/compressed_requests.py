"""Latency of a request with cached summaries and recent events, against the whole history.

    python benchmarks/compressed_requests.py            # over HSTU
    python benchmarks/compressed_requests.py --hllm     # over HLLM

One core, histories of p + r = 1,024 + 256 events, 4 tokens, one request at a time and 64 at once.
Only the user vector is computed; ranking the catalogue costs the same in all cases and is left out.
The limit (arXiv 2601.03479): 256 of 1,280 rows of matrix products remain, 20 %, and 33,920 of
819,840 pairs of query and key, 4.1 %.

Measured in alternation:

* whole: HSTU (or HLLM) encodes all 1,280 events, and computes only the last output of the last
layer
  (PerSRec without a boundary is HSTU, or HLLM);
* published: the same with all outputs of the last layer, as in a forward pass; * cached: PerSRec as
published encodes 256 recent events with the summary of 1,024; * stream: ``persrec`` at its maximum,
256 + 64 events and one summary of 256 (64 events more than the
  others);
* ring: a cache of the keys and values of all 1,280 events; only the newest event is computed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any, NamedTuple

import numba
import torch
import typer

from everlong.models.batch import Batch
from everlong.models.device import serving
from everlong.models.hllm import HLLM, HLLMConfig
from everlong.models.hstu import HSTU, HSTUConfig
from everlong.models.persrec import PerSRec, PerSRecConfig
from everlong.models.persrec_hllm import (
    PerSRecHLLM,
    PerSRecHLLMConfig,
    PublishedPerSRecHLLM,
    PublishedPerSRecHLLMConfig,
)
from everlong.models.persrec_paper import PublishedPerSRecHSTU, PublishedPerSRecHSTUConfig
from everlong.models.state import bytes_per_user
from everlong.models.user_model import UserModel
from record import write_result

ITEMS, PAST, RECENT, TOKENS = 10_000, 1_024, 256, 4
ROUNDS = {1: 15, 8: 5, 64: 3}


class Family(NamedTuple):
    """Classes of one backbone with their configurations, and the sizes to measure."""

    ring: tuple[type[UserModel], type[Any]]
    paper: tuple[type[UserModel], type[Any]]
    stream: tuple[type[UserModel], type[Any]]
    shapes: dict[str, dict[str, int]]


OVER_HSTU = Family(
    (HSTU, HSTUConfig),
    (PublishedPerSRecHSTU, PublishedPerSRecHSTUConfig),
    (PerSRec, PerSRecConfig),
    {
        "3 layers, 2 heads": {"layers": 3, "heads": 2, "dim": 64},
        "16 layers, 8 heads (published)": {"layers": 16, "heads": 8, "dim": 64},
    },
)
OVER_HLLM = Family(
    (HLLM, HLLMConfig),
    (PublishedPerSRecHLLM, PublishedPerSRecHLLMConfig),
    (PerSRecHLLM, PerSRecHLLMConfig),
    {
        "2 layers of 64": {"layers": 2, "heads": 2, "dim": 64},
        "8 layers of 256": {"layers": 8, "heads": 8, "kv_heads": 2, "dim": 256},
    },
)


def main(hllm: bool = False) -> None:
    """Measures all shapes of a family and writes the result."""
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    family = OVER_HLLM if hllm else OVER_HSTU
    figures: dict[str, Any] = {"threads": 1, "past": PAST, "recent": RECENT, "tokens": TOKENS}
    for name, shape in family.shapes.items():
        # at once what fits: the keys and values of 64 whole histories are too much for wide models
        sizes = (1, 64) if shape["dim"] == 64 else (1, 8)
        figures[name] = {f"batch {users}": compare(family, shape, users) for users in sizes}
        print(name, json.dumps(figures[name], indent=1), flush=True)
    name = "compressed_requests_hllm" if hllm else "compressed_requests"
    print("written to", write_result(name, figures))


def compare(family: Family, shape: dict[str, int], users: int) -> dict[str, Any]:
    """Median milliseconds of a request for ``users`` users, and ratios to the whole history."""
    total = PAST + RECENT
    items = torch.randint(ITEMS, (users, total), generator=torch.Generator().manual_seed(0))
    # an event an hour
    times = (torch.arange(total) * 3_600).expand(users, -1)
    batch = Batch(
        items=items.flatten(), times=times.flatten(), offsets=torch.arange(users + 1) * total
    )
    at = times[:, -1] + 60
    torch.manual_seed(0)

    def made(kind: tuple[type[UserModel], type[Any]], **settings: Any) -> UserModel:
        model, config = kind
        built: UserModel = model(config(num_items=ITEMS, **shape, **settings))
        return built

    ring = made(family.ring, window=total)
    paper = made(family.paper, placement=((PAST, TOKENS),), recent=RECENT)
    stream = made(family.stream, segment=RECENT, keep=64)
    uncut = made(family.stream, segment=total, keep=0)
    states, calls = {}, {}
    models = {"whole": uncut, "cached": paper, "stream": stream, "ring": ring}
    for name, model in models.items():
        with serving(model):
            _, states[name] = model.encode(batch)
            if model is stream:
                # on to its fullest, just before the next fold
                for number in range(stream.config.keep):
                    more = Batch.one_event_each(items[:, number], times[:, -1])
                    states[name] = stream.step(more, states[name])
        calls[name] = request(model, states[name], at)
    calls["published"] = lambda: ring(batch)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with ExitStack() as quiet:
        for model in models.values():
            quiet.enter_context(serving(model))
        for number in range(ROUNDS[users] + 1):
            for name, call in calls.items():
                began = time.perf_counter()
                call()
                if number >= 1:
                    seconds[name].append(time.perf_counter() - began)
    found = {name: median(values) for name, values in seconds.items()}
    return {
        "milliseconds": {name: round(1e3 * value, 3) for name, value in found.items()},
        "ratio to whole": {
            name: round(
                median(a / b for a, b in zip(seconds[name], seconds["whole"], strict=True)), 4
            )
            for name in found
        },
        "events read": {
            "whole": total,
            "published": total,
            "cached": RECENT,
            "stream": stream.config.capacity,
            "ring": 1,
        },
        "bytes_per_user": {name: bytes_per_user(state) for name, state in states.items()},
    }


def request(model: UserModel, state: Any, at: torch.Tensor) -> Callable[[], object]:
    return lambda: model.user_embedding(state, at)  # type: ignore[call-arg]


if __name__ == "__main__":
    typer.run(main)
