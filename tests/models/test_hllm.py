"""HLLM and PerSRec over it: against transformers, and the cached form against one masked pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

import everlong
from everlong.models import state as states
from everlong.models.batch import Batch
from everlong.models.decoder import Decoder, DecoderConfig
from everlong.models.hllm import HLLM, HLLMConfig
from everlong.models.persrec_hllm import (
    PerSRecHLLM,
    PerSRecHLLMConfig,
    PublishedPerSRecHLLM,
    PublishedPerSRecHLLMConfig,
)
from everlong.text.pretrained import decoder_architecture, load_decoder

transformers = pytest.importorskip("transformers")

ITEMS, WIDTH = 12, 16
SIZES = {"dim": WIDTH, "heads": 4, "kv_heads": 2, "layers": 3, "dropout": 0.0}


@pytest.fixture
def language_model(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with random weights of a family, as a real model has it."""
    family = getattr(request, "param", "Llama")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=20,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        # from larger weights, so that attention is not even, and biases and norms count
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "model", safe_serialization=True)
    return tmp_path / "model"


def decoder_of(folder: Path) -> Decoder:
    decoder = Decoder(DecoderConfig(num_items=ITEMS, dropout=0.0, **decoder_architecture(folder)))
    load_decoder(decoder, folder)
    return decoder


def reference(folder: Path) -> Any:
    return transformers.AutoModel.from_pretrained(
        str(folder), dtype=torch.float64, attn_implementation="eager"
    ).eval()


def outputs_of(model: Any, inputs: Tensor, visible: Tensor, places: Tensor) -> Tensor:
    """What transformers makes of inputs ``[N, D]`` that see ``visible [N, N]``."""
    mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    with torch.no_grad():
        found = model(
            inputs_embeds=inputs[None], attention_mask=mask[None, None], position_ids=places[None]
        )
    return found.last_hidden_state[0]


def unit(values: Tensor) -> Tensor:
    return functional.normalize(values, dim=-1)


@pytest.mark.parametrize("language_model", ["Llama", "Mistral", "Qwen2"], indirect=True)
def test_computes_what_transformers_computes(language_model: Path) -> None:
    shape = {"num_items": ITEMS, "dropout": 0.0, **decoder_architecture(language_model)}
    model = HLLM(HLLMConfig(**shape, window=40)).eval()
    load_decoder(model.backbone, language_model)
    model = model.double()
    with torch.no_grad():
        model.backbone.items.ids.weight.normal_()
    histories = [torch.randint(ITEMS, (n,)).tolist() for n in (9, 1, 17)]
    outputs, _ = model.encode(Batch.from_histories(histories))
    theirs = reference(language_model)
    found = []
    for history in histories:
        inputs = model.backbone.items(torch.tensor(history)).detach()
        causal = torch.ones(len(history), len(history), dtype=torch.bool).tril()
        found.append(outputs_of(theirs, inputs, causal, torch.arange(len(history))))
    # rotary frequencies are float32 there
    torch.testing.assert_close(unit(outputs), unit(torch.cat(found)), rtol=1e-6, atol=1e-7)


def paper(language_model: Path, placement: tuple[tuple[int, int], ...]) -> PublishedPerSRecHLLM:
    shape = {"num_items": ITEMS, "dropout": 0.0, **decoder_architecture(language_model)}
    config = PublishedPerSRecHLLMConfig(**shape, placement=placement, recent=4)
    model = PublishedPerSRecHLLM(config).eval()
    load_decoder(model.reader.backbone, language_model)  # type: ignore[arg-type]
    model = model.double()
    with torch.no_grad():
        model.reader.backbone.items.ids.weight.normal_()
        model.reader.tokens.normal_()
    return model


def test_the_cached_form_is_one_masked_pass(language_model: Path) -> None:
    model = paper(language_model, ((6, 2),))
    history = torch.randint(ITEMS, (10,))
    _, state = model.encode(Batch.from_histories([history.tolist()]))
    events, tokens = model.reader.backbone.items(history), model.reader.tokens
    # a a a a a a t t r r r r
    inputs = torch.cat([events[:6], tokens, events[6:]]).detach()
    visible = torch.ones(12, 12, dtype=torch.bool).tril()
    visible[8:, :6] = False
    found = outputs_of(reference(language_model), inputs, visible, torch.arange(12))[-1:]
    # from what is stored and read again
    stored = states.from_bytes(states.to_bytes(state), like=model.initial_state(1))
    torch.testing.assert_close(
        unit(model.user_embedding(stored)), unit(found), rtol=1e-6, atol=1e-7
    )


def test_tokens_of_several_segments_stand_side_by_side(language_model: Path) -> None:
    model = paper(language_model, ((3, 1), (6, 2)))
    history = torch.randint(ITEMS, (10,))
    _, state = model.encode(Batch.from_histories([history.tolist()]))
    events, tokens = model.reader.backbone.items(history), model.reader.tokens
    # a a a t b b b t t r r r r
    inputs = torch.cat([events[:3], tokens[:1], events[3:6], tokens[1:], events[6:]]).detach()
    is_token = torch.tensor([0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    segment = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2])
    visible = is_token[None] | (segment[:, None] == segment[None])
    visible &= torch.ones_like(visible).tril()
    found = masked_by_segments(reference(language_model), inputs, visible, segment)[-1:]
    torch.testing.assert_close(unit(model.user_embedding(state)), unit(found), rtol=1e-6, atol=1e-7)


def masked_by_segments(model: Any, inputs: Tensor, visible: Tensor, segment: Tensor) -> Tensor:
    """Layer by layer with transformers' own layers; each segment counts what it sees."""
    hidden = inputs[None]
    for layer in model.layers:
        outputs = torch.zeros_like(hidden)
        for number in segment.unique().tolist():
            mine = (segment == number).nonzero().flatten()
            seen = visible[mine[-1]].nonzero().flatten()
            places = torch.arange(seen.numel())[None]
            mask = visible[seen][:, seen]
            additive = torch.zeros(mask.shape, dtype=torch.float64)
            additive = additive.masked_fill(~mask, torch.finfo(torch.float64).min)[None, None]
            with torch.no_grad():
                found = layer(
                    hidden[:, seen],
                    attention_mask=additive,
                    position_ids=places,
                    position_embeddings=model.rotary_emb(hidden, places),
                )
            found = found[0] if isinstance(found, tuple) else found
            outputs[:, mine] = found[:, -mine.numel() :]
        hidden = outputs
    return model.norm(hidden)[0].detach()


def test_a_summary_is_all_that_is_left_of_a_segment() -> None:
    torch.manual_seed(0)
    model = PerSRecHLLM(
        PerSRecHLLMConfig(num_items=ITEMS, **SIZES, segment=5, keep=0, tokens=2, groups=2)  # type: ignore[arg-type]
    )
    model = model.double().eval()
    with torch.no_grad():
        model.reader.backbone.items.ids.weight.normal_()
        model.reader.tokens.normal_()
    history = torch.randint(ITEMS, (13,)).tolist()
    _, whole = model.encode(Batch.from_histories([history]))
    state = model.initial_state(1)
    for item in history:
        state = model.step(Batch.from_histories([[item]]), state)
    torch.testing.assert_close(
        model.user_embedding(state), model.user_embedding(whole), rtol=1e-9, atol=1e-9
    )
    assert state.keys.shape == (1, 2, 2, 3, 8)
    other = [(item + 1) % ITEMS for item in history[:5]] + history[5:]
    _, changed = model.encode(Batch.from_histories([other]))
    assert not torch.allclose(
        model.user_embedding(changed), model.user_embedding(whole), rtol=1e-3, atol=1e-3
    )
    # with one more fold the first segment has left the state, but for what later ones saw of it
    tail = Batch.from_histories([torch.randint(ITEMS, (5,)).tolist()])
    _, state = model.encode(tail, whole)
    assert int(state.groups) == 2


@pytest.mark.parametrize(
    "settings",
    [{"heads": 3}, {"heads": 16}, {"kv_heads": 3}, {"head_dim": 3}, {"inner": 0}, {"ids": False}],
)
def test_what_cannot_be_built(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        HLLMConfig(num_items=ITEMS, **{**SIZES, **settings})


def test_fit_begins_with_a_language_model(language_model: Path) -> None:
    rows = [(u, (u + n) % ITEMS, 10**9 + n) for u in range(12) for n in range(6)]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    how = {"protocol": "paper", "training": {"epochs": 1, "lr": 1e-9, "weight_decay": 0.0}}
    recommender = everlong.fit(log, "hllm", pretrained=language_model, **how)  # type: ignore[arg-type]
    expected = decoder_of(language_model)
    inside = recommender.model.backbone  # type: ignore[attr-defined]
    torch.testing.assert_close(
        inside.layers[1].query.weight, expected.layers[1].query.weight, rtol=0, atol=1e-6
    )
    with pytest.raises(ValueError, match="over a decoder"):
        everlong.fit(log, "lru", pretrained=language_model)


def test_a_model_without_all_weights_is_refused(language_model: Path) -> None:
    file = language_model / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is incomplete.*up_proj"):
        decoder_of(language_model)


def test_another_language_model_does_not_go_on_with_a_run(
    language_model: Path, tmp_path: Path
) -> None:
    rows = [(u, (u + n) % ITEMS, 10**9 + n) for u in range(12) for n in range(6)]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")

    def run() -> None:
        everlong.fit(
            log,
            "hllm",
            pretrained=language_model,
            training={"epochs": 1},
            protocol="paper",
            folder=tmp_path / "run",
            resume=True,
        )

    run()
    run()
    file = language_model / "model.safetensors"
    save_file({k: v + 0.01 for k, v in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="another run"):
        run()


def test_weights_that_do_not_fit(language_model: Path) -> None:
    shape = decoder_architecture(language_model)
    with pytest.raises(ValueError, match="does not fit"):
        load_decoder(Decoder(DecoderConfig(num_items=3, **{**shape, "inner": 8})), language_model)
    with pytest.raises(ValueError, match="does not fit"):
        load_decoder(Decoder(DecoderConfig(num_items=3, **{**shape, "layers": 2})), language_model)
    with pytest.raises(ValueError, match="no model"):
        decoder_architecture(language_model / "nowhere")
    other = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=5)
    other.save_pretrained(language_model / "other")
    with pytest.raises(ValueError, match="families llama, mistral, qwen2"):
        decoder_architecture(language_model / "other")
