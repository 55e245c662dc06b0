"""Models by name: those of this package, those of installed plug-ins, and any class by its path.

A class is imported because the caller names it. A model folder names its class too, but a folder
never has code imported: ``stored_model_class`` finds built-in models and those that the caller has
named before in this process.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_type_hints, overload

from everlong.models.user_model import Task, UserModel

if TYPE_CHECKING:
    from everlong.models.ranker import Ranker

GROUP = "everlong.models"
"""The entry points by which an installed package adds models."""


class BuiltIn(NamedTuple):
    """A model of this package, known without its import."""

    path: str  # package.module:Class
    task: Task


BUILTIN: Mapping[str, BuiltIn] = MappingProxyType(
    {
        "popularity": BuiltIn("everlong.models.popularity:Popularity", "next_item"),
        "recent_popularity": BuiltIn("everlong.models.popularity:RecentPopularity", "next_item"),
        "markov": BuiltIn("everlong.models.markov:Markov", "next_item"),
        "sasrec": BuiltIn("everlong.models.sasrec:SASRec", "next_item"),
        "gru4rec": BuiltIn("everlong.models.gru4rec:GRU4Rec", "next_item"),
        "lru": BuiltIn("everlong.models.lru:LRU", "next_item"),
        "hstu": BuiltIn("everlong.models.hstu:HSTU", "next_item"),
        "persrec": BuiltIn("everlong.models.persrec:PerSRec", "next_item"),
        "persrec_paper": BuiltIn("everlong.models.persrec_paper:PublishedPerSRecHSTU", "next_item"),
        "hllm": BuiltIn("everlong.models.hllm:HLLM", "next_item"),
        "persrec_hllm": BuiltIn("everlong.models.persrec_hllm:PerSRecHLLM", "next_item"),
        "persrec_paper_hllm": BuiltIn(
            "everlong.models.persrec_hllm:PublishedPerSRecHLLM", "next_item"
        ),
        "ifa": BuiltIn("everlong.models.ifa:IFA", "rank"),
        "target_attention": BuiltIn("everlong.models.target_attention:TargetAttention", "rank"),
    }
)
"""Name of each model, where its class is and what it learns from."""

_named: dict[str, type[UserModel]] = {}
"""Classes that callers have named in this process, by import path: what folders may name."""

_DOES: Mapping[Task, tuple[str, str]] = MappingProxyType(
    {
        "next_item": ("predicts next items", "fit"),
        "rank": ("ranks candidates of requests", "fit_ranker"),
    }
)
"""What a model of each task does, and what trains it."""


def built_in_names(task: Task | None = None) -> list[str]:
    """Names of the models of this package, of one task or of all."""
    return [name for name, model in BUILTIN.items() if task in (None, model.task)]


@overload
def load_model_class(
    model: str | type[UserModel], task: Literal["rank"]
) -> type[Ranker]: ...  # pragma: no cover
@overload
def load_model_class(
    model: str | type[UserModel], task: Task | None = "next_item"
) -> type[UserModel]: ...  # pragma: no cover
def load_model_class(
    model: str | type[UserModel], task: Task | None = "next_item"
) -> type[UserModel]:
    """The class of a model that the caller names, imported now; it is made as ``cls(config)``.

    From now on folders may name it too.

    Args:
        model: a built-in name, the name of an entry point of the group ``everlong.models``, an
            import path ``package.module:Class``, or the class itself.
        task: what the model must learn from; None = anything.

    Raises:
        ValueError: if there is no such model, naming the nearest, or it has another task.
        TypeError: if what is named is not a model.
    """
    if isinstance(model, str):
        if model in BUILTIN:
            _check_task(model, BUILTIN[model].task, task)
        kind = _import(_path_of(model, task))
    else:
        kind = model
    if not (isinstance(kind, type) and issubclass(kind, UserModel)):
        raise TypeError(
            "expected a class that inherits everlong.models.user_model.UserModel, received "
            f"{kind!r}"
        )
    _check_task(model_name(kind), kind.task, task)
    _named[import_path(kind)] = kind
    return kind


@overload
def stored_model_class(name: str, task: Literal["rank"]) -> type[Ranker]: ...  # pragma: no cover
@overload
def stored_model_class(
    name: str, task: Task | None = "next_item"
) -> type[UserModel]: ...  # pragma: no cover
def stored_model_class(name: str, task: Task | None = "next_item") -> type[UserModel]:
    """The class that a stored ``model_name`` means: a built-in one, or one that was named before.

    Raises:
        ValueError: if it is neither, or has another task. Nothing is imported then.
    """
    if name in BUILTIN:
        return load_model_class(name, task)
    module, _, attribute = name.rpartition(":")
    found = _named.get(name)
    if found is None and module == "__main__":
        # a notebook has no import path, so its classes are known by their own names alone
        found = next((kind for kind in _named.values() if kind.__qualname__ == attribute), None)
    if found is None and not module:
        raise ValueError(_unknown(name, built_in_names(task)))
    if found is None:
        raise ValueError(
            f"expected a built-in model or one that the caller names, received {name!r}: "
            f"{_nearest(name, _named)}A folder alone has no code imported; name its model, as in "
            f'everlong.load(folder, models=["{name}"]) or --allow {name}'
        )
    _check_task(name, found.task, task)
    return found


def model_name(kind: type[UserModel]) -> str:
    """What a folder calls a class: the name of a built-in model, or an import path."""
    path = import_path(kind)
    return next((name for name, model in BUILTIN.items() if model.path == path), path)


def import_path(kind: type[UserModel]) -> str:
    """``package.module:Class``; a class of a script that runs has the name of its file."""
    module = kind.__module__
    if module == "__main__":
        main = sys.modules["__main__"]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        if spec is not None:
            module = spec.name
        elif file is not None:
            module = Path(file).stem
    return f"{module}:{kind.__qualname__}"


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


def _path_of(name: str, task: Task | None) -> str:
    """The import path that a name means."""
    if name in BUILTIN:
        return BUILTIN[name].path
    if ":" in name:
        return name
    plugins = entry_points(group=GROUP)
    found = sorted({plugin.value for plugin in plugins if plugin.name == name})
    if len(found) > 1:
        raise ValueError(
            f"model {name!r} is an entry point of several packages: expected one, received "
            f"{', '.join(found)}; name the import path that you mean"
        )
    if found:
        return found[0]
    valid = [*built_in_names(task), *(plugin.name for plugin in plugins)]
    raise ValueError(f"{_unknown(name, valid)}; or name a class of your own, package.module:Class")


def _import(path: str) -> Any:
    """What an import path names."""
    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise ValueError(f"expected an import path package.module:Class, received {path!r}")
    try:
        found: Any = import_module(module)
    except ModuleNotFoundError as error:
        # a module that the named one lacks is a fault of that module, and shows itself
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"cannot import {path!r}: expected a module that Python finds, received no module "
            f"{error.name!r}; install it, or run where it lies"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            valid = [
                name
                for name, value in vars(found).items()
                if isinstance(value, type) and issubclass(value, UserModel)
            ]
            raise ValueError(
                f"no class {attribute!r} in {module}: {_nearest(part, valid)}Models there: "
                f"{', '.join(valid) or 'none'}"
            )
        found = getattr(found, part)
    return found


def _check_task(name: str, received: Task, expected: Task | None) -> None:
    if expected is not None and expected != received:
        does, trained = _DOES[received]
        valid = ", ".join(built_in_names(expected))
        raise ValueError(
            f"{name!r} {does} and is trained with everlong.{trained}: expected a model that "
            f"{_DOES[expected][0]}, such as {valid}"
        )


def _unknown(name: str, valid: Sequence[str]) -> str:
    hint = _nearest(name.lower(), valid)
    return f"unknown model {name!r}: {hint}Valid names: {', '.join(valid)}"


def _nearest(received: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(received, list(valid), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""
