"""A model on disk: a folder of plain files, each with its size and digest, and nothing to execute.

``model.safetensors`` and ``config.json`` are the model, ``items.parquet`` maps its item rows to
ids, ``users.parquet`` and ``users.safetensors`` are the states of its users, ``metrics.json`` says
how good it was, and ``README.md`` is a card for people.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import polars as pl
from pydantic import ConfigDict
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from everlong.recommender.migrations import MIGRATIONS, Contents
from everlong.system.atomic import new_folder
from everlong.system.formats import Upgraded, check_version, migrate
from everlong.system.settings import Settings, load_settings

FORMAT = len(MIGRATIONS) + 1
KIND = "a model folder"
BESIDE = ("format", "everlong", "files", "digest")
CONFIG = "config.json"
FILES = (
    "model.safetensors",
    "items.parquet",
    "users.parquet",
    "users.safetensors",
    "metrics.json",
    "README.md",
)


class FileFacts(Settings):
    """What a file of the folder must be."""

    bytes: int
    sha256: str


class FolderConfig(Settings):
    """``config.json``: what it takes to build the model again, and where it comes from.

    Beside these are ``format``, the version of the folder; ``everlong``, the version of the package
    that wrote it; ``files``, the facts of each other file; and ``digest``, the sha256 of all that.
    """

    model: str
    architecture: dict[str, Any]
    train: dict[str, Any]
    protocol: dict[str, Any]
    time_unit: str
    data: dict[str, Any]
    versions: dict[str, str]


class ModelFolder(Settings):
    """The contents of a model folder, read, checked, and as the latest version has them."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    config: FolderConfig
    weights: dict[str, Tensor]
    item_ids: pl.Series
    user_ids: pl.Series
    users: dict[str, Tensor]
    metrics: dict[str, Any]


def write_folder(
    path: Path,
    *,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    item_ids: pl.Series,
    user_ids: pl.Series,
    users: Mapping[str, Tensor],
    metrics: Mapping[str, Any],
    card: str,
) -> None:
    """Writes a model folder whole, or leaves what was there.

    Raises:
        OSError: if it cannot be written, as on a full disk.
        ValueError: if ``path`` is a file, or a folder that is not a model folder.
    """
    check_target(path)
    with new_folder(path) as folder:
        tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
        (folder / "model.safetensors").write_bytes(save_tensors(tensors))
        (folder / "users.safetensors").write_bytes(save_tensors(dict(users)))
        _write_ids(folder / "items.parquet", item_ids.alias("item_id"))
        _write_ids(folder / "users.parquet", user_ids.alias("user_id"))
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        (folder / "README.md").write_text(card)
        files = {name: file_facts((folder / name).read_bytes()) for name in FILES}
        facts = {"format": FORMAT, "everlong": version("everlong"), **config, "files": files}
        text = json.dumps({**facts, "digest": _digest(facts)}, indent=2)
        (folder / CONFIG).write_text(text + "\n")


def check_target(path: Path) -> None:
    """Raises ``ValueError`` if ``path`` is neither free, nor empty, nor a model folder."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: expected a free name or a model folder")
    if path.is_dir() and any(path.iterdir()) and not (path / CONFIG).is_file():
        raise ValueError(
            f"{path} holds other files: expected a free name or a model folder; choose another"
        )


def read_folder(path: Path) -> ModelFolder:
    """The contents of a model folder of this version or an earlier one; nothing is written.

    Raises:
        FileNotFoundError: if there is no such folder.
        NewerFormatError: if a later version of everlong wrote it.
        ValueError: if a file is missing, cut or changed.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no model folder at {path}; write one with save()")
    raw, found = read_config(path)
    files = _facts_of_files(path, raw)
    data = {name: _checked(path / name, files) for name in FILES}
    try:
        contents = Contents(
            config={k: v for k, v in raw.items() if k not in BESIDE},
            weights=load_tensors(data["model.safetensors"]),
            item_ids=pl.read_parquet(data["items.parquet"])["item_id"],
            user_ids=pl.read_parquet(data["users.parquet"])["user_id"],
            users=load_tensors(data["users.safetensors"]),
            metrics=json.loads(data["metrics.json"]),
        )
        contents = migrate(contents, found, MIGRATIONS)
        config = load_settings(FolderConfig, contents.config)
        return ModelFolder(**{**contents._asdict(), "config": config})
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}; restore it or train again") from error


def upgrade_folder(path: Path) -> Upgraded:
    """Rewrites a model folder of an earlier version as this one writes it; else leaves it.

    Raises:
        NewerFormatError: if a later version of everlong wrote it.
        OSError: if it cannot be written; then it is as before.
        ValueError: if a file is missing, cut or changed.
    """
    _, found = read_config(path)
    if found < FORMAT:
        stored = read_folder(path)
        write_folder(
            path,
            config=stored.config.model_dump(),
            weights=stored.weights,
            item_ids=stored.item_ids,
            user_ids=stored.user_ids,
            users=stored.users,
            metrics=stored.metrics,
            card=(path / "README.md").read_text(),
        )
    return Upgraded(KIND, found, FORMAT)


def read_config(path: Path) -> tuple[dict[str, Any], int]:
    """``config.json`` of a model folder as it was written, and the version of the folder.

    Raises:
        NewerFormatError: if a later version of everlong wrote it.
        ValueError: if it is missing or was changed.
    """
    try:
        raw = json.loads((path / CONFIG).read_text())
        if not isinstance(raw, dict) or "format" not in raw:
            raise ValueError("expected a description with its format")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a model folder: {CONFIG}: {error}") from error
    found = check_version(path, KIND, raw["format"], FORMAT, written_by=raw.get("everlong"))
    if raw.get("digest") != _digest({key: raw[key] for key in raw if key != "digest"}):
        raise ValueError(
            f"{path / CONFIG} was changed: its digest does not fit; "
            "restore the folder from a copy or train again"
        )
    return raw, found


def _facts_of_files(path: Path, raw: Mapping[str, Any]) -> dict[str, FileFacts]:
    try:
        return {name: load_settings(FileFacts, facts) for name, facts in raw["files"].items()}
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a model folder: {CONFIG}: {error}") from error


def file_facts(data: bytes) -> dict[str, Any]:
    """Size and digest of a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _digest(facts: Mapping[str, Any]) -> str:
    """The digest of plain values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _checked(path: Path, files: Mapping[str, FileFacts]) -> bytes:
    facts = files.get(path.name)
    if facts is None or not path.is_file():
        raise ValueError(f"{path} is missing; restore the folder from a copy or train again")
    data = path.read_bytes()
    found = file_facts(data)
    if found != facts.model_dump():
        raise ValueError(
            f"{path} was cut or changed: expected {facts.bytes} bytes with sha256 "
            f"{facts.sha256[:12]}..., found {found['bytes']} with {found['sha256'][:12]}...; "
            "restore the folder from a copy or train again"
        )
    return data


def _write_ids(path: Path, ids: pl.Series) -> None:
    try:
        ids.to_frame().write_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise OSError(f"cannot write {path}: {error}") from error
