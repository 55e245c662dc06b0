"""A training run on disk: one safetensors file, replaced whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from everlong.models.state import State, check_same, field_names
from everlong.system.atomic import write_bytes
from everlong.system.formats import NewerFormatError, Upgraded, check_version, migrate
from everlong.training.migrations import CHECKPOINTS, CheckpointFile

FORMAT = len(CHECKPOINTS) + 1
KIND = "a checkpoint"
FILE = "checkpoint.safetensors"
LOG = "train.jsonl"


@dataclass
class Position:
    """Where a run stands: whole epochs done, what is done of this one, and the best so far."""

    epoch: int = 0
    batch: int = 0
    labels: int = 0
    loss_sum: float = 0.0
    waited: int = 0
    best_epoch: int = 0
    best_score: float = -math.inf


@dataclass
class Checkpoint:
    """Everything that the rest of a run depends on."""

    run: Mapping[str, Any]
    position: Position
    history: list[dict[str, Any]]
    model: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    random: Tensor
    carried: State | None
    precision: str

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether a folder holds a checkpoint."""
        return (folder / FILE).is_file()

    def write(self, folder: Path) -> None:
        """Replaces the checkpoint and the log of ``folder``.

        Raises:
            OSError: if the folder cannot be written; what was there before is untouched.
        """
        tensors = {"random": self.random}
        tensors |= {f"model/{name}": value for name, value in self.model.items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        for index, slots in self.optimizer["state"].items():
            tensors |= {f"optimizer/{index}/{slot}": value for slot, value in slots.items()}
        if self.carried is not None:
            names = field_names(self.carried)
            tensors |= {f"carried/{n}": v for n, v in zip(names, self.carried, strict=True)}
        facts = {
            "run": dict(self.run),
            "position": asdict(self.position),
            "history": self.history,
            "groups": self.optimizer["param_groups"],
            "precision": self.precision,
        }
        # copies, because tensors may share memory and the format forbids that
        cloned = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        _write_file(folder / FILE, CheckpointFile(facts, cloned))
        lines = "".join(json.dumps(record) + "\n" for record in self.history)
        write_bytes(folder / LOG, lines.encode())

    @staticmethod
    def read(folder: Path, *, run: Mapping[str, Any], state_like: State) -> Checkpoint:
        """The checkpoint of a folder.

        Args:
            folder: where it was written.
            run: the identity that it must have.
            state_like: a state of one user, for the carried state.

        Raises:
            NewerFormatError: if a later version of everlong wrote it.
            ValueError: if the file is damaged, or belongs to another run.
        """
        path = folder / FILE
        try:
            facts, tensors = _read_file(path)[0]
            saved = Checkpoint(
                run=facts["run"],
                position=Position(**facts["position"]),
                history=facts["history"],
                model=_below(tensors, "model/"),
                best=_below(tensors, "best/"),
                optimizer={"state": _slots(tensors), "param_groups": facts["groups"]},
                random=tensors["random"],
                carried=None,
                precision=facts["precision"],
            )
        except NewerFormatError:
            raise
        except Exception as error:
            raise ValueError(
                f"{path} is not a readable checkpoint ({type(error).__name__}: {error}); "
                "remove it to train from the start"
            ) from error
        _check_run(path, run, saved.run)
        return replace(saved, carried=_carried(tensors, state_like))


def upgrade_checkpoint(folder: Path) -> Upgraded:
    """Rewrites a checkpoint of an earlier version as this one writes it; else leaves it.

    Raises:
        NewerFormatError: if a later version of everlong wrote it.
        OSError: if it cannot be written; then it is as before.
        ValueError: if it is damaged.
    """
    path = folder / FILE
    try:
        stored, found = _read_file(path)
    except NewerFormatError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
    if found < FORMAT:
        _write_file(path, stored)
    return Upgraded(KIND, found, FORMAT)


def _write_file(path: Path, stored: CheckpointFile) -> None:
    facts = {**stored.facts, "format": FORMAT, "everlong": version("everlong")}
    write_bytes(path, save_tensors(stored.tensors, metadata={"facts": json.dumps(facts)}))


def _read_file(path: Path) -> tuple[CheckpointFile, int]:
    """The contents of a checkpoint as the latest version has them, and the version it has."""
    with safe_open(str(path), framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # the first version had none
    found = check_version(
        path, KIND, facts.get("format", 1), FORMAT, written_by=facts.get("everlong")
    )
    return migrate(CheckpointFile(facts, tensors), found, CHECKPOINTS), found


def _check_run(path: Path, expected: Mapping[str, Any], received: Mapping[str, Any]) -> None:
    # through JSON, so that tuples and lists compare equal
    wanted = json.loads(json.dumps(dict(expected)))
    different = _first_difference("", wanted, dict(received))
    if different:
        raise ValueError(
            f"{path} belongs to another run: {different}; "
            "train with the same settings and data, or into another folder"
        )


def _first_difference(name: str, expected: Any, received: Any) -> str:
    """What differs first between two nests of dictionaries, in words, or nothing."""
    if isinstance(expected, dict) and isinstance(received, dict):
        for key in {**expected, **received}:
            below = f"{name}.{key}" if name else key
            found = _first_difference(below, expected.get(key), received.get(key))
            if found:
                return found
        return ""
    return "" if expected == received else f"{name} is {received!r}, expected {expected!r}"


def _carried(tensors: Mapping[str, Tensor], like: State) -> State | None:
    found = _below(tensors, "carried/")
    if not found:
        return None
    if found.keys() != set(field_names(like)):
        raise ValueError(
            f"the checkpoint carries a state with fields {sorted(found)}, expected "
            f"{field_names(like)}; it belongs to another model: remove it to train from the start"
        )
    carried = type(like)(*(found[name] for name in field_names(like)))
    check_same(like, carried)
    return carried


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


def _slots(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _below(tensors, "optimizer/").items():
        index, slot = name.split("/")
        state.setdefault(int(index), {})[slot] = value
    return state
