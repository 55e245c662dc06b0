"""Sequential recommendation over whole user histories at a constant cost per event."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everlong.events import Events, read_events
    from everlong.index import open_events
    from everlong.interrupt import Interrupted
    from everlong.items import ItemTable, read_items
    from everlong.pipeline import fit
    from everlong.ranking_pipeline import fit_ranker
    from everlong.recommender import Recommender, UpdateReport, load
    from everlong.split import PAPER, TEMPORAL, Protocol
    from everlong.train import TrainConfig
    from everlong.train_ranker import RankerTrainConfig

__version__ = "0.1.0"

__all__ = [
    "PAPER",
    "TEMPORAL",
    "Events",
    "Interrupted",
    "ItemTable",
    "Protocol",
    "RankerTrainConfig",
    "Recommender",
    "TrainConfig",
    "UpdateReport",
    "fit",
    "fit_ranker",
    "load",
    "open_events",
    "read_events",
    "read_items",
]

# imported at first use, so that `import everlong` and `everlong --help` do not wait for torch
_HOMES = {
    "PAPER": "everlong.split",
    "TEMPORAL": "everlong.split",
    "Events": "everlong.events",
    "Interrupted": "everlong.interrupt",
    "ItemTable": "everlong.items",
    "Protocol": "everlong.split",
    "RankerTrainConfig": "everlong.train_ranker",
    "Recommender": "everlong.recommender",
    "TrainConfig": "everlong.train",
    "UpdateReport": "everlong.recommender",
    "fit": "everlong.pipeline",
    "fit_ranker": "everlong.ranking_pipeline",
    "load": "everlong.recommender",
    "open_events": "everlong.index",
    "read_events": "everlong.events",
    "read_items": "everlong.items",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
