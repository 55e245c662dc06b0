"""The readable card of a model folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from everlong.inference.seen import UserBytes
from everlong.models.user_model import UserModel

if TYPE_CHECKING:
    from everlong.recommender.origin import Origin

SHOWN = ("NDCG@10", "Recall@10", "HitRate@10", "MRR@10", "GAUC", "AUC", "MRR", "LogLoss", "ECE")


def card(name: str, origin: Origin, model: UserModel, bytes_per_user: UserBytes) -> str:
    """Markdown that says what a model is, what it learned from and how good it was."""
    data = origin.data
    numbers = sum(parameter.numel() for parameter in model.parameters())
    lines = [
        f"# {name}",
        "",
        f"Recommends the next of {model.num_items:,} items from a state of fixed size per user.",
        "",
        f"- learned from {data['events']:,} events of {data['users']:,} users"
        f" (fingerprint `{data['fingerprint'][:12]}`)",
        f"- {numbers:,} parameters; {bytes_per_user}; only seen items grow with the history",
        f"- protocol `{origin.protocol.name}`, seed {origin.train.seed}",
        f"- state: {model.state_kind}",
        "",
    ]
    for part, result in origin.metrics.items():
        lines += [f"## {part}", "", "| metric | mean | 95 % interval |", "|---|---|---|"]
        for metric in SHOWN:
            value = result["metrics"].get(metric)
            if value is not None and value["mean"] is not None:
                # earlier versions stored some metrics without an interval
                interval = (
                    "" if value["low"] is None else f"{value['low']:.4f} - {value['high']:.4f}"
                )
                lines.append(f"| {metric} | {value['mean']:.4f} | {interval} |")
        lines.append("")
    lines += [
        "## Use",
        "",
        "```python",
        "import everlong",
        "",
        'recommender = everlong.load("this folder")',
        "recommender.recommend(users, k=10)",
        "```",
        "",
    ]
    return "\n".join(lines)
