"""A training run on disk: one safetensors file, replaced whole or not at all."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from everlong.atomic import write_bytes
from everlong.state import State, check_same, field_names

FILE = "checkpoint.safetensors"
LOG = "train.jsonl"


@dataclass
class Position:
    """Where a run stands: whole epochs done, batches done in this one, and the best so far."""

    epoch: int = 0
    batch: int = 0
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
        }
        cloned = {name: value.detach().cpu().clone() for name, value in tensors.items()}
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / FILE, save_tensors(cloned, metadata={"facts": json.dumps(facts)}))
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
            ValueError: if the file is damaged, or belongs to another run.
        """
        path = folder / FILE
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = json.loads(file.metadata()["facts"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(
                f"{path} is not a readable checkpoint ({error}); remove it to train from the start"
            ) from error
        _check_run(path, run, facts["run"])
        carried = None
        names = [f"carried/{name}" for name in field_names(state_like)]
        if names[0] in tensors:
            carried = type(state_like)(*(tensors[name] for name in names))
            check_same(state_like, carried)
        return Checkpoint(
            run=facts["run"],
            position=Position(**facts["position"]),
            history=facts["history"],
            model=_below(tensors, "model/"),
            best=_below(tensors, "best/"),
            optimizer={"state": _slots(tensors), "param_groups": facts["groups"]},
            random=tensors["random"],
            carried=carried,
        )


def _check_run(path: Path, expected: Mapping[str, Any], received: Mapping[str, Any]) -> None:
    # through JSON, so that tuples and lists compare equal
    wanted = json.loads(json.dumps(dict(expected)))
    different = [key for key in wanted if wanted[key] != received.get(key)]
    if different:
        key = different[0]
        raise ValueError(
            f"{path} belongs to another run: {key} is {received.get(key)}, expected {wanted[key]}; "
            "train with the same settings and data, or into another folder"
        )


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


def _slots(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _below(tensors, "optimizer/").items():
        index, slot = name.split("/")
        state.setdefault(int(index), {})[slot] = value
    return state
