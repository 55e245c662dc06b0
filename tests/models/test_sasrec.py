from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from everlong.models import state as states
from everlong.models.batch import Batch
from everlong.models.sasrec import SASRec, SASRecConfig, make_buckets
from everlong.testing import LawBroken, check_model

ITEMS, WINDOW = 9, 6
CONFIG = SASRecConfig(num_items=ITEMS, dim=8, heads=2, layers=2, inner=2, window=WINDOW)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(config: SASRecConfig = CONFIG) -> SASRec:
    torch.manual_seed(0)
    return SASRec(config).double().eval()


def by_hand(model: SASRec, window: list[int]) -> Tensor:
    """The output after the last event of a window, from the equations, one event at a time."""
    config, values = model.config, []
    for position, item in enumerate(window):
        embedded = model.items.table()[item] * math.sqrt(config.dim)
        values.append(embedded + model.positions.weight[position])
    for block in model.blocks:
        entered = [block.enter(block.attention_norm(v)).chunk(3) for v in values]
        following = []
        for n, value in enumerate(values):
            heads = []
            for head in range(config.heads):
                size = config.dim // config.heads
                part = slice(head * size, (head + 1) * size)
                query = entered[n][0][part]
                weights = torch.stack(
                    [query @ entered[m][1][part] / math.sqrt(size) for m in range(n + 1)]
                ).softmax(0)
                heads.append(sum(weights[m] * entered[m][2][part] for m in range(n + 1)))
            value = value + block.leave(torch.cat(heads))
            inner = torch.relu(block.widen(block.ffn_norm(value)))
            following.append(value + block.narrow(inner))
        values = following
    return model.norm(values[-1])


def window_of(event: int) -> int:
    """Where the window begins that ``encode`` reads event number ``event`` in."""
    half = WINDOW // 2
    begins = [k * half for k in range(event + 1) if k * half <= event < k * half + WINDOW]
    # the first that leaves half a window of events before it, or the very first
    return begins[0]


def random_history(length: int, seed: int = 0) -> list[int]:
    return torch.randint(ITEMS, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_outputs_follow_the_equations_and_the_windows() -> None:
    model = made()
    history = random_history(2 * WINDOW + 3)
    outputs, _ = model.encode(Batch.from_histories([[1], history, []]))
    for event in range(len(history)):
        expected = by_hand(model, history[window_of(event) : event + 1])
        torch.testing.assert_close(outputs[1 + event], expected, msg=f"event {event}")
    torch.testing.assert_close(outputs[0], by_hand(model, [1]))


def test_serving_reads_the_last_window() -> None:
    model = made()
    histories = [random_history(n, seed=n) for n in (WINDOW + 5, 0, 3, WINDOW)]
    _, state = model.encode(Batch.from_histories(histories))
    assert state.seen.tolist() == [WINDOW + 5, 0, 3, WINDOW]
    assert state.items[0].tolist() == histories[0][-WINDOW:]
    assert state.items[2].tolist() == [0, 0, 0, *histories[2]]
    vectors = model.user_embedding(state)
    for row in (0, 2, 3):
        torch.testing.assert_close(vectors[row], by_hand(model, histories[row][-WINDOW:]))
    assert torch.equal(vectors[1], model.start)


class WithoutExemptions(SASRec):
    exemptions = {}  # noqa: RUF012


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_up_to_the_window_every_law_holds(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # carried states bring as many events again
    model = WithoutExemptions(SASRecConfig(num_items=ITEMS, dim=8, layers=1, window=32))
    report = check_model(model, num_users=5, max_events=16, long_events=100, dtype=dtype)
    assert set(report.kept) == set(range(1, 8))


def test_beyond_the_window_the_exempt_laws_are_the_only_ones_broken() -> None:
    torch.manual_seed(0)
    model = SASRec(CONFIG)
    report = check_model(model, num_users=5, max_events=4 * WINDOW, long_events=100)
    assert set(report.kept) == {1, 3, 4, 5, 6}
    assert set(report.exempt) == {2, 7}
    with pytest.raises(LawBroken) as caught:
        check_model(WithoutExemptions(CONFIG), num_users=5, max_events=4 * WINDOW, long_events=9)
    assert caught.value.law == 2


def test_step_and_encode_leave_the_same_state() -> None:
    model, history = made(), random_history(2 * WINDOW + 1)
    _, whole = model.encode(Batch.from_histories([history]))
    state = model.initial_state(1)
    for item in history:
        event = Batch.one_event_each(torch.tensor([item]), torch.tensor([0]))
        state = model.step(event, state)
    for a, b in zip(whole, state, strict=True):
        assert torch.equal(a, b)
    assert states.bytes_per_user(state) == 4 * WINDOW + 8


@settings(max_examples=25)
@given(lengths=st.lists(st.integers(1, 200), min_size=1, max_size=40))
def test_buckets_hold_every_event_once_in_order(lengths: list[int]) -> None:
    lengths = sorted(lengths)
    buckets = make_buckets(torch.tensor(lengths))
    tokens = torch.cat([bucket.tokens[bucket.valid] for bucket in buckets])
    assert tokens.tolist() == list(range(sum(lengths)))
    places = sum(bucket.valid.numel() for bucket in buckets)
    assert places <= 1.25 * sum(lengths) + 8 * len(lengths)


def test_dropout_is_active_in_training_alone() -> None:
    config = SASRecConfig(num_items=ITEMS, dim=8, window=6, dropout=0.0, attention_dropout=0.5)
    model, batch = SASRec(config), Batch.from_histories([[1, 2, 3, 4]])
    torch.manual_seed(0)
    assert not torch.equal(model.encode(batch)[0], model.encode(batch)[0])
    model.eval()
    assert torch.equal(model.encode(batch)[0], model.encode(batch)[0])


def test_narrow_products_leave_the_state_alone() -> None:
    model = SASRec(CONFIG)
    batch = Batch.from_histories([random_history(10), [], [3]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = model.encode(batch)
        vectors = model(batch, state)
    assert vectors.shape == (11, 8)
    assert state.items.dtype == torch.int32


def test_it_learns_an_answer_inside_the_window() -> None:
    torch.manual_seed(0)
    # the last event repeats the first: 3 fillers stand between
    cues = torch.arange(6).repeat(4)
    fillers = torch.randint(6, 9, (24, 3))
    histories = torch.cat([cues[:, None], fillers, cues[:, None]], 1)
    batch = Batch.from_histories(histories.tolist())
    config = SASRecConfig(num_items=ITEMS, dim=16, heads=1, layers=1, window=6, dropout=0.0)
    model = SASRec(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    answers = batch.offsets[1:] - 1
    for _ in range(60):
        vectors = model(batch)[answers]
        loss = functional.cross_entropy(model.score_vectors(vectors), cues)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 7}, "even window, received 7; use 8"),
        ({"dim": 10, "heads": 3}, "multiple of heads=3, received dim=10"),
        ({"layers": 0}, "layers >= 1, received 0"),
    ],
)
def test_impossible_sizes_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SASRecConfig(num_items=3, **settings)
