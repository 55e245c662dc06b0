"""The effect of the history length at test: a trained LRU after 50, 200, 400 or all events.

    python benchmarks/quality.py run ml-1m paper lru
    python benchmarks/window.py

The model was trained on windows of 200 events; only the number of events before the target varies.
Items of this window are excluded, so a longer window also excludes more; the second column of
figures always excludes all items of the history.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from everlong.data.split import Split, split
from everlong.evaluation.metrics import estimate, parse_metric
from everlong.evaluation.next_item import evaluate
from everlong.inference.encode import encode_histories
from everlong.inference.topk import mask_items, rank_of
from everlong.models.device import serving
from everlong.models.lru import LRU, LRUConfig
from quality import DATA_DIR, protocol_for, read_log
from record import write_result

RUN = Path("runs") / "quality" / "ml-1m-paper-lru-0"


def main() -> None:
    events = read_log("ml-1m", DATA_DIR, 0)
    figures = {}
    for window in (50, 200, 400, None):
        parts = split(events, protocol_for("ml-1m", "paper").replace({"window": window}))
        model = best_model(parts)
        found = evaluate(model, parts.events, parts.test).metrics["NDCG@10"].mean
        figures[str(window or "all")] = {
            "NDCG@10": found,
            "NDCG@10, all seen items ruled out": with_all_seen(model, parts),
        }
    print(json.dumps(figures, indent=2))
    print("written to", write_result("window", {"data": "ml-1m", "seed": 0, "windows": figures}))


def best_model(parts: Split) -> LRU:
    model = LRU(LRUConfig(num_items=parts.events.num_items))
    with safe_open(str(RUN / "checkpoint.safetensors"), framework="pt") as file:
        names = [name for name in file.keys() if name.startswith("best/")]  # noqa: SIM118
        model.load_state_dict({n.removeprefix("best/"): file.get_tensor(n) for n in names})
    return model


def with_all_seen(model: LRU, parts: Split) -> float:
    """NDCG@10 with all items of the whole history excluded, for any window."""
    test, events = parts.test, parts.events
    state = encode_histories(model, events, test.start, test.stop)
    first = events.offsets[test.user]
    lengths = test.stop - first
    place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    items = events.items[np.repeat(first, lengths) + place].astype(np.int64)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    with serving(model):
        scores = mask_items(model.score(state), torch.from_numpy(rows), torch.from_numpy(items))
        ranks = rank_of(scores, torch.from_numpy(events.items[test.stop].astype(np.int64)))
    return estimate(ranks.numpy(), test.user, [parse_metric("NDCG@10")])["NDCG@10"].mean


if __name__ == "__main__":
    main()
