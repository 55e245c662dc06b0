"""Migrations of checkpoints, and of what a model folder has in common with them.

A name that changes within a version is added to the table of that version; a table is closed once
a version with it was published.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

V = TypeVar("V")

# version 2

SETTINGS_2: Mapping[str, str] = {"piece_events": "micro_batch_events"}
"""Settings of training: old name, new name."""

VALUES_2: Mapping[str, Mapping[str, str]] = {"loss": {"nce": "infonce"}}
"""Their values: new name of the setting, old value, new value."""

PARAMETERS_2: Mapping[str, str] = {"log_sharpness_bias": "log_inverse_temperature"}
"""Parameters of models: one part of a dotted name, and what it is called now."""

ARCHITECTURE_2: Mapping[str, str] = {}
"""Settings of models: old name, new name."""


def training_2(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of training by the names of version 2."""
    renamed = {SETTINGS_2.get(name, name): value for name, value in settings.items()}
    return {
        name: VALUES_2[name].get(value, value) if name in VALUES_2 else value
        for name, value in renamed.items()
    }


def parameters_2(values: Mapping[str, V]) -> dict[str, V]:
    """Values by dotted names of parameters, by the names of version 2."""
    return {
        ".".join(PARAMETERS_2.get(part, part) for part in name.split(".")): value
        for name, value in values.items()
    }


def first_parameter(name: str) -> str:
    """The dotted name that version 1 gave a parameter of today."""
    first = {new: old for old, new in PARAMETERS_2.items()}
    return ".".join(first.get(part, part) for part in name.split("."))


def architecture_2(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a model, and of those inside it, by the names of version 2."""
    return {
        ARCHITECTURE_2.get(name, name): architecture_2(value) if isinstance(value, dict) else value
        for name, value in settings.items()
    }


# checkpoints


class CheckpointFile(NamedTuple):
    """The contents of a checkpoint as they lie in the file."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor]


def _checkpoint_2(stored: CheckpointFile) -> CheckpointFile:
    run = dict(stored.facts["run"])
    run["training"] = training_2(run["training"])
    run["architecture"] = architecture_2(run["architecture"])
    run["parameters"] = parameters_2(run["parameters"])
    return CheckpointFile({**stored.facts, "run": run}, parameters_2(stored.tensors))


CHECKPOINTS: tuple[Callable[[CheckpointFile], CheckpointFile], ...] = (_checkpoint_2,)
