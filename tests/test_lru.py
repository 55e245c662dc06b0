"""LRURec: sizes and initialisation as published, and the published algorithm as an oracle."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from everlong.batch import Batch
from everlong.models.lru import LRU, LRUConfig
from everlong.state import bytes_per_user
from everlong.testing import check_model

PUBLISHED = Path(__file__).parents[1] / "benchmarks" / "published_lru.py"


def published() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published_lru", PUBLISHED)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small(**changes: object) -> LRU:
    torch.manual_seed(0)
    settings = {
        "num_items": 30,
        "dim": 16,
        "channels": 8,
        "dropout": 0.0,
        "recurrence_dropout": 0.0,
    }
    model = LRU(LRUConfig(**{**settings, **changes}))  # type: ignore[arg-type]
    # away from the small values of the start, so that a slip shows
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and "log" not in name:
                parameter.mul_(20)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_keeps_the_seven_laws(dtype: torch.dtype) -> None:
    report = check_model(small(), dtype=dtype)
    assert not report.exempt


def test_published_number_of_parameters() -> None:
    model = LRU(LRUConfig(num_items=3_416))
    outside = {"items.weight", "item_bias", "start"}
    inside = sum(p.numel() for n, p in model.named_parameters() if n not in outside)
    # the published 133,888, less the imaginary output biases of two blocks, which are never used
    assert inside == 133_888 - 2 * 64
    assert bytes_per_user(model.initial_state(1)) == 2_304


def test_published_initialisation() -> None:
    torch.manual_seed(0)
    model = LRU(LRUConfig(num_items=2_000, channels=4_096, layers=1))
    decay, gamma = model.blocks[0].recurrence()
    area = (decay**2).sum(0).detach().numpy()
    assert area.min() >= 0.64 - 1e-5
    assert area.max() <= 0.9801 + 1e-5
    # uniform in r^2: the deciles lie where they should
    wanted = 0.64 + (0.9801 - 0.64) * np.arange(1, 10) / 10
    assert np.abs(np.quantile(area, np.arange(1, 10) / 10) - wanted).max() < 0.015
    assert np.allclose(gamma[:4_096].detach().numpy() ** 2 + area, 1.0, atol=1e-5)
    phase = np.exp(model.blocks[0].recurrence.theta_log.detach().numpy())
    assert phase.min() > 0
    assert phase.max() <= 2 * math.pi + 1e-5
    assert abs(phase.mean() - math.pi) < 0.1
    table = model.items.weight.detach()
    assert float(table.abs().max()) <= 0.04 + 1e-6
    # a normal of deviation 0.02 that is cut at two deviations
    assert float(table.std()) == pytest.approx(0.02 * 0.8796, rel=0.02)


@pytest.mark.parametrize("extra", [0, 3, 40])
def test_equals_the_published_algorithm_whatever_the_padding(extra: int) -> None:
    model = small()
    histories = [[1, 5, 9, 2, 2], [7], [29, 0, 3, 4, 8, 11, 12, 13, 1, 6]]
    length = max(map(len, histories)) + extra
    inputs = torch.zeros(len(histories), length, dtype=torch.int64)
    for row, items in enumerate(histories):
        inputs[row, length - len(items) + 1 :] = torch.tensor(items[:-1]) + 1
    with torch.no_grad():
        vectors, _ = model(Batch.from_histories(histories))
        ours = model.read(vectors).split([len(items) for items in histories])
        theirs = published().PublishedLRU(model).eval()(inputs)
    for row, items in enumerate(histories):
        torch.testing.assert_close(ours[row], theirs[row, -len(items) :], atol=2e-5, rtol=1e-5)


def test_gradients_equal_those_of_the_published_algorithm() -> None:
    model = small()
    twin = published().PublishedLRU(model).eval()
    history = [3, 1, 4, 1, 5, 9, 2, 6]
    labels = torch.tensor([history]) + 1
    inputs = torch.cat([torch.zeros(1, 1, dtype=torch.int64), labels[:, :-1]], dim=1)
    twin.loss(inputs, labels).backward()
    vectors, _ = model(Batch.from_histories([history]))
    torch.nn.functional.cross_entropy(model.read(vectors), labels[0] - 1).backward()
    pairs = [(model.items.weight.grad, twin.embedding.grad[1:])]
    pairs.append((model.start.grad, twin.embedding.grad[0]))
    for block, other in zip(model.blocks, twin.blocks, strict=True):
        names = ("nu_log", "theta_log", "gamma_log")
        ours = torch.stack([getattr(block.recurrence, name).grad for name in names])
        pairs.append((ours, other.params_log.grad))
        pairs.append((block.widen.weight.grad, other.widen.weight.grad))
    for received, expected in pairs:
        torch.testing.assert_close(received, expected, atol=2e-5, rtol=1e-3)


def test_a_loop_in_float64_gives_the_same_outputs() -> None:
    model = small(layers=1).double()
    history = [2, 0, 7, 7, 1]
    outputs, state = model.encode(Batch.from_histories([history]))
    block = model.blocks[0]
    half = block.enter.weight.shape[0] // 2
    nu, theta, gamma = (
        getattr(block.recurrence, name).exp() for name in ("nu_log", "theta_log", "gamma_log")
    )
    decay = torch.exp(torch.complex(-nu, theta))
    into = torch.complex(block.enter.weight[:half], block.enter.weight[half:])
    into_bias = torch.complex(block.enter.bias[:half], block.enter.bias[half:])
    out = torch.complex(block.leave.weight[:, :half], -block.leave.weight[:, half:])
    hidden = torch.zeros(half, dtype=torch.complex128)
    for place, item in enumerate(history):
        x = model.norm(model.items.weight[item])
        hidden = decay * hidden + gamma * (into @ x.to(into.dtype) + into_bias)
        x = block.recurrence_norm((out @ hidden).real + block.leave.bias + x)
        inner = torch.nn.functional.gelu(block.widen(x))
        x = block.ffn_norm(block.narrow(inner) + x)
        torch.testing.assert_close(outputs[place], x, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(state.user[0], outputs[-1])


def test_the_first_event_is_predicted_from_the_start_token_alone() -> None:
    model = small()
    with torch.no_grad():
        start = model.initial_state(1).user[0]
        vectors, _ = model(Batch.from_histories([[1, 2], [3], [4, 5, 6]]))
    for first in (0, 2, 3):
        torch.testing.assert_close(vectors[first], start)


def test_a_fresh_model_knows_nothing() -> None:
    torch.manual_seed(0)
    model = LRU(LRUConfig(num_items=500)).eval()
    batch = Batch.from_histories([list(range(0, 500, 7))])
    loss = torch.nn.functional.cross_entropy(model.read(model(batch)[0]), batch.items)
    assert loss.item() == pytest.approx(math.log(500), abs=0.05)


def test_dropout_of_start_tokens_differs_between_users_in_training() -> None:
    model = small(dropout=0.5).train()
    torch.manual_seed(1)
    users = model.initial_state(8).user
    assert len(torch.unique(users.detach(), dim=0)) == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"min_radius": 0.9, "max_radius": 0.9}, "stable"), ({"max_radius": 1.0}, "stable")],
)
def test_impossible_settings_are_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LRUConfig(num_items=3, **changes)  # type: ignore[arg-type]
