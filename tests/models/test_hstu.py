from __future__ import annotations

import math

import pytest
import torch
from tests.forms import slow
from torch import Tensor
from torch.nn import functional

from everlong.models import state as states
from everlong.models.batch import Batch
from everlong.models.hstu import HSTU, HSTUConfig
from everlong.models.ring import numbers
from everlong.ops.pointwise_attention import elapsed_bucket
from everlong.testing import check_model

ITEMS = 9


def made(*, seed: int = 0, noise: float = 0.2, **settings: object) -> HSTU:
    """A small model in float64 whose biases are large enough to matter."""
    torch.manual_seed(seed)
    sizes = {"dim": 8, "heads": 2, "layers": 2, "window": 6, "dropout": 0.0}
    model = HSTU(HSTUConfig(num_items=ITEMS, **{**sizes, **settings}))  # type: ignore[arg-type]
    for parameter in model.parameters():
        if parameter.dim():
            parameter.data += noise * torch.randn_like(parameter)
    return model.double().eval()


def by_hand(model: HSTU, items: list[int], times: list[int], at: int) -> Tensor:
    """The user vector after events, as of ``at``, from the equations, one number at a time."""
    config, backbone = model.config, model.backbone
    size = config.dim // config.heads
    values = []
    for number, item in enumerate(items):
        value = backbone.items.ids.weight[item] * math.sqrt(config.dim)
        if backbone.positions is not None:
            value = value + backbone.positions[min(number, config.window - 1)]
        values.append(value)
    for nth, layer in enumerate(backbone.layers):
        asks, offers = [], []
        for value in values:
            normed = functional.layer_norm(value, (config.dim,), eps=1e-6)
            asks.append(functional.silu(layer.ask.weight @ normed).chunk(2))
            offers.append(functional.silu(layer.offer.weight @ normed).chunk(2))
        following = []
        for n, value in enumerate(values):
            gate, query = asks[n]
            when = at if nth == config.layers - 1 and n == len(values) - 1 else times[n]
            visible = range(max(0, n + 1 - config.window), n + 1)
            mixed = torch.zeros(config.dim, dtype=torch.float64)
            for m in visible:
                key, offered = offers[m]
                bias = 0.0
                if config.relative_bias:
                    bucket = elapsed_bucket(torch.tensor(when - times[m]))
                    bias = layer.distance_bias[n - m] + layer.elapsed_bias[bucket]
                for head in range(config.heads):
                    part = slice(head * size, (head + 1) * size)
                    weight = functional.silu(query[part] @ key[part] + bias) / len(visible)
                    mixed[part] += weight * offered[part]
            gated = gate * functional.layer_norm(mixed, (config.dim,), eps=1e-6)
            following.append(value + layer.leave.weight @ gated + layer.leave.bias)
        values = following
    return values[-1] / values[-1].norm() / config.temperature


@pytest.mark.parametrize("relative_bias", [True, False])
def test_user_vectors_follow_the_equations(relative_bias: bool) -> None:
    model = made(relative_bias=relative_bias)
    items, times = [3, 1, 4, 1, 5, 0, 2, 6, 5], [0, 0, 7, 90, 91, 4_000, 4_001, 90_000, 90_001]
    batch = Batch.from_histories([[2], items, []], [[5], times, []])
    outputs, state = model.encode(batch)
    for n in range(len(items)):
        expected = by_hand(model, items[: n + 1], times[: n + 1], times[n])
        torch.testing.assert_close(outputs[1 + n], expected)
    at = torch.tensor([50, 1_000_000, 3])
    later = by_hand(model, items, times, 1_000_000)
    torch.testing.assert_close(model.user_embedding(state, at)[1], later)
    assert torch.allclose(later, outputs[-1]) != relative_bias


@pytest.mark.parametrize("dtype", [torch.float64, slow(torch.float32)])
@pytest.mark.parametrize(
    "settings",
    [{}, {"window": 1}, {"window": 100}, {"layers": 1}, {"relative_bias": False}],
    ids=str,
)
def test_the_laws_hold(settings: dict[str, object], dtype: torch.dtype) -> None:
    report = check_model(made(**settings), num_users=6, long_events=300, dtype=dtype)
    assert set(report.kept) == set(range(1, 8))


def test_a_user_without_events_has_what_a_layer_makes_of_nothing() -> None:
    model = made()
    expected = model.backbone.start + model.backbone.layers[-1].leave.bias
    vector = model.user_embedding(model.initial_state(2))
    torch.testing.assert_close(vector[0], expected / expected.norm() / model.config.temperature)


def test_scores_are_cosines_by_temperature() -> None:
    model = made(temperature=0.1)
    _, state = model.encode(Batch.from_histories([[1, 2, 3]]))
    scores = model.score(state)
    assert scores.abs().max() <= 10.0 + 1e-9
    vector = model.user_embedding(state)[0]
    cosine = functional.cosine_similarity(vector, model.backbone.items.ids.weight, dim=-1)
    torch.testing.assert_close(scores[0], cosine / 0.1)


def test_the_window_ends_what_is_seen() -> None:
    """With one layer, an event outside the window changes nothing; with two, it still does."""
    for layers, same in ((1, True), (2, False)):
        model = made(layers=layers, window=4)
        long, other = [1, 2, 3, 4, 5, 6], [8, 2, 3, 4, 5, 6]
        a = model.score(model.encode(Batch.from_histories([long]))[1])
        b = model.score(model.encode(Batch.from_histories([other]))[1])
        assert torch.allclose(a, b) == same


def test_bias_is_learned() -> None:
    model = made(noise=0.0).train()
    events = Batch.from_histories(
        [[1, 2, 3, 4, 5, 6, 7]], [[0, 10, 20, 3_000, 3_001, 9_000, 9_001]]
    )
    weights = torch.randn(7, ITEMS, dtype=torch.float64)
    (model.score_vectors(model(events)) * weights).sum().backward()
    for layer in model.backbone.layers:
        assert layer.distance_bias.grad.abs().sum() > 0
        assert layer.elapsed_bias.grad.abs().sum() > 0
    # nothing is farther away than the window
    assert layer.distance_bias.grad[-1] != 0


def test_temperature_is_learned_only_if_asked() -> None:
    events, weights = Batch.from_histories([[1, 2, 3]]), torch.randn(3, ITEMS).double()
    for learned in (False, True):
        model = made(learn_temperature=learned)
        (model.score_vectors(model(events)) * weights).sum().backward()
        assert (model.backbone.log_inverse_temperature.grad is not None) == learned


def test_numbers_and_next_times() -> None:
    batch = Batch.from_histories([[1, 2], [], [3, 4, 5]], [[10, 20], [], [1, 2, 3]])
    assert numbers(batch, torch.tensor([0, 4, 7])).tolist() == [0, 1, 7, 8, 9]
    assert batch.next_times.tolist() == [20, 20, 2, 3, 3]


def test_bytes_of_the_state() -> None:
    model = HSTU(HSTUConfig(num_items=5))
    # 8 L W D + 8 W + 4 D + 8, as the module says
    expected = 8 * 2 * 200 * 64 + 8 * 200 + 4 * 64 + 8
    assert states.bytes_per_user(model.initial_state(1)) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window >= 1, received 0"),
        ({"layers": 0}, "layers >= 1, received 0"),
        ({"heads": 3}, "multiple of heads=3"),
        ({"temperature": 0.002}, "temperature >= 0.01, received 0.002"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HSTUConfig(num_items=5, **settings)  # type: ignore[arg-type]
