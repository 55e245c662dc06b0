"""A frozen model of ``sentence-transformers`` as a text encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from everlong.system.progress import Progress
from everlong.text.encoder import Encoded
from everlong.text.source import (
    PICKLES,
    check_weights,
    files_digest,
    import_extra,
    load_error,
    model_folder,
    read_json,
    silence,
)

CHUNK = 1_024
"""Texts that are encoded between two progress reports."""


class SentenceEncoder:
    """A frozen text encoder from any ``sentence-transformers`` model.

    Args:
        name: a folder, or a name on the Hugging Face hub. Only safetensors are read; no code of the
            model is executed.
        normalize: whether to scale vectors to length 1, for models that do not do so.
        batch_size: texts in a batch; affects speed, not vectors.
        device: the device of the model.

    Raises:
        ImportError: without the extra ``text``.
        ValueError: if the model cannot be loaded, or its tokenizer has no pad token.
    """

    def __init__(
        self,
        name: str | Path,
        *,
        normalize: bool = False,
        batch_size: int = 32,
        device: str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"expected batch_size >= 1, received {batch_size}")
        folder = model_folder(name)
        self.name = str(folder if Path(name).expanduser().is_dir() else name)
        self.normalize, self.batch_size = normalize, batch_size
        self._model = _load(folder, name, device)
        tokenizer = self._model.tokenizer
        if getattr(tokenizer, "pad_token_id", 0) is None:
            raise ValueError(
                f"{name}: expected a tokenizer with a pad token, received one without; set "
                "tokenizer.pad_token and save it, or load a causal model with CausalEncoder"
            )
        probe = self._model.encode(["a"], show_progress_bar=False, convert_to_numpy=True)
        self.width = int(probe.shape[1])
        self.digest = files_digest(folder, {"normalize": normalize})

    def encode(self, texts: Sequence[str], *, progress: Progress | None = None) -> Encoded:
        """Encodes ``n`` texts to vectors ``[n, V]`` float32."""
        if progress is None:
            with Progress("encode", len(texts), "texts") as own:
                return self.encode(texts, progress=own)
        vectors = np.zeros((len(texts), self.width), np.float32)
        # sort by length, to reduce padding
        order = np.argsort([-len(text) for text in texts], kind="stable")
        for start in range(0, len(texts), CHUNK):
            rows = order[start : start + CHUNK]
            vectors[rows] = self._model.encode(
                [texts[row] for row in rows],
                batch_size=self.batch_size,
                show_progress_bar=False,
                convert_to_numpy=True,
                normalize_embeddings=self.normalize,
            )
            progress.advance(len(rows))
        return Encoded(vectors=vectors, cut=self._cut(texts))

    def describe(self) -> dict[str, Any]:
        """A description for ``load_encoder``, as JSON values."""
        settings = {"normalize": self.normalize, "batch_size": self.batch_size}
        about = {"kind": "sentence", "name": self.name, "settings": settings}
        return {**about, "width": self.width, "digest": self.digest}

    def _cut(self, texts: Sequence[str]) -> np.ndarray:
        """Whether each text has more tokens than the model reads, ``[n]``."""
        limit = self._model.max_seq_length
        if limit is None or not math.isfinite(limit) or len(texts) == 0:
            return np.zeros(len(texts), np.bool_)
        prompt = self._model.prompts.get(self._model.default_prompt_name, "") or ""
        whole = [prompt + text.strip() for text in texts]
        ids = self._model.tokenizer(whole, truncation=False, padding=False, verbose=False)
        return np.array([len(found) > limit for found in ids["input_ids"]])


def _load(folder: Path, name: str | Path, device: str) -> Any:
    """Loads the model of a folder without executing code from it."""
    for module in read_json(folder / "modules.json"):
        kind, part = str(module.get("type")), folder / str(module.get("path", ""))
        if not kind.startswith("sentence_transformers."):
            raise ValueError(
                f"{name}: expected modules of sentence-transformers, received {kind!r}, code of "
                "the model, which is never executed; choose another model"
            )
        if part.is_dir() and any(path.suffix in PICKLES for path in part.iterdir()):
            check_weights(part, name)
    transformers = import_extra("sentence_transformers")
    try:
        with silence():
            model = transformers.SentenceTransformer(
                str(folder),
                device=device,
                trust_remote_code=False,
                local_files_only=True,
                model_kwargs={"use_safetensors": True, "dtype": "float32"},
            )
    # third-party configurations, files and tokenizers raise exceptions of any class
    except Exception as error:
        raise load_error(name, error) from error
    return model.eval()
