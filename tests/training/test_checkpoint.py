import json
import math
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from everlong.system.formats import NewerFormatError
from everlong.training.checkpoint import FILE, FORMAT, LOG, Checkpoint, Position


class Memory(NamedTuple):
    hidden: Tensor
    user: Tensor


LIKE = Memory(torch.zeros(1, 2), torch.zeros(1, 3))
RUN = {"model": "M", "training": {"lr": 0.1, "sizes": (1, 2)}, "data": {"labels": 5}}


def checkpoint(carried: Memory | None = None, **changes: Any) -> Checkpoint:
    parts: dict[str, Any] = {
        "run": RUN,
        "position": Position(epoch=2, batch=3, labels=17, loss_sum=0.1 + 0.2, waited=1),
        "history": [{"epoch": 1, "loss": 2.5}, {"epoch": 2, "loss": 1 / 3}],
        "model": {"a.weight": torch.randn(3, 2), "a.bias": torch.randn(2)},
        "best": {"a.weight": torch.randn(3, 2), "a.bias": torch.randn(2)},
        "optimizer": {
            "state": {0: {"step": torch.tensor(4.0), "exp_avg": torch.randn(3, 2)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "params": [0, 1]}],
        },
        "random": torch.get_rng_state(),
        "carried": carried,
        "precision": "bfloat16",
    }
    return Checkpoint(**{**parts, **changes})


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(equal(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


@pytest.mark.parametrize("carried", [None, Memory(torch.randn(1, 2), torch.randn(1, 3))])
def test_all_of_a_run_comes_back(carried: Memory | None, tmp_path: Path) -> None:
    saved = checkpoint(carried)
    saved.write(tmp_path / "new" / "folder")
    back = Checkpoint.read(tmp_path / "new" / "folder", run=RUN, state_like=LIKE)
    for part in fields(Checkpoint):
        assert part.name == "run" or equal(getattr(saved, part.name), getattr(back, part.name))
    assert back.carried is None or type(back.carried) is Memory
    lines = (tmp_path / "new" / "folder" / LOG).read_text().splitlines()
    assert [json.loads(line) for line in lines] == saved.history


def test_a_run_without_a_best_yet(tmp_path: Path) -> None:
    checkpoint(best={}, position=Position(batch=1)).write(tmp_path)
    back = Checkpoint.read(tmp_path, run=RUN, state_like=LIKE)
    assert back.best == {}
    assert back.position.best_score == -math.inf


def test_tensors_that_share_memory_are_stored_apart(tmp_path: Path) -> None:
    tied = torch.randn(4, 2)
    checkpoint(model={"one": tied, "part": tied[1:3], "turned": tied.T}).write(tmp_path)
    back = Checkpoint.read(tmp_path, run=RUN, state_like=LIKE)
    assert torch.equal(back.model["part"], tied[1:3])
    assert torch.equal(back.model["turned"], tied.T)


def test_whether_there_is_a_checkpoint(tmp_path: Path) -> None:
    assert not Checkpoint.exists(tmp_path)
    assert not Checkpoint.exists(tmp_path / "none")
    checkpoint().write(tmp_path)
    assert Checkpoint.exists(tmp_path)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ({**RUN, "model": "N"}, r"model is 'M', expected 'N'"),
        ({**RUN, "training": {"lr": 0.2, "sizes": (1, 2)}}, r"training\.lr is 0\.1, expected 0\.2"),
        ({**RUN, "training": {"lr": 0.1, "sizes": (1, 3)}}, r"training\.sizes is \[1, 2\]"),
        ({**RUN, "data": {"labels": 6}}, r"data\.labels is 5, expected 6"),
        ({**RUN, "data": {}}, r"data\.labels is 5, expected None"),
        ({**RUN, "more": 1}, r"more is None, expected 1"),
    ],
)
def test_another_run_is_named(run: dict[str, Any], words: str, tmp_path: Path) -> None:
    checkpoint().write(tmp_path)
    with pytest.raises(ValueError, match=f"belongs to another run: {words}"):
        Checkpoint.read(tmp_path, run=run, state_like=LIKE)


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoint(Memory(torch.randn(1, 2), torch.randn(1, 4))).write(tmp_path)
    with pytest.raises(ValueError, match="keeps its spec"):
        Checkpoint.read(tmp_path, run=RUN, state_like=LIKE)

    class Other(NamedTuple):
        hidden: Tensor

    with pytest.raises(ValueError, match=r"fields \['hidden', 'user'\]"):
        Checkpoint.read(tmp_path, run=RUN, state_like=Other(torch.zeros(1, 2)))


@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_damage_is_refused(place: float, flip: int, cut: bool, tmp_path: Path) -> None:
    checkpoint().write(tmp_path)
    path = tmp_path / FILE
    data = bytearray(path.read_bytes())
    described = 8 + int.from_bytes(data[:8], "little")
    if cut:
        path.write_bytes(data[: int(place * len(data))])
    else:
        # the values carry no checksum: only what describes them can be checked
        data[int(place * described)] ^= flip
        path.write_bytes(data)
    try:
        back = Checkpoint.read(tmp_path, run=RUN, state_like=LIKE)
    except ValueError as error:
        message = str(error)
        refused = "readable checkpoint" in message or "another run" in message
        # a digit of the version itself may have changed
        refused = refused or isinstance(error, NewerFormatError)
        assert refused, message
        return
    assert not cut
    assert isinstance(back.position, Position)


@pytest.mark.parametrize("missing", ["run", "position", "history", "groups", "precision", None])
def test_a_file_of_another_kind_is_refused(missing: str | None, tmp_path: Path) -> None:
    checkpoint().write(tmp_path)
    with safe_open(str(tmp_path / FILE), framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
    metadata = {"facts": json.dumps({k: v for k, v in facts.items() if k != missing})}
    tensors = {"other" if missing is None else "random": torch.zeros(1)}
    (tmp_path / FILE).write_bytes(save(tensors, metadata=metadata))
    with pytest.raises(ValueError, match=r"not a readable checkpoint.*remove it to train"):
        Checkpoint.read(tmp_path, run=RUN, state_like=LIKE)


def rewritten(folder: Path, change: Mapping[str, Any]) -> None:
    """Changes the facts of a checkpoint; None takes one out."""
    path = folder / FILE
    with safe_open(str(path), framework="pt") as file:
        facts = json.loads(file.metadata()["facts"]) | dict(change)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = {name: value for name, value in facts.items() if value is not None}
    path.write_bytes(save(tensors, metadata={"facts": json.dumps(facts)}))


def test_a_later_version_says_what_to_install(tmp_path: Path) -> None:
    checkpoint().write(tmp_path)
    rewritten(tmp_path, {"format": FORMAT + 1, "everlong": "7.1.0"})
    with pytest.raises(NewerFormatError, match=r"install everlong 7\.1\.0 or later"):
        Checkpoint.read(tmp_path, run=RUN, state_like=LIKE)


def test_a_version_that_is_none_is_refused(tmp_path: Path) -> None:
    checkpoint().write(tmp_path)
    rewritten(tmp_path, {"format": "two"})
    with pytest.raises(ValueError, match="expected the version of a checkpoint"):
        Checkpoint.read(tmp_path, run=RUN, state_like=LIKE)


def test_a_write_that_fails_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint().write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint(history=[]).write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
