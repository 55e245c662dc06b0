"""Loading of weights of a pretrained language model into the decoder of a user model.

The decoder of ``everlong.models.decoder`` has the layers of the families Llama, Mistral and Qwen2.
It ignores a sliding window of the pretrained model, because the user model has its own window.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from everlong.models.decoder import Decoder

FAMILIES = ("llama", "mistral", "qwen2")

PARTS: Mapping[str, str] = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attn.q_proj.weight": "query.weight",
    "self_attn.q_proj.bias": "query.bias",
    "self_attn.k_proj.weight": "key.weight",
    "self_attn.k_proj.bias": "key.bias",
    "self_attn.v_proj.weight": "value.weight",
    "self_attn.v_proj.bias": "value.bias",
    "self_attn.o_proj.weight": "leave.weight",
    "post_attention_layernorm.weight": "inner_norm.weight",
    "mlp.gate_proj.weight": "gate.weight",
    "mlp.up_proj.weight": "widen.weight",
    "mlp.down_proj.weight": "narrow.weight",
}
"""Parameter names of a layer: in ``transformers``, and in the decoder."""


def decoder_architecture(name: str | Path) -> dict[str, Any]:
    """The settings of a decoder with the shape of a pretrained model.

    Args:
        name: a folder, or the name of a model on the Hugging Face hub.

    Raises:
        ImportError: without the extra ``text``.
        ValueError: if the model does not exist, or belongs to another family.
    """
    config = _transformers().AutoConfig.from_pretrained
    try:
        found = config(str(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise _missing_model(name, error) from error
    if found.model_type not in FAMILIES:
        raise ValueError(
            f"{name}: expected a model of the families {', '.join(FAMILIES)}, received "
            f"{found.model_type!r}"
        )
    if found.hidden_act != "silu" or getattr(found, "mlp_bias", False):
        raise ValueError(
            f"{name}: expected a feed-forward network gated by silu and without biases, received "
            f"{found.hidden_act!r}"
        )
    heads = found.num_attention_heads
    return {
        "dim": found.hidden_size,
        "layers": found.num_hidden_layers,
        "heads": heads,
        "kv_heads": found.num_key_value_heads,
        "head_dim": getattr(found, "head_dim", None) or found.hidden_size // heads,
        "inner": found.intermediate_size,
        "attention_bias": found.model_type == "qwen2",
        "norm_eps": found.rms_norm_eps,
    }


def decoder_of(model: nn.Module) -> Decoder:
    """Finds the decoder of a model.

    Raises:
        ValueError: if the model has none.
    """
    for part in model.modules():
        if isinstance(part, Decoder):
            return part
    raise ValueError(f"expected a model over a decoder, received {type(model).__name__}")


@torch.no_grad()
def load_decoder(decoder: Decoder, name: str | Path) -> None:
    """Copies the layers, the final norm and the rotary frequencies of a pretrained model.

    Raises:
        ImportError: without the extra ``text``.
        ValueError: if the model does not exist, or does not fit the decoder.
    """
    try:
        model, facts = _transformers().AutoModel.from_pretrained(
            str(name),
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise _missing_model(name, error) from error
    missing = sorted(key for key in facts["missing_keys"] if "embed_tokens" not in key)
    if missing:
        raise ValueError(
            f"{name} is incomplete: expected all weights of its layers, received none for "
            f"{', '.join(missing[:3])}; download the model again"
        )
    weights: dict[str, Tensor] = dict(model.state_dict())
    loaded = {"norm.weight": weights.pop("norm.weight")}
    rest = []
    for key, value in weights.items():
        if key.startswith("layers."):
            _, number, part = key.split(".", 2)
            if part in PARTS:
                loaded[f"layers.{number}.{PARTS[part]}"] = value
            elif not (part.endswith("bias") and not value.any()):
                rest.append(key)
    if rest:
        raise ValueError(
            f"{name}: expected layers of the Llama family, received other weights: "
            f"{', '.join(rest[:3])}"
        )
    rotary = model.rotary_emb
    if getattr(rotary, "attention_scaling", 1.0) != 1.0:
        raise ValueError(
            f"{name}: expected rotary positions without attention scaling, received a scale of "
            f"{rotary.attention_scaling}"
        )
    numbers = {key.split(".")[1] for key in loaded if key.startswith("layers.")}
    loaded |= {f"layers.{number}.frequencies": rotary.inv_freq for number in numbers}
    own = decoder.state_dict()
    unfit = [
        key
        for key, value in own.items()
        if key.startswith(("layers.", "norm."))
        and (key not in loaded or loaded[key].shape != value.shape)
    ]
    unfit += [key for key in loaded if key not in own]
    if unfit:
        shapes = [
            tuple(side[unfit[0]].shape) if unfit[0] in side else "none" for side in (own, loaded)
        ]
        raise ValueError(
            f"{name} does not fit the decoder: of {unfit[0]} expected {shapes[0]}, received "
            f"{shapes[1]}; build the decoder from decoder_architecture"
        )
    digest = hashlib.sha256()
    for key, value in sorted(loaded.items()):
        own[key].copy_(value)
        digest.update(value.contiguous().numpy().tobytes())
    # the digest identifies the pretrained weights in checkpoints
    origin = torch.tensor(list(digest.digest()), dtype=torch.uint8)
    decoder.register_buffer("origin", origin, persistent=False)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            'a pretrained language model requires transformers: pip install "everlong[text]"'
        ) from error
    return transformers


def _missing_model(name: str | Path, error: Exception) -> ValueError:
    return ValueError(
        f"no model {str(name)!r}: {error}. Expected a folder with config.json and safetensors, or "
        "a name on the Hugging Face hub; HF_HOME is the folder of downloaded files, and "
        "HF_HUB_OFFLINE=1 disables downloads"
    )
