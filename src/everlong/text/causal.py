"""A causal language model as a text encoder, as in HLLM, arXiv 2409.12740.

A learned token follows the text of an item; its hidden state after the final norm is the vector of
the item. Several texts are packed into a row. An attention mask and separate positions isolate
them, so that the vector of an item does not depend on the other texts of its row.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from everlong.system.atomic import new_folder
from everlong.system.formats import check_version
from everlong.system.progress import Progress
from everlong.text.encoder import Encoded
from everlong.text.source import (
    check_tokenizer,
    check_weights,
    import_extra,
    load_error,
    model_folder,
    read_json,
    silence,
    weights_digest,
)

PROMPT = "Compress the following sentence into embedding: "
"""The prompt before each text, as published."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

CALL_TOKENS = 4_096
"""Tokens of a forward pass."""

CHUNK = 1_024
"""Texts that are encoded between two progress reports."""

FORMAT = 1
SETTINGS, LEARNED, MODEL = "encoder.json", "learned.safetensors", "model"

# keys of a configuration that do not affect vectors and differ between a model and its copy
NOT_SETTINGS = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedTexts:
    """The token ids of ``n`` texts, concatenated.

    Attributes:
        ids: ``[M]`` int32; the last of each text is a placeholder for the learned token.
        offsets: ``[n + 1]`` int64.
        cut: ``[n]`` bool, whether the text was truncated.
    """

    ids: Tensor
    offsets: Tensor
    cut: Tensor

    @property
    def num_cut(self) -> int:
        """The number of truncated texts."""
        return int(self.cut.sum())

    def select(self, rows: Tensor) -> TokenizedTexts:
        """The texts at ``rows [m]``, in that order."""
        lengths = self.offsets.diff()[rows]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        where = _spans(self.offsets[rows], lengths)
        return TokenizedTexts(ids=self.ids[where], offsets=offsets, cut=self.cut[rows])


class PackedTexts(NamedTuple):
    """Texts packed into ``R`` rows of ``T`` tokens.

    ``ids``, ``positions`` and ``segments`` are ``[R, T]``; a segment is the number of a text, -1
    for padding. ``texts [m]`` are the packed texts, ``last [m]`` their last tokens as indices into
    ``R * T``.
    """

    ids: Tensor
    positions: Tensor
    segments: Tensor
    texts: Tensor
    last: Tensor


class CausalEncoder(nn.Module):
    """A text encoder from any causal language model.

    Args:
        name: a folder, or a name on the Hugging Face hub. Only safetensors are read; no code of the
            model is executed.
        prompt: the prompt before each text.
        max_tokens: maximum number of tokens of a text, without prompt and learned token.
        dtype: "float32" or "bfloat16", the type of the model; the learned token is float32 with
            either ("float64" is for tests).
        row_tokens: length of a row of packed texts; a longer text has a row of its own length.
            Affects speed, not vectors.
        seed: the seed of the learned token and of adapters.

    Raises:
        ImportError: without the extra ``text``.
        ValueError: if the model cannot be loaded, is not causal, has fewer positions than
            ``max_tokens`` needs, or does not isolate the texts of a row.
    """

    weight_decay: ClassVar[Mapping[str, bool]] = {"item": True}

    def __init__(
        self,
        name: str | Path,
        *,
        prompt: str = PROMPT,
        max_tokens: int = 256,
        dtype: str = "float32",
        row_tokens: int = 128,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if max_tokens < 1 or row_tokens < 1:
            raise ValueError(
                f"expected max_tokens and row_tokens >= 1, received {max_tokens} and {row_tokens}"
            )
        if dtype not in DTYPES:
            raise ValueError(f"expected dtype {', '.join(DTYPES)}, received {dtype!r}")
        folder = model_folder(name)
        self.name = str(folder if Path(name).expanduser().is_dir() else name)
        self.prompt, self.max_tokens, self.row_tokens = prompt, max_tokens, row_tokens
        self.seed = seed
        self._adapters: dict[str, Any] | None = None
        self.trained_from: str | None = None
        """The digest of the encoder before joint training."""
        self.tokenizer, self.model = _load(folder, name, DTYPES[dtype])
        self._begin = self._leading()
        self._prompt_tokens = len(self._token_ids([prompt.rstrip()])[0]) if prompt else 0
        self._check_length()
        embedding = self.model.get_input_embeddings().weight
        random = torch.Generator().manual_seed(seed)
        item = 0.02 * torch.randn(embedding.shape[1], generator=random)
        self.item = nn.Parameter(item.to(torch.promote_types(embedding.dtype, item.dtype)))
        self.width = self._probe()

    # ------------------------------------------------------------------ texts to vectors

    def tokenize(self, texts: Sequence[str]) -> TokenizedTexts:
        """Tokenizes texts, each with the prompt and a placeholder for the learned token."""
        longest = self._prompt_tokens + self.max_tokens
        found = self._token_ids([self.prompt + text for text in texts]) if len(texts) else []
        cut = torch.tensor([len(ids) > longest for ids in found], dtype=torch.bool)
        packed = [[*self._begin, *ids[:longest], 0] for ids in found]
        lengths = torch.tensor([0, *map(len, packed)], dtype=torch.int64)
        flat = np.fromiter((i for ids in packed for i in ids), np.int32, int(lengths.sum()))
        return TokenizedTexts(ids=torch.from_numpy(flat), offsets=lengths.cumsum(0), cut=cut)

    def forward(self, tokens: TokenizedTexts) -> Tensor:
        """Encodes ``n`` texts to vectors ``[n, V]`` in the type of the model, with gradients."""
        found, order = [], []
        for rows in self._rows(tokens):
            embedded = self.model.get_input_embeddings()(rows.ids.to(self.item.device))
            flat = embedded.flatten(0, 1)
            item = self.item.to(flat.dtype).expand(len(rows.last), -1)
            flat = flat.index_copy(0, rows.last.to(flat.device), item)
            found.append(self._read(flat.view_as(embedded), rows))
            order.append(rows.texts)
        if not found:
            return self.item.new_zeros(0, self.width)
        back = torch.cat(order).argsort()
        return torch.cat(found)[back.to(self.item.device)]

    @torch.no_grad()
    def encode(self, texts: Sequence[str], *, progress: Progress | None = None) -> Encoded:
        """Encodes ``n`` texts to vectors ``[n, V]`` float32, without dropout and gradients."""
        if progress is None:
            with Progress("encode", len(texts), "texts") as own:
                return self.encode(texts, progress=own)
        vectors = np.zeros((len(texts), self.width), np.float32)
        cut = np.zeros(len(texts), np.bool_)
        training = self.training
        self.eval()
        try:
            for start in range(0, len(texts), CHUNK):
                tokens = self.tokenize(texts[start : start + CHUNK])
                stop = start + len(tokens.cut)
                vectors[start:stop] = self(tokens).float().cpu().numpy()
                cut[start:stop] = tokens.cut.numpy()
                progress.advance(stop - start)
        finally:
            self.train(training)
        return Encoded(vectors=vectors, cut=cut)

    # ------------------------------------------------------------------ description

    @property
    def dtype(self) -> str:
        """The data type of the model's weights."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def digest(self) -> str:
        """Sha256 (hex) of weights, tokenizer, and all settings that affect vectors."""
        config = self.model.config.to_dict()
        about = {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "config": {key: value for key, value in config.items() if key not in NOT_SETTINGS},
            "tokenizer": _tokenizer_text(self.tokenizer),
            "begin": self._begin,
            "adapters": self._adapters and {k: self._adapters[k] for k in ("rank", "alpha")},
        }
        return weights_digest(self.state_dict(), about)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor, without the name."""
        return {
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "dtype": self.dtype,
            "row_tokens": self.row_tokens,
            "seed": self.seed,
        }

    def describe(self) -> dict[str, Any]:
        """A description for ``load_encoder``, as JSON values; save a trained encoder first."""
        about = {"kind": "causal", "name": self.name, "settings": self.settings}
        return {**about, "width": self.width, "digest": self.digest}

    # ------------------------------------------------------------------ adapters and storage

    def add_adapters(
        self,
        *,
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        targets: Sequence[str] | None = None,
    ) -> None:
        """Adds low-rank adapters; from then on, training changes only them and the learned token.

        Untrained adapters do not change vectors.

        Args:
            rank, alpha: an adapter adds ``alpha / rank`` times a product of that rank.
            dropout: dropout on the inputs of adapters.
            targets: names of linear layers, such as "q_proj"; by default those of peft for the
                family of the model.

        Raises:
            ImportError: without the extra ``text``.
            ValueError: if the encoder has adapters, or the layers do not exist.
        """
        if self._adapters is not None:
            raise ValueError("the encoder has adapters already: expected one call of add_adapters")
        peft = import_extra("peft")
        layers = sorted(
            {
                name.rpartition(".")[2]
                for name, module in self.model.named_modules()
                if isinstance(module, nn.Linear)
            }
        )
        try:
            # adapters have random initial weights; restore the global random state afterwards
            place = [self.item.device] if self.item.is_cuda else []
            with torch.random.fork_rng(devices=place), warnings.catch_warnings():
                # a warning about transposed layers, such as GPT-2's, which peft handles
                warnings.filterwarnings("ignore", message="fan_in_fan_out")
                torch.manual_seed(self.seed)
                config = peft.LoraConfig(
                    r=rank,
                    lora_alpha=alpha,
                    lora_dropout=dropout,
                    target_modules=None if targets is None else list(targets),
                )
                peft.inject_adapter_in_model(config, self.model)
        except ValueError as error:
            raise ValueError(
                f"no adapters for targets={targets} at rank {rank}: {error}. The model has the "
                f"layers {', '.join(layers)}"
            ) from error
        self._adapters = {
            "rank": rank,
            "alpha": alpha,
            "dropout": dropout,
            "targets": sorted(config.target_modules),
        }
        for key, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_" in key)

    def save(self, folder: str | Path) -> None:
        """Writes model, tokenizer, learned token and adapters to a folder, atomically.

        An existing folder is replaced. Afterwards ``name`` is the folder.

        Raises:
            OSError: if it cannot be written.
        """
        folder = Path(folder).absolute()
        weights = self.model.state_dict()
        plain = {k.replace(".base_layer.", "."): v for k, v in weights.items() if "lora_" not in k}
        learned = {key: value for key, value in weights.items() if "lora_" in key}
        about = {
            "format": FORMAT,
            "everlong": version("everlong"),
            "settings": self.settings,
            "adapters": self._adapters,
            "digest": self.digest,
        }
        with new_folder(folder) as temporary, silence():
            self.model.save_pretrained(temporary / MODEL, state_dict=plain)
            self.tokenizer.save_pretrained(temporary / MODEL)
            tensors = {"item": self.item, **learned}
            tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_file(tensors, temporary / LEARNED)
            (temporary / SETTINGS).write_text(json.dumps(about, indent=2), encoding="utf-8")
        self.name = str(folder)

    @classmethod
    def load(cls, folder: str | Path) -> CausalEncoder:
        """Loads the encoder that ``save`` wrote, with the same vectors.

        Raises:
            ImportError: without the extra ``text``.
            ValueError: if the folder is not a complete encoder.
        """
        folder = Path(folder).absolute()
        about = read_json(folder / SETTINGS)
        check_version(
            folder,
            "an item encoder",
            about.get("format"),
            FORMAT,
            written_by=about.get("everlong"),
        )
        encoder = cls(folder / MODEL, **about["settings"])
        if about["adapters"] is not None:
            encoder.add_adapters(**about["adapters"])
        try:
            learned = load_file(folder / LEARNED)
            encoder.item.data.copy_(learned.pop("item"))
            expected = {key for key in encoder.model.state_dict() if "lora_" in key}
            if expected != set(learned):
                raise ValueError(f"expected {len(expected)} adapters, received {len(learned)}")
            encoder.model.load_state_dict(learned, strict=False)
        # the exception class of safetensors derives from Exception only
        except Exception as error:
            raise ValueError(
                f"{folder / LEARNED} does not fit the model: {error}; save the encoder again"
            ) from error
        encoder.name = str(folder)
        if encoder.digest != about["digest"]:
            raise ValueError(
                f"{folder} has changed since it was written: expected digest "
                f"{about['digest'][:12]}, received {encoder.digest[:12]}; save the encoder again"
            )
        return encoder

    # ------------------------------------------------------------------ internals

    def _read(self, embedded: Tensor, rows: PackedTexts) -> Tensor:
        """The hidden states ``[m, V]`` of the last tokens of packed texts."""
        device = embedded.device
        segments = rows.segments.to(device)
        length = segments.shape[1]
        own = segments[:, :, None] == segments[:, None, :]
        seen = own & own.new_ones(length, length).tril()
        # finite in every type that a mask may be cast to, and far below every score
        hidden = torch.finfo(torch.bfloat16).min
        mask = torch.zeros(seen.shape, dtype=embedded.dtype, device=device)
        mask.masked_fill_(~seen, hidden)
        outputs = self.model(
            inputs_embeds=embedded,
            attention_mask=mask[:, None],
            position_ids=rows.positions.to(device),
            use_cache=False,
        )
        states: Tensor = outputs.last_hidden_state
        return states.flatten(0, 1)[rows.last.to(device)]

    def _rows(self, tokens: TokenizedTexts) -> Iterator[PackedTexts]:
        """Packs texts into rows, the longest first, and rows into forward passes."""
        lengths = tokens.offsets.diff()
        if lengths.numel() == 0:
            return
        order = lengths.argsort(descending=True, stable=True)
        budget = max(self.row_tokens, int(lengths.max()))
        row, start = _assign_rows(lengths[order].tolist(), budget)
        rows_a_call = max(1, CALL_TOKENS // budget)
        call = row // rows_a_call
        sizes = call.bincount().tolist()
        parts = (torch.split(part, sizes) for part in (order, row, start))
        for texts, where, first in zip(*parts, strict=True):
            yield _pack(tokens, texts, where - where[0], first)

    @torch.no_grad()
    def _probe(self) -> int:
        """Checks that packed texts have the same vectors as single ones; returns the width."""
        random = torch.Generator().manual_seed(0)
        lengths = torch.tensor([3, 5])
        size = self.item.numel()
        scale = self.model.get_input_embeddings().weight.float().std()
        inputs = scale * torch.randn(8, size, generator=random)
        inputs = inputs.to(self.model.dtype)
        offsets = torch.tensor([0, 3, 8])
        tokens = TokenizedTexts(
            ids=torch.zeros(8, dtype=torch.int32), offsets=offsets, cut=torch.zeros(2).bool()
        )
        rows = _pack(tokens, torch.arange(2), torch.zeros(2, dtype=torch.int64), offsets[:2])
        self.model.eval()
        try:
            together = self._read(inputs[None], rows).float()
            alone = torch.stack(
                [
                    self.model(inputs_embeds=part[None], use_cache=False).last_hidden_state[0, -1]
                    for part in inputs.split(lengths.tolist())
                ]
            ).float()
        # third-party architectures raise exceptions of any class for masks or positions
        except Exception as error:
            raise ValueError(
                f"{self.name}: expected layers that accept a mask and positions, received "
                f"{type(self.model).__name__} ({error}); choose a causal model with plain attention"
            ) from error
        finally:
            self.model.train(self.training)
        off = (together - alone).norm() / alone.norm().clamp(min=1e-12)
        if not off < (0.05 if self.model.dtype == torch.bfloat16 else 1e-3):
            raise ValueError(
                f"{self.name}: expected a causal model in which a mask isolates texts, received "
                f"{type(self.model).__name__}, whose vectors of packed texts differ by {off:.1g}; "
                "choose a causal model with plain attention, or SentenceEncoder"
            )
        return alone.shape[1]

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        return found

    def _leading(self) -> list[int]:
        """The special tokens before a text."""
        plain = self._token_ids(["a"])[0]
        whole: list[int] = self.tokenizer("a")["input_ids"]
        place = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        return whole[:place]

    def _check_length(self) -> None:
        config = self.model.config
        used = len(self._begin) + self._prompt_tokens + 1
        for limit in ("max_position_embeddings", "sliding_window"):
            room = getattr(config, limit, None)
            if limit == "sliding_window" and not getattr(config, "use_sliding_window", True):
                continue
            if room is not None and used + self.max_tokens > room:
                raise ValueError(
                    f"{self.name}: {limit} is {room} tokens; prompt and special tokens take "
                    f"{used}: expected max_tokens <= {room - used}, received {self.max_tokens}"
                )


def is_saved(folder: Path) -> bool:
    """Whether ``CausalEncoder.save`` wrote a folder."""
    return (folder / SETTINGS).is_file()


def _load(folder: Path, name: str | Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """Loads tokenizer and model of a folder without executing code from it."""
    if is_saved(folder):
        raise ValueError(
            f"{name}: expected a model, received a saved encoder; use CausalEncoder.load"
        )
    if not isinstance(read_json(folder / "config.json"), dict):
        raise ValueError(f"{folder / 'config.json'}: expected settings of a model by name")
    check_tokenizer(folder, name)
    check_weights(folder, name)
    transformers = import_extra("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise load_error(name, error) from error
    _check_causal(config, name)
    try:
        with silence():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            model, info = transformers.AutoModel.from_pretrained(
                folder,
                config=config,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=dtype,
                output_loading_info=True,
            )
    # third-party configurations, files and tokenizers raise exceptions of any class
    except Exception as error:
        raise load_error(name, error) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{name}: expected all weights of the model, received files without {len(missing)}, "
            f"for example {missing[0]}; download it again"
        )
    return tokenizer, model


def _check_causal(config: Any, name: str | Path) -> None:
    """Raises ``ValueError`` if a configuration is not that of a decoder."""
    auto = import_extra("transformers.models.auto.modeling_auto")
    causal, masked = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )
    kind = config.model_type
    encodes = config.is_encoder_decoder or (
        kind in masked and not getattr(config, "is_decoder", False)
    )
    if encodes or kind not in causal:
        raise ValueError(
            f"{name}: expected a causal language model (a decoder), received {kind!r}; load "
            "sentence encoders with SentenceEncoder"
        )


def _tokenizer_text(tokenizer: Any) -> str:
    """A serialisation of a tokenizer, for the digest."""
    if getattr(tokenizer, "is_fast", False):
        return str(tokenizer.backend_tokenizer.to_str())
    return json.dumps([type(tokenizer).__name__, tokenizer.get_vocab()], sort_keys=True)


def _assign_rows(lengths: list[int], budget: int) -> tuple[Tensor, Tensor]:
    """The row and the start of each text, for a greedy fill of rows in order."""
    row, used = 0, 0
    rows, starts = [], []
    for length in lengths:
        if used + length > budget:
            row, used = row + 1, 0
        rows.append(row)
        starts.append(used)
        used += length
    return torch.tensor(rows), torch.tensor(starts)


def _pack(tokens: TokenizedTexts, texts: Tensor, row: Tensor, start: Tensor) -> PackedTexts:
    """Packs texts ``[m]`` into ``row [m]`` from ``start [m]`` on."""
    lengths = tokens.offsets.diff()[texts]
    shape = (int(row.max()) + 1, int((start + lengths).max()))
    place = row * shape[1] + start
    where = _spans(place, lengths)
    ids = torch.zeros(shape, dtype=torch.int64)
    positions, segments = ids.clone(), ids - 1
    ids.view(-1)[where] = tokens.ids[_spans(tokens.offsets[texts], lengths)].long()
    positions.view(-1)[where] = _spans(torch.zeros_like(lengths), lengths)
    segments.view(-1)[where] = torch.arange(len(texts)).repeat_interleave(lengths)
    return PackedTexts(ids, positions, segments, texts, place + lengths - 1)


def _spans(starts: Tensor, lengths: Tensor) -> Tensor:
    """Concatenates the ranges ``starts[i] .. starts[i] + lengths[i]``."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - before).repeat_interleave(lengths)
