"""Files of a language model: download, and validation before they are loaded."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SAFE_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
"""The files that are downloaded from a repository: neither code nor pickles."""

OTHER_COPIES = ("onnx/*", "openvino/*", "original/*", "consolidated*")
"""Copies of the weights for other libraries, which are not downloaded."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
)
"""The files of tokenizers; each tokenizer has at least one of them."""


def import_extra(module: str) -> Any:
    """Imports a module of the extra ``text``.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'item text requires {module}, which cannot be imported: pip install "everlong[text]"'
        ) from error


def model_folder(name: str | Path) -> Path:
    """The local folder of a model, downloaded from the hub if necessary.

    Raises:
        ImportError: without the extra ``text``.
        ValueError: if the model is neither local nor on the hub.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.absolute()
    hub = import_extra("huggingface_hub")
    try:
        with silence():
            found: str = hub.snapshot_download(
                str(name), allow_patterns=list(SAFE_FILES), ignore_patterns=list(OTHER_COPIES)
            )
    # errors of the hub and of httpx have no common base class
    except Exception as error:
        # a partial download; required files are checked when they are read
        if (part := getattr(error, "snapshot_path", None)) is not None:
            return Path(part)
        raise ValueError(
            f"no model {str(name)!r}: neither a folder, nor in the cache "
            f"{hub.constants.HF_HUB_CACHE}, nor on the hub ({_first_line(error)}). Check the name; "
            "HF_HOME is the folder of the cache, HF_HUB_OFFLINE=1 disables downloads; all encoders "
            'require pip install "everlong[text]"'
        ) from error
    return Path(found)


def check_weights(folder: Path, name: str | Path) -> None:
    """Raises ``ValueError`` unless a folder has weights as safetensors."""
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    received = f"only {pickles[0]}, which can run code" if pickles else "no weights"
    raise ValueError(
        f"{name}: expected weights as *.safetensors in {folder}, received {received}; choose "
        "another revision, or convert the model with transformers on a machine that may run it"
    )


def check_tokenizer(folder: Path, name: str | Path) -> None:
    """Raises ``ValueError`` unless a folder has the files of a tokenizer."""
    if not any((folder / file).exists() for file in TOKENIZERS):
        raise ValueError(
            f"{name}: expected a tokenizer in {folder}, one of {', '.join(TOKENIZERS)}, received "
            "none; save it there with tokenizer.save_pretrained"
        )


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        ValueError: if it does not exist or is invalid.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path.parent} has no {path.name} that can be read: {error}; expected the folder of "
            "a model, as save_pretrained writes it"
        ) from error


def load_error(name: str | Path, error: Exception) -> ValueError:
    """The error to raise after ``transformers`` failed to load a folder."""
    asks_for_code = "trust_remote_code" in str(error)
    reason = (
        "it requires code of its own, which is never executed; choose a model of an architecture "
        "that transformers includes"
        if asks_for_code
        else _first_line(error)
    )
    return ValueError(f"{name} cannot be loaded: {reason}")


def weights_digest(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Sha256 (hex) of tensors with their names, types and shapes, and of JSON settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name in sorted(weights):
        value = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{list(value.shape)}:".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def files_digest(folder: Path, settings: Mapping[str, Any]) -> str:
    """Sha256 (hex) of the weights, settings and vocabularies in a folder, and of JSON settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    suffixes = tuple(pattern.removeprefix("*") for pattern in SAFE_FILES)
    files = (path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())
    for path in sorted(files):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()}:{content};".encode())
    return digest.hexdigest()


@contextmanager
def silence() -> Iterator[None]:
    """Suppresses progress bars and log lines of ``transformers`` and the hub."""
    logs, bars = import_extra("transformers").logging, import_extra("huggingface_hub.utils")
    verbosity, had_bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    hub_bars = not bars.are_progress_bars_disabled()
    if hub_bars:
        bars.disable_progress_bars()
    try:
        yield
    finally:
        logs.set_verbosity(verbosity)
        if had_bars:
            logs.enable_progress_bar()
        if hub_bars:
            bars.enable_progress_bars()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"
