"""The cost of ranking: from the stored state, against softmax attention, and in training.

    python benchmarks/ranking_cost.py

One core, medians, the forms of a comparison in alternation. The limits, attention alone,
multiply-adds of one layer with L events, C candidates, width d = 64 in h = 4 heads: softmax 2 C L d
= 1.3e9 at L = 10,000 and C = 1,000; from stored sums C d (F + 1) = 1.1e6 with F = 16, for any
history; one event d (F + 1) = 1,100.

* read: attention of candidates over events, alone.
* event: one event for each of 64 users, the whole model.
* rank: 500 candidates from state to scores, the whole model.
* training: one pass over the history for all requests of a user, against one pass per candidate;
  the logits, and so the losses, are equal.
* drift: sums of a million events in float32 against float64.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import numba
import torch
from torch.nn.functional import elu, scaled_dot_product_attention

from everlong.models.batch import Batch, RequestBatch
from everlong.models.device import serving
from everlong.models.ifa import IFA, IFAConfig
from everlong.models.state import bytes_per_user
from everlong.ops.attention_types import Asked, History, Sums
from everlong.ops.linear_attention import linear_attention
from everlong.training.ranker_losses import ranker_loss
from record import write_result

DIM, HEADS = 64, 4
DEPTH = DIM // HEADS
ITEMS = 10_000


def main() -> None:
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    torch.manual_seed(0)
    figures: dict[str, Any] = {"threads": 1, "dim": DIM, "heads": HEADS}
    for name, measure in (
        ("read", reading),
        ("event", events),
        ("rank", ranking),
        ("training", training),
        ("drift", drift),
    ):
        figures[name] = measure()
        print(name, json.dumps(figures[name], indent=1), flush=True)
    print("written to", write_result("ranking_cost", figures))


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if number > 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in seconds.items()}


def reading() -> dict[str, Any]:
    found = {}
    for length in (1_000, 10_000, 100_000):
        for candidates in (100, 1_000):
            query = torch.randn(HEADS, candidates, DEPTH)
            key, value = (torch.randn(HEADS, length, DEPTH) for _ in range(2))
            features = elu(key) + 1
            weighted, mass = features.transpose(1, 2) @ value, features.sum(1)

            def kept(query: torch.Tensor = query, w: Any = weighted, z: Any = mass) -> object:
                asked = elu(query) + 1
                return (asked @ w) / (asked @ z[:, :, None])

            def softmax(query: Any = query, key: Any = key, value: Any = value) -> object:
                return scaled_dot_product_attention(query, key, value)

            def built(query: Any = query, key: Any = key, value: Any = value) -> object:
                features, asked = elu(key) + 1, elu(query) + 1
                weighted = features.transpose(1, 2) @ value
                return (asked @ weighted) / (asked @ features.sum(1)[:, :, None])

            rounds = 5 if length * candidates > 10**7 else 15
            took = in_turns({"softmax": softmax, "built anew": built, "kept": kept}, rounds)
            found[f"{candidates} candidates, {length} events"] = {
                "milliseconds": {name: round(1e3 * value, 4) for name, value in took.items()},
                "softmax over kept": round(took["softmax"] / took["kept"], 1),
            }
    return found


def model_of(**changes: Any) -> IFA:
    return IFA(IFAConfig(num_items=ITEMS, dim=DIM, heads=HEADS, **changes))


def random_batch(users: int, length: int) -> Batch:
    items = torch.randint(ITEMS, (users * length,))
    times = (10**9 + 600 * torch.arange(length)).repeat(users)
    return Batch(items=items, times=times, offsets=torch.arange(users + 1) * length)


def events() -> dict[str, Any]:
    model, found = model_of(), {}
    with serving(model):
        for users in (1, 64):
            for length in (10, 1_000):
                state = model.final_state(random_batch(users, length))
                newest = Batch.one_event_each(
                    torch.randint(ITEMS, (users,)), torch.full((users,), 2 * 10**9)
                )
                took = in_turns({"step": lambda n=newest, s=state: model.step(n, s)}, 50)["step"]
                found[f"{users} users after {length} events"] = round(1e6 * took / users, 1)
    return {"microseconds an event": found, "bytes_per_user": bytes_per_user(state)}


def ranking() -> dict[str, Any]:
    found = {}
    for name, changes in (
        ("with candidate attention", {}),
        ("without", {"candidate_attention": False}),
    ):
        model = model_of(**changes)
        with serving(model):
            state = model.final_state(random_batch(1, 1_000))
            items, at = torch.randint(ITEMS, (1, 500)), torch.tensor([2 * 10**9])
            call = partial(model.score, state, items, at)
            took = in_turns({"score": call}, 50)["score"]
        found[name] = round(1e3 * took, 3)
    return {"milliseconds for 500 candidates": found}


def training() -> dict[str, Any]:
    users, length, requests, candidates = 16, 400, 10, 8
    model = model_of(candidate_attention=False, dropout=0.0)
    batch = requests_of(users, length, requests, candidates)
    single = one_row_an_impression(batch)

    def update(batch: RequestBatch) -> float:
        model.zero_grad()
        loss = ranker_loss(model.rank(batch), batch.labels, batch.offsets, {"pointwise": 1.0})
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    losses = update(batch), update(single)
    took = in_turns({"requests": lambda: update(batch), "impressions": lambda: update(single)}, 5)
    impressions = users * requests * candidates
    return {
        "users": users,
        "events a user": length,
        "requests a user": requests,
        "candidates a request": candidates,
        "losses": losses,
        "impressions a second": {name: round(impressions / value) for name, value in took.items()},
        "ratio": round(took["impressions"] / took["requests"], 2),
    }


def requests_of(users: int, length: int, requests: int, candidates: int) -> RequestBatch:
    """Requests of users at equal steps over the second half of their histories."""
    events, total = random_batch(users, length), users * requests
    cut = (length // 2 + torch.arange(requests) * (length // 2 // requests)).repeat(users)
    offsets = torch.arange(total + 1) * candidates
    return RequestBatch(
        events=events,
        user=torch.arange(users).repeat_interleave(requests),
        cut=cut,
        times=10**9 + 600 * cut,
        offsets=offsets,
        items=torch.randint(ITEMS, (total * candidates,)),
        labels=torch.randint(2, (total * candidates,)).float(),
        rows=torch.arange(total),
    )


def one_row_an_impression(batch: RequestBatch) -> RequestBatch:
    """The same candidates, each with a copy of its history."""
    request = torch.arange(batch.user.numel()).repeat_interleave(batch.offsets.diff())
    cut, start = batch.cut[request], batch.events.offsets[batch.user[request]]
    offsets = torch.cat([cut.new_zeros(1), cut.cumsum(0)])
    first = (start - offsets[:-1]).repeat_interleave(cut)
    rows = torch.arange(request.numel())
    return replace(
        batch,
        events=batch.events.select(torch.arange(int(offsets[-1])) + first, offsets),
        user=rows,
        cut=cut,
        times=batch.times[request],
        offsets=torch.arange(request.numel() + 1),
        rows=rows,
    )


def drift() -> dict[str, Any]:
    count, found = 1_000_000, {}
    features, values = torch.rand(count, 1, DEPTH) + 0.1, torch.randn(count, 1, DEPTH)
    asked = Asked(*(torch.tensor(x) for x in ([0], [count], [0], [0, 8])))
    queries = torch.rand(8, 1, DEPTH)
    outputs = {}
    for dtype in (torch.float32, torch.float64):
        times = torch.zeros(count, dtype=torch.int64)
        history = History(features.to(dtype), values.to(dtype), times, torch.tensor([0, count]))
        none = torch.zeros(1, 1, 1, DEPTH, dtype=dtype)
        before = Sums(none[..., None].repeat(1, 1, 1, 1, DEPTH), none, torch.zeros(1).long())
        read, mass = linear_attention(history, queries.to(dtype), asked, torch.zeros(1), before)
        outputs[dtype] = (read[:, :, 0] / mass[..., 0, None]).double()
    exact = outputs[torch.float64]
    found["events"] = count
    found["largest error of an output"] = float((outputs[torch.float32] - exact).abs().max())
    found["largest output"] = float(exact.abs().max())
    return found


if __name__ == "__main__":
    main()
