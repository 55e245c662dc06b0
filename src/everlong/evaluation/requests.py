"""Scores of the candidates of held-out requests."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from everlong.data.events import Events
from everlong.data.requests import RequestDataset, Requests
from everlong.evaluation.candidates import Ranked
from everlong.inference.encode import encode_histories
from everlong.models.device import serving
from everlong.models.ranker import Ranker
from everlong.models.state import take
from everlong.system.threads import yielding

BUDGET = 1 << 14
"""Events and candidates that are scored together in evaluation."""


@yielding()
def score_requests(
    model: Ranker,
    events: Events,
    requests: Requests,
    *,
    budget: int = BUDGET,
    device: torch.device | str = "cpu",
) -> Ranked:
    """The scores of all labelled requests, each history read once, as in training.

    Args:
        model: used in eval mode, without gradients.
        events: the log of the histories.
        requests: those without a label are left out.
        budget: most events and candidates read together.
        device: where the model is.
    """
    dataset = RequestDataset(events, requests)
    logits, labels, rows, sizes = [], [], [], []
    with serving(model):
        for batch in dataset.in_order(budget):
            logits.append(model.rank(batch.to(device)).double().cpu())
            labels.append(batch.labels)
            rows.append(batch.rows)
            sizes.append(batch.offsets.diff())
    return _ranked(requests, events, logits, labels, torch.cat(rows), torch.cat(sizes))


@yielding()
def serve_requests(model: Ranker, events: Events, requests: Requests, *, users: int = 64) -> Ranked:
    """The same scores, each from the state just before its request, as a server gives them."""
    dataset = RequestDataset(events, requests)
    asked = dataset.requests
    logits, labels = [], []
    sizes = np.diff(asked.offsets)
    start = events.offsets[asked.user]
    for begin in range(0, asked.num_requests, users):
        part = np.arange(begin, min(begin + users, asked.num_requests))
        state = encode_histories(model, events, start[part], asked.stop[part])
        with serving(model):
            for place, request in enumerate(part):
                chosen = slice(asked.offsets[request], asked.offsets[request + 1])
                items = torch.from_numpy(asked.items[chosen])[None]
                at = torch.tensor([asked.time[request]])
                one = take(state, torch.tensor([place]))
                logits.append(model.score(one, items, at)[0].double())
                labels.append(torch.from_numpy(asked.labels[chosen]))
    rows = torch.from_numpy(dataset.rows)
    return _ranked(requests, events, logits, labels, rows, torch.from_numpy(sizes))


def _ranked(
    requests: Requests,
    events: Events,
    logits: list[Tensor],
    labels: list[Tensor],
    rows: Tensor,
    sizes: Tensor,
) -> Ranked:
    return Ranked(
        logits=torch.cat(logits).numpy(),
        labels=torch.cat(labels).double().numpy(),
        request=rows.repeat_interleave(sizes).numpy(),
        user=requests.user,
        history_lengths=requests.history_lengths(events),
    )
