from __future__ import annotations

import pytest
import torch
from tests.forms import slow
from torch import Tensor

from everlong.models import state as states
from everlong.models.batch import Batch
from everlong.models.persrec_paper import PublishedPerSRecHSTU, PublishedPerSRecHSTUConfig
from everlong.testing import check_model

ITEMS = 9
SIZES = {"dim": 8, "heads": 2, "layers": 2, "dropout": 0.0}
ONE, TWO = ((4, 2),), ((3, 1), (6, 2))


def made(*, seed: int = 0, **settings: object) -> PublishedPerSRecHSTU:
    """A small model in float64 whose tokens and biases are large enough to matter."""
    torch.manual_seed(seed)
    shape = {"placement": TWO, "recent": 3}
    config = PublishedPerSRecHSTUConfig(num_items=ITEMS, **{**SIZES, **shape, **settings})  # type: ignore[arg-type]
    model = PublishedPerSRecHSTU(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.double().eval()


def history(length: int, seed: int = 0) -> list[int]:
    return torch.randint(ITEMS, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def scores_of(model: PublishedPerSRecHSTU, items: list[int]) -> Tensor:
    return model.score(model.encode(Batch.from_histories([items]))[1])


@pytest.mark.parametrize("dtype", [torch.float64, slow(torch.float32)])
@pytest.mark.parametrize(
    "settings", [{}, {"placement": ONE}, {"refresh": 3}, {"relative_bias": False}], ids=str
)
def test_the_laws_hold_but_for_those_named(settings: dict[str, object], dtype: torch.dtype) -> None:
    report = check_model(made(**settings), num_users=6, long_events=300, dtype=dtype)
    assert set(report.exempt) == {2, 3, 4, 7}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("placement", [ONE, TWO], ids=str)
@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 9, 10, 25])
def test_cached_summaries_give_the_scores_of_one_pass(
    placement: tuple[tuple[int, int], ...], length: int, dtype: torch.dtype, tolerance: float
) -> None:
    """Summaries made offline, stored and read again, then recent events alone: one masked pass."""
    model = made(placement=placement).to(dtype)
    batch = Batch.from_histories([history(4, 1), history(length)])
    outputs, state = model.encode(batch)
    state = states.from_bytes(states.to_bytes(state), like=state)
    one_pass = model.score_vectors(outputs[-1:])
    cached = model.score(states.take(state, torch.tensor([1])))
    assert (cached - one_pass).abs().max() / (1 + one_pass.abs().max()) <= tolerance


def test_a_refresh_after_each_step_is_as_reading_everything() -> None:
    model = made(refresh=1)
    items = history(20)
    state = model.initial_state(1)
    for number, item in enumerate(items):
        state = model.step(Batch.from_histories([[item]], [[number]]), state)
        torch.testing.assert_close(model.score(state), scores_of(model, items[: number + 1]))


def test_summaries_grow_old_between_refreshes() -> None:
    model = made(refresh=3)
    items = history(20)
    _, state = model.encode(Batch.from_histories([items[:17]]))
    ages, keys = [], []
    for number in range(17, 20):
        state = model.step(Batch.from_histories([[items[number]]], [[number]]), state)
        ages.append(int(state.age))
        keys.append(state.keys)
    assert ages == [1, 2, 0]
    assert torch.equal(keys[0], keys[1])
    assert not torch.equal(keys[1], keys[2])
    torch.testing.assert_close(model.score(state), scores_of(model, items))


def test_what_is_older_than_past_and_recent_events_counts_for_nothing() -> None:
    model = made()
    items, other = history(20), [*history(11, 5), *history(20)[11:]]
    torch.testing.assert_close(scores_of(model, items), scores_of(model, other))
    nearer = [*history(20)[:11], (items[11] + 1) % ITEMS, *items[12:]]
    assert not torch.allclose(scores_of(model, items), scores_of(model, nearer))


def test_every_event_of_the_past_reaches_the_scores() -> None:
    model = made()
    items = history(9)
    for place in range(9):
        other = [*items[:place], (items[place] + 1) % ITEMS, *items[place + 1 :]]
        assert not torch.allclose(scores_of(model, items), scores_of(model, other))


def test_each_row_comes_from_the_event_before_across_the_cuts() -> None:
    """So every event is a target once, and no target is a token."""
    model = made()
    items = history(14)
    trained = model(Batch.from_histories([items], [[0] * 14]))
    outputs, _ = model.encode(Batch.from_histories([items], [[0] * 14]))
    assert trained.shape[0] == len(items)
    torch.testing.assert_close(trained[1:], outputs[:-1])
    torch.testing.assert_close(trained[0], model.reader.backbone.without_events())


def test_training_draws_cuts_and_gaps() -> None:
    model = made(max_gap=2)
    events = Batch.from_histories([history(9)])
    torch.manual_seed(0)
    model.train()
    found = torch.stack([model(events)[-1] for _ in range(20)])
    assert len(found.unique(dim=0)) > 2
    model.eval()
    fixed = torch.stack([model(events)[-1] for _ in range(3)])
    assert len(fixed.unique(dim=0)) == 1


def test_bytes_of_the_state() -> None:
    config = PublishedPerSRecHSTUConfig(num_items=5, placement=((1_024, 4),), recent=256)
    expected = 8 * 2 * 4 * 64 + 8 * 4 + 12 * (1_024 + 256) + 24
    assert states.bytes_per_user(PublishedPerSRecHSTU(config).initial_state(1)) == expected


@pytest.mark.parametrize("length", [0, 1, 2, 3, 4])
def test_short_histories(length: int) -> None:
    """Shorter than r, or than p + r, or empty: the tokens of an empty segment are left out."""
    model = made()
    _, state = model.encode(Batch.from_histories([history(length)]))
    assert int(state.tokens) == (2 if length > 3 else 0)
    assert torch.isfinite(model.score(state)).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 1}, "layers >= 2, received 1"),
        ({"placement": ()}, "at least one"),
        ({"placement": ((4, 1), (4, 1))}, "0 < offset_1 < offset_2 < ..., received 4 after 4"),
        ({"placement": ((0, 1),)}, "received 0 after 0"),
        ({"placement": ((4, 0),)}, "tokens >= 1 at offset 4, received 0"),
        ({"recent": 0}, "recent >= 1, received 0"),
        ({"refresh": 0}, "refresh >= 1, received 0"),
        ({"max_gap": -1}, "max_gap >= 0, received -1"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PublishedPerSRecHSTUConfig(num_items=5, **settings)  # type: ignore[arg-type]
