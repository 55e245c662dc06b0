"""The models that come with the package: one file and one line here each."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any, get_type_hints

from everlong.models.user_model import UserModel

BUILTIN: Mapping[str, str] = MappingProxyType(
    {
        "popularity": "everlong.models.popularity:Popularity",
        "recent_popularity": "everlong.models.popularity:RecentPopularity",
        "markov": "everlong.models.markov:Markov",
        "sasrec": "everlong.models.sasrec:SASRec",
        "gru4rec": "everlong.models.gru4rec:GRU4Rec",
        "lru": "everlong.models.lru:LRU",
        "hstu": "everlong.models.hstu:HSTU",
        "persrec": "everlong.models.persrec:PerSRec",
        "persrec_paper": "everlong.models.persrec_paper:PaperPerSRec",
        "hllm": "everlong.models.hllm:HLLM",
        "persrec_hllm": "everlong.models.persrec_hllm:PerSRecHLLM",
        "persrec_paper_hllm": "everlong.models.persrec_hllm:PaperPerSRecHLLM",
    }
)
"""Name of each model and where its class is."""

RANKERS: Mapping[str, str] = MappingProxyType(
    {
        "ifa": "everlong.models.ifa:IFA",
        "target_attention": "everlong.models.target_attention:TargetAttention",
    }
)
"""Models that order the candidates of requests; they learn from requests, not from next items."""


def load_model_class(name: str) -> type[UserModel]:
    """The class of a built-in model, imported now; it is made as ``cls(config)``.

    Raises:
        ValueError: if there is no such model, naming the nearest.
    """
    if name in RANKERS:
        raise ValueError(
            f"{name!r} ranks candidates of requests and learns from these: expected one of "
            f"{', '.join(BUILTIN)}, received a ranker; train it with everlong.training.ranker"
        )
    if name not in BUILTIN:
        near = difflib.get_close_matches(name.lower(), BUILTIN, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown model {name!r}: {hint}Valid names: {', '.join(BUILTIN)}")
    module, _, attribute = BUILTIN[name].partition(":")
    loaded: type[UserModel] = getattr(import_module(module), attribute)
    return loaded


def load_ranker_class(name: str) -> type[Any]:
    """The class of a built-in ranker, imported now; it is made as ``cls(config)``.

    Raises:
        ValueError: if there is no such ranker.
    """
    if name not in RANKERS:
        raise ValueError(f"unknown ranker {name!r}: expected one of {', '.join(RANKERS)}")
    module, _, attribute = RANKERS[name].partition(":")
    loaded: type[Any] = getattr(import_module(module), attribute)
    return loaded


def config_class(model_class: type[UserModel]) -> type[Any]:
    """The frozen dataclass that ``model_class`` is made from, read from its constructor.

    Raises:
        TypeError: if the constructor names no such class.
    """
    kind = get_type_hints(model_class.__init__).get("config")
    if not isinstance(kind, type):
        raise TypeError(
            f"expected {model_class.__name__}.__init__(self, config: SomeConfig), "
            "received no annotated argument named config; annotate it"
        )
    return kind
