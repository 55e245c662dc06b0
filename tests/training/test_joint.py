"""A model and the encoder of its items, trained together."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch

pytest.importorskip("transformers")

from tests.text.test_encoders import FAMILIES, tokenizer

from everlong.data.dataset import Dataset
from everlong.data.events import read_events
from everlong.data.split import PAPER, Split, split
from everlong.models.batch import Batch
from everlong.models.item_vectors import item_vectors
from everlong.models.lru import LRU, LRUConfig
from everlong.models.user_model import UserModel
from everlong.text.causal import CausalEncoder
from everlong.training.joint import train_jointly
from everlong.training.next_item_losses import full_softmax
from everlong.training.settings import TrainConfig

TEXTS = ["a dog", "a town", "", "the sea", "two detectives", "lost", "a comedy", "people"]
CONFIG = TrainConfig(
    epochs=2, batch_events=64, loss="infonce", negatives=8, encoder_lr=1e-2, precision="float32"
)


def folder_of(path: Path) -> Path:
    """A language model of random weights, as a real one is stored."""
    torch.manual_seed(0)
    FAMILIES["llama"]().save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def parts() -> Split:
    rows = [(u, (u + n) % len(TEXTS), 10**9 + n) for u in range(20) for n in range(8)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    return split(read_events(frame, time_unit="s"), PAPER)


def a_model(width: int) -> LRU:
    torch.manual_seed(0)
    config = LRUConfig(num_items=len(TEXTS), dim=8, channels=4, vectors=width, ids=False)
    return LRU(config)


@pytest.fixture
def encoder(tmp_path: Path) -> CausalEncoder:
    return CausalEncoder(folder_of(tmp_path), prompt="")


def run(encoder: CausalEncoder, model: LRU, folder: Path | None = None, **how: object) -> None:
    found = parts()
    dataset = Dataset(found.events, found.train)
    train_jointly(model, encoder, TEXTS, dataset, CONFIG, folder=folder, **how)  # type: ignore[arg-type]


def test_the_vectors_are_those_of_the_trained_encoder(encoder: CausalEncoder) -> None:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    model = a_model(encoder.width)
    run(encoder, model)
    changed = [k for k, v in encoder.state_dict().items() if not torch.equal(v, before[k])]
    assert "item" in changed
    assert any("q_proj" in name for name in changed)
    items = item_vectors(model)
    assert items is not None
    vectors = torch.from_numpy(encoder.encode(TEXTS).vectors)
    vectors[2] = 0.0
    torch.testing.assert_close(items.vectors, items.prepared(vectors), rtol=1e-4, atol=1e-5)
    # the encoder is not left in the model
    assert not any("encoder" in name for name in model.state_dict())


def test_adapters_alone_are_trained(encoder: CausalEncoder) -> None:
    encoder.add_adapters(rank=2)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    run(encoder, a_model(encoder.width))
    changed = {k for k, v in encoder.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all("lora_" in name or name == "item" for name in changed)


def test_gradients_are_those_of_the_whole_chain(tmp_path: Path) -> None:
    encoder = CausalEncoder(folder_of(tmp_path), prompt="", dtype="float64")
    model = a_model(encoder.width).double()
    items = item_vectors(model)
    assert items is not None
    items.fill(torch.from_numpy(encoder.encode(TEXTS).vectors))
    encoder.eval()
    model.eval()
    batch, rows = Batch.from_histories([[0, 1, 3, 4]]), torch.tensor([0, 1, 3, 4, 6])

    def loss() -> torch.Tensor:
        with items.live(rows, encoder(encoder.tokenize([TEXTS[n] for n in rows.tolist()]))):
            return full_softmax(model(batch), model.item_embeddings(), batch.items)

    loss().backward()
    assert encoder.item.grad is not None
    # norms are float32 inside the language model, whatever its type
    step, values = 1e-4, []
    for sign in (1, -1):
        with torch.no_grad():
            encoder.item[3] += sign * step
            values.append(float(loss()))
            encoder.item[3] -= sign * step
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(float(encoder.item.grad[3]), rel=2e-3)


class Interruption:
    """A validation that works once."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, trained: UserModel) -> dict[str, float]:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("the machine goes away")
        return {"NDCG@10": 0.5}


def test_an_interrupted_run_goes_on_to_the_same_end(tmp_path: Path) -> None:
    ends = []
    for name in ("whole", "cut"):
        encoder = CausalEncoder(folder_of(tmp_path / name), prompt="")
        model, folder = a_model(encoder.width), tmp_path / f"{name}.run"

        if name == "cut":
            with pytest.raises(RuntimeError, match="goes away"):
                run(encoder, model, folder, validate=Interruption())
            encoder = CausalEncoder(folder_of(tmp_path / "again"), prompt="")
            model = a_model(encoder.width)
        scores = iter([0.5, 0.6] if name == "whole" else [0.6])
        run(encoder, model, folder, resume=True, validate=lambda m, s=scores: {"NDCG@10": next(s)})
        ends.append({**model.state_dict(), **encoder.state_dict()})
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=0, atol=0, msg=name)


def test_what_does_not_fit_is_refused(encoder: CausalEncoder) -> None:
    found = parts()
    dataset = Dataset(found.events, found.train)
    with pytest.raises(ValueError, match="by their ids"):
        train_jointly(LRU(LRUConfig(num_items=8, dim=8)), encoder, TEXTS, dataset, CONFIG)
    with pytest.raises(ValueError, match="received 8 and 32"):
        train_jointly(a_model(5), encoder, TEXTS, dataset, CONFIG)
    with pytest.raises(ValueError, match="sampled or infonce"):
        train_jointly(a_model(32), encoder, TEXTS, dataset, TrainConfig())
    with pytest.raises(ValueError, match="none that is not empty"):
        train_jointly(a_model(32), encoder, [" "] * 8, dataset, CONFIG)
