import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from everlong.models import lru as module
from everlong.models.batch import Batch
from everlong.models.lru import LRU, LRUConfig, LRUState
from everlong.models.state import bytes_per_user
from everlong.testing import check_model
from everlong.training.next_item_losses import full_softmax

ITEMS = 23
HISTORIES = [[3, 1, 4, 1, 5, 9, 2, 6], [5], [], [3, 5, 8, 9, 7], [9, 3, 2]]
Floats = NDArray[np.float64]


def small(seed: int = 0, **changes: Any) -> LRU:
    plain: dict[str, Any] = {"num_items": ITEMS, "dim": 6, "channels": 10, "layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LRU(LRUConfig(**{**plain, **changes})).eval()
        # far from the start, so that no part is too small to show a fault
        for name, parameter in model.named_parameters():
            if "recurrence." not in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def test_the_number_of_parameters_is_the_published_one() -> None:
    model = LRU(LRUConfig(num_items=3416))
    total = sum(parameter.numel() for parameter in model.parameters())
    # outside embeddings and item biases the published model has 133,888 numbers, of which the
    # imaginary biases of the output, 64 a block, are never used; its padding row is our start
    embeddings, biases = (3416 + 1) * 64, 3416
    assert total == 133_888 - 2 * 64 + embeddings + biases
    assert bytes_per_user(model.initial_state(1)) == 4 * (2 * 2 * 128 + 64)


def test_the_recurrence_starts_on_the_published_ring() -> None:
    torch.manual_seed(0)
    model = LRU(LRUConfig(num_items=5, channels=4000, layers=1))
    (real, imaginary), gamma = model.blocks[0].recurrence()
    area = (real**2 + imaginary**2).detach().double()
    torch.testing.assert_close(gamma[:4000].double() ** 2 + area, torch.ones_like(area))
    assert torch.equal(gamma[:4000], gamma[4000:])
    phase = torch.atan2(imaginary, real).detach().double() % (2 * math.pi)
    # Kolmogorov and Smirnov: the largest distance from the uniform law, 1.95 / sqrt(n) at 0.1 %
    for values, low, high in ((area, 0.64, 0.9801), (phase, 0.0, 2 * math.pi)):
        assert low - 1e-6 <= float(values.min())
        assert float(values.max()) <= high + 1e-6
        share = (values.sort().values - low) / (high - low)
        distance = (share - torch.arange(1, 4001) / 4000).abs().max()
        assert float(distance) < 1.95 / math.sqrt(4000)


def test_other_radii() -> None:
    config = LRUConfig(num_items=5, min_radius=0.99, max_radius=0.9999)
    (real, imaginary), _ = LRU(config).blocks[0].recurrence()
    radius = torch.hypot(real, imaginary).detach()
    assert float(radius.min()) >= 0.99 - 1e-6
    assert float(radius.max()) <= 0.9999 + 1e-6


def test_the_other_parameters_start_from_a_cut_normal_law() -> None:
    torch.manual_seed(0)
    model = LRU(LRUConfig(num_items=2000))
    for name, parameter in model.named_parameters():
        if "recurrence." in name:
            continue
        if "norm" in name:
            assert (parameter == (0.0 if name.endswith("bias") else 1.0)).all(), name
        else:
            assert float(parameter.abs().max().detach()) <= 0.04, name
            # a normal law of deviation 0.02, cut at two deviations, has deviation 0.0176
            spread = float(parameter.detach().std())
            assert spread == pytest.approx(0.0176, abs=0.004), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"min_radius": 0.9, "max_radius": 0.9}, "min_radius=0.9, max_radius=0.9"),
        ({"max_radius": 1.0}, "max_radius=1.0"),
        ({"min_radius": -0.1}, "min_radius=-0.1"),
    ],
)
def test_an_impossible_ring_is_refused(changes: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        LRUConfig(num_items=3, **changes)  # type: ignore[arg-type]


def norm(values: Floats, layer: torch.nn.LayerNorm) -> Floats:
    """A layer norm in numpy."""
    weight, bias = (x.detach().numpy() for x in (layer.weight, layer.bias))
    centred = values - values.mean()
    scaled: Floats = centred / np.sqrt((centred**2).mean() + layer.eps) * weight + bias
    return scaled


def gelu(values: Floats) -> Floats:
    return np.array([0.5 * x * (1 + math.erf(x / math.sqrt(2))) for x in values])


def naive(model: LRU, tokens: list[Floats]) -> list[Floats]:
    """Outputs after each token of one user, event by event in complex numbers (eq. 5 to 9)."""
    hidden = [np.zeros(model.config.channels, dtype=np.complex128) for _ in model.blocks]
    outputs = []
    for token in tokens:
        x = norm(token, model.norm)
        for layer, block in enumerate(model.blocks):
            p = {name: value.detach().numpy() for name, value in block.named_parameters()}
            nu, theta, gamma = (np.exp(p[f"recurrence.{n}_log"]) for n in ("nu", "theta", "gamma"))
            half = len(nu)
            b = p["enter.weight"][:half] + 1j * p["enter.weight"][half:]
            b_bias = p["enter.bias"][:half] + 1j * p["enter.bias"][half:]
            c = p["leave.weight"][:, :half] - 1j * p["leave.weight"][:, half:]
            hidden[layer] = np.exp(-nu + 1j * theta) * hidden[layer] + gamma * (b @ x + b_bias)
            mixed = (c @ hidden[layer]).real + p["leave.bias"]
            x = norm(mixed + x, block.recurrence_norm)
            wide = gelu(p["widen.weight"] @ x + p["widen.bias"])
            x = norm(p["narrow.weight"] @ wide + p["narrow.bias"] + x, block.ffn_norm)
        outputs.append(x)
    return outputs


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_model_follows_its_equations(dtype: torch.dtype, tolerance: float) -> None:
    exact = small().double()
    model = small().to(dtype)
    batch = Batch.from_histories(HISTORIES)
    vectors, (_, state) = model(batch), model.encode(batch)
    scores = model.score_vectors(vectors).detach().double()
    table, bias = exact.items.table().detach().numpy(), exact.item_bias.detach().numpy()
    (first,) = naive(exact, [exact.start.detach().numpy()])
    expected = []
    for user, history in enumerate(HISTORIES):
        # the start token tells the first event and is no part of what follows
        outputs = [first, *naive(exact, [table[item] for item in history])]
        expected += outputs[: len(history)]
        after = torch.from_numpy(outputs[-1])
        torch.testing.assert_close(state.user[user].double(), after, atol=tolerance, rtol=tolerance)
    wanted = torch.from_numpy(np.array(expected) @ table.T + bias)
    torch.testing.assert_close(scores, wanted, atol=10 * tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def published() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "published_lru.py"
    if not path.is_file():
        pytest.skip("benchmarks are not part of this installation")
    found = importlib.util.spec_from_file_location("published_lru", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def padded(padding: int) -> tuple[Tensor, Tensor]:
    """The histories as the published rows: items from 1, zeros on the left, labels one later."""
    width = max(map(len, HISTORIES)) + 1 + padding
    rows = [history for history in HISTORIES if history]
    items, labels = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for row, history in enumerate(rows):
        shifted = torch.tensor(history) + 1
        labels[row, -len(history) :] = shifted
        items[row, width - len(history) + 1 :] = shifted[:-1]
    return items, labels


@pytest.mark.parametrize("padding", [0, 1, 5, 30])
def test_loss_and_gradients_are_those_of_the_published_form(
    published: ModuleType, padding: int
) -> None:
    ours = small(dropout=0.0, recurrence_dropout=0.0)
    theirs = published.PublishedLRU(ours).eval()
    batch = Batch.from_histories(HISTORIES)
    items, labels = padded(padding)
    vectors = ours(batch)
    logits = theirs(items)[labels > 0]
    torch.testing.assert_close(ours.score_vectors(vectors), logits, atol=1e-4, rtol=1e-4)

    loss = full_softmax(vectors, ours.item_embeddings(), batch.items)
    expected = theirs.loss(items, labels)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()

    def close(mine: Tensor | None, other: Tensor | None) -> None:
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)

    close(ours.start.grad, theirs.embedding.grad[0])
    close(ours.items.ids.weight.grad, theirs.embedding.grad[1:])
    close(ours.item_bias.grad, theirs.bias.grad)
    close(ours.norm.weight.grad, theirs.norm.weight.grad)
    for mine, other in zip(ours.blocks, theirs.blocks, strict=True):
        half = ours.config.channels
        close(mine.enter.weight.grad[:half], other.enter_weight.grad.real)
        close(mine.enter.weight.grad[half:], other.enter_weight.grad.imag)
        close(mine.enter.bias.grad[half:], other.enter_bias.grad.imag)
        close(mine.leave.weight.grad[:, :half], other.leave_weight.grad.real)
        close(mine.leave.weight.grad[:, half:], -other.leave_weight.grad.imag)
        for row, name in enumerate(("nu_log", "theta_log", "gamma_log")):
            close(getattr(mine.recurrence, name).grad, other.params_log.grad[row])
        close(mine.widen.weight.grad, other.widen.weight.grad)
        close(mine.ffn_norm.bias.grad, other.ffn_norm.bias.grad)


def test_the_score_of_a_first_event_does_not_depend_on_the_batch() -> None:
    model = small()
    alone = model(Batch.from_histories([[4]]))[0]
    for histories in ([[7, 7, 7], [4]], [[], [4], []], [[4, 4], [1]]):
        batch = Batch.from_histories(histories)
        vectors = model(batch)
        busy = batch.offsets[:-1][batch.lengths > 0]
        for first in busy.tolist():
            torch.testing.assert_close(vectors[first], alone, atol=1e-6, rtol=1e-6)


def test_in_training_each_user_has_a_start_with_its_own_dropout() -> None:
    model = small(dropout=0.5).train()
    starts = model.initial_state(50).user
    assert len(torch.unique(starts, dim=0)) > 10
    assert len(torch.unique(model.eval().initial_state(50).user, dim=0)) == 1


def test_the_first_loss_is_that_of_a_guess() -> None:
    torch.manual_seed(0)
    model = LRU(LRUConfig(num_items=500))
    batch = Batch.from_histories(torch.randint(500, (20, 30)).tolist())
    loss = full_softmax(model(batch), model.item_embeddings(), batch.items)
    assert float(loss.detach()) == pytest.approx(math.log(500), abs=0.05)


@settings(max_examples=10)
@given(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=30), st.integers(0, 3))
def test_steps_and_encode_agree_for_every_prefix(history: list[int], seed: int) -> None:
    model = small(seed)
    with torch.no_grad():
        outputs, final = model.encode(Batch.from_histories([history]))
        state = model.initial_state(1)
        for place, item in enumerate(history):
            event = Batch.one_event_each(torch.tensor([item]), torch.tensor([place]))
            state = model.step(event, state)
            expected = model.score_vectors(outputs[place : place + 1])
            torch.testing.assert_close(model.score(state), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(state.hidden, final.hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_laws_hold(dtype: torch.dtype) -> None:
    report = check_model(small(), num_users=6, max_events=20, long_events=3000, dtype=dtype)
    assert report.exempt == {}
    assert set(report.kept) == set(range(1, 8))


def test_the_recurrent_state_is_wide_under_narrow_products() -> None:
    model = small()
    batch = Batch.from_histories(HISTORIES)
    wide = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vectors, (_, state) = model(batch), model.encode(batch)
    assert {field.dtype for field in state} == {torch.float32}
    torch.testing.assert_close(vectors.float(), wide, atol=0.1, rtol=0.1)


def test_no_user_and_no_event() -> None:
    model = small()
    no_users = Batch.from_histories([])
    vectors, (_, state) = model(no_users), model.encode(no_users)
    assert vectors.shape == (0, 6)
    assert state.hidden.shape == (0, 2, 20)
    silent = Batch.from_histories([[], []])
    vectors, (_, state) = model(silent), model.encode(silent)
    assert vectors.shape == (0, 6)
    assert torch.equal(state.user, model.initial_state(2).user)
    for training in (True, False):
        assert model.train(training).initial_state(0).user.shape == (0, 6)


@pytest.mark.parametrize(("dim", "channels", "layers"), [(64, 64, 2), (6, 5, 1), (7, 9, 3)])
def test_the_compiled_step_is_the_readable_one(
    dim: int, channels: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = LRU(LRUConfig(num_items=50, dim=dim, channels=channels, layers=layers)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    state = LRUState(torch.randn(9, layers, 2 * channels), torch.randn(9, dim))
    events = Batch.one_event_each(torch.randint(0, 50, (9,)), torch.zeros(9, dtype=torch.int64))
    before = LRUState(*(value.clone() for value in state))

    def agree() -> LRUState:
        with torch.no_grad():
            found = model.step(events, state)
            monkeypatch.setattr(module, "COMPILED_USERS", 0)
            expected = model.step(events, state)
            monkeypatch.undo()
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        return found

    first = agree()
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))
    # a parameter that is written to is seen, and other weights are
    with torch.no_grad():
        model.blocks[0].narrow.bias.add_(torch.randn(dim))
    assert not torch.allclose(agree().user, first.user)
    other = LRU(model.config).eval()
    model.load_state_dict(other.state_dict())
    agree()
