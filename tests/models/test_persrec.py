from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.forms import slow
from torch import Tensor

from everlong.models import state as states
from everlong.models.batch import Batch
from everlong.models.hstu import HSTU, HSTUConfig
from everlong.models.persrec import PerSRec, PerSRecConfig
from everlong.models.persrec_core import Segments, Slots, event_blocks, runs, token_blocks
from everlong.models.persrec_paper import Cuts, PublishedPerSRecHSTU, PublishedPerSRecHSTUConfig
from everlong.models.user_model import UserModel
from everlong.ops.pointwise_attention import Blocks
from everlong.testing import check_model
from everlong.training.next_item_losses import full_softmax

ITEMS = 9
SIZES = {"dim": 8, "heads": 2, "layers": 2, "dropout": 0.0}


def made(*, seed: int = 0, **settings: object) -> PerSRec:
    """A small model in float64 whose tokens and biases are large enough to matter."""
    torch.manual_seed(seed)
    shape = {"segment": 4, "tokens": 2, "groups": 2, "keep": 0}
    config = PerSRecConfig(num_items=ITEMS, **{**SIZES, **shape, **settings})  # type: ignore[arg-type]
    model = PerSRec(config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.double().eval()


def history(length: int, seed: int = 0) -> list[int]:
    return torch.randint(ITEMS, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def segments_of(parts: Sequence[tuple[int, int]]) -> Segments:
    """Segments of one user: ``(events, tokens)`` each, all earlier tokens visible."""
    length = torch.tensor([events for events, _ in parts])
    tokens = torch.tensor([number for _, number in parts])
    before = tokens.cumsum(0) - tokens
    most = int(before.max())
    column = torch.arange(most)
    hidden = most - before
    columns = (before[:, None] - most + column).masked_fill(column < hidden[:, None], 0)
    total = int(length.sum())
    return Segments(
        items=torch.zeros(total, dtype=torch.int64),
        times=torch.arange(total),
        length=length,
        asked=torch.zeros_like(length),
        folded=torch.where(tokens > 0, length, 0),
        tokens=tokens,
        token_rows=runs(before, tokens),
        columns=columns,
        hidden=hidden,
    )


def visible(blocks: Sequence[Blocks], size: int) -> Tensor:
    """``[size, size]`` the attention mask."""
    seen = torch.zeros(size, size, dtype=torch.int64)
    for block in blocks:
        for keys, queries, first, stop, valid in zip(
            block.keys, block.queries, block.first, block.stop, block.valid, strict=True
        ):
            for query, low, high in zip(queries[valid], first[valid], stop[valid], strict=True):
                seen[query, keys[low:high]] += 1
    return seen


def mask(parts: Sequence[tuple[int, int]]) -> Tensor:
    """The attention mask in the order of the history: events and, after them, their tokens."""
    segments = segments_of(parts)
    slots = Slots.of(segments)
    blocks = [*event_blocks(segments, slots, segments.asked), *token_blocks(segments, slots)]
    total = slots.num_items + slots.token_position.numel()
    order, item, token = [], 0, slots.num_items
    for events, tokens in parts:
        order += [*range(item, item + events), *range(token, token + tokens)]
        item, token = item + events, token + tokens
    return visible(blocks, total)[order][:, order]


def as_mask(text: str) -> Tensor:
    rows = [line.split() for line in text.strip().splitlines()]
    return torch.tensor([[int(cell != ".") for cell in row] for row in rows])


def test_mask_of_one_segment() -> None:
    expected = as_mask("""
        1 . . . . . . .
        1 1 . . . . . .
        1 1 1 . . . . .
        1 1 1 1 . . . .
        1 1 1 1 1 . . .
        . . . 1 1 1 . .
        . . . 1 1 1 1 .
        . . . 1 1 1 1 1
    """)
    assert mask([(3, 2), (3, 0)]).equal(expected)


def test_mask_of_two_segments() -> None:
    expected = as_mask("""
        1 . . . . . . . .
        1 1 . . . . . . .
        1 1 1 . . . . . .
        . . 1 1 . . . . .
        . . 1 1 1 . . . .
        . . 1 1 1 1 . . .
        . . 1 1 1 1 1 . .
        . . 1 . . 1 1 1 .
        . . 1 . . 1 1 1 1
    """)
    assert mask([(2, 1), (2, 2), (2, 0)]).equal(expected)


def laid_out(
    model: PerSRec | PublishedPerSRecHSTU, batch: Batch, *, train: bool = False
) -> tuple[Tensor, Segments, Slots]:
    """The mask that a model builds for a batch of one user, and what it is built from."""
    caught: list[Segments] = []
    hook = model.reader.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    (model if train else model.encode)(batch)
    hook.remove()
    segments = caught[-1]
    slots = Slots.of(segments)
    blocks = [
        *event_blocks(segments, slots, torch.zeros_like(segments.asked)),
        *token_blocks(segments, slots),
    ]
    order: list[int] = []
    for number in range(segments.length.numel()):
        item, token = int(slots.start[number]), slots.num_items + int(slots.token_start[number])
        order += range(item, item + int(segments.length[number]))
        order += range(token, token + int(segments.tokens[number]))
    seen = visible(blocks, slots.num_items + slots.token_position.numel())
    return seen[order][:, order], segments, slots


def minutes(length: int) -> Batch:
    return Batch.from_histories([history(length)], [list(range(0, 10 * length, 10))])


def paper(**settings: object) -> PublishedPerSRecHSTU:
    config = PublishedPerSRecHSTUConfig(num_items=ITEMS, **SIZES, **settings)  # type: ignore[arg-type]
    return PublishedPerSRecHSTU(config).double().eval()


def test_the_paper_schedule_builds_the_masks_of_the_paper() -> None:
    seen, segments, slots = laid_out(paper(placement=((3, 2),), recent=3), minutes(6))
    assert seen.equal(mask([(3, 2), (3, 0)]))
    assert slots.token_times.tolist() == [20, 20]
    assert slots.token_position.tolist() == [3, 4]
    assert segments.token_rows.tolist() == [0, 1]
    several = paper(placement=((2, 1), (4, 2)), recent=2)
    seen, segments, slots = laid_out(several, minutes(6))
    assert seen.equal(mask([(2, 1), (2, 2), (2, 0)]))
    assert slots.token_times.tolist() == [10, 30, 30]
    assert segments.token_rows.tolist() == [0, 1, 2]


def test_recent_events_do_not_see_the_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    model = paper(placement=((3, 2),), recent=2, max_gap=2).train()
    monkeypatch.setattr(model, "_random_cuts", lambda held: Cuts(held, held - 4, held - 2))
    seen, _, _ = laid_out(model, minutes(7), train=True)
    assert seen.equal(mask([(3, 2), (2, 0), (2, 0)]))


def test_the_stream_builds_the_same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(segment=3, tokens=2, groups=1)
    seen, segments, slots = laid_out(model, minutes(5))
    assert seen.equal(mask([(3, 2), (2, 0)]))
    assert slots.token_times.tolist() == [20, 20]
    assert slots.token_position.tolist() == [3, 4]
    assert segments.token_rows.tolist() == [0, 1]
    # a first segment that lacks its first event, as training draws it
    monkeypatch.setattr(model, "_skipped", lambda state: torch.ones_like(state.filled))
    seen, _, slots = laid_out(model.train(), minutes(5), train=True)
    assert seen.equal(mask([(2, 2), (3, 0)]))
    assert slots.token_times.tolist() == [10, 10]


def test_a_request_computes_the_pairs_of_the_paper() -> None:
    """r K + r (r + 1) / 2 pairs of query and key a layer: 4.1 % of the whole history's."""
    past, recent, tokens = 1_024, 256, 4
    rows = torch.tensor([recent])
    segments = segments_of([(recent, 0)])._replace(
        columns=torch.arange(tokens)[None], hidden=rows * 0
    )
    blocks = event_blocks(segments, Slots.of(segments), segments.asked)
    pairs = sum(int(((b.stop - b.first) * b.valid).sum()) for b in blocks)
    assert pairs == recent * tokens + recent * (recent + 1) // 2 == 33_920
    total = past + recent
    assert pairs / (total * (total + 1) / 2) < 0.042


def test_mask_of_a_past_that_is_not_full() -> None:
    """p = 3 with one event missing: as with all of them, without its row and column."""
    whole = mask([(3, 1), (2, 0)])
    assert mask([(2, 1), (2, 0)]).equal(whole[1:, 1:])


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=6))
def test_mask_is_the_formula(parts: list[tuple[int, int]]) -> None:
    """visible(q, k) = k <= q and (k is a token or segment(k) == segment(q))."""
    parts = [(events, tokens) for events, tokens in parts if events] or [(1, 0)]
    index, token = [], []
    for number, (events, tokens) in enumerate(parts):
        index += [number] * (events + tokens)
        token += [False] * events + [True] * tokens
    size = len(index)
    expected = torch.tensor(
        [
            [int(k <= q and (token[k] or index[k] == index[q])) for k in range(size)]
            for q in range(size)
        ]
    )
    assert mask(parts).equal(expected)


SHAPES = [
    {},
    {"groups": 1},
    slow({"keep": 3}),
    {"keep": 4, "groups": 3, "tokens": 1},
    {"segment": 1, "tokens": 1},
    slow({"segment": 50}),
    {"relative_bias": False, "keep": 2},
    slow({"layers": 3}),
]


@pytest.mark.parametrize("dtype", [torch.float64, slow(torch.float32)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_laws_hold(shape: dict[str, object], dtype: torch.dtype) -> None:
    report = check_model(made(**shape), num_users=6, long_events=300, dtype=dtype)
    assert set(report.kept) == set(range(1, 8))


def test_without_a_cut_it_is_hstu() -> None:
    model = made(segment=50)
    plain = HSTU(HSTUConfig(num_items=ITEMS, **SIZES, window=40)).double().eval()  # type: ignore[arg-type]
    weights = model.reader.backbone.state_dict()
    reach = plain.backbone.layers[0].distance_bias.numel()
    weights = {
        name: value[:reach] if name.endswith("distance_bias") else value
        for name, value in weights.items()
    }
    plain.backbone.load_state_dict(weights)
    batch = Batch.from_histories([history(30), history(7, 1), []])
    torch.testing.assert_close(model.encode(batch)[0], plain.encode(batch)[0], rtol=0, atol=1e-12)


def scores_of(model: PerSRec, items: list[int]) -> Tensor:
    return model.score(model.encode(Batch.from_histories([items]))[1])


def test_summaries_carry_what_was_folded() -> None:
    """Every folded event reaches the scores."""
    model = made(groups=3)
    items = history(14)
    for place in range(12):
        other = list(items)
        other[place] = (items[place] + 1) % ITEMS
        assert not torch.allclose(scores_of(model, items), scores_of(model, other))


def test_the_oldest_summary_leaves() -> None:
    """With two layers and G = 1, only the last folded segment and the events since count."""
    model = made(groups=1)
    items, other = history(14), [*history(8, 5), *history(14)[8:]]
    torch.testing.assert_close(scores_of(model, items), scores_of(model, other))
    second = made(groups=2)
    assert not torch.allclose(scores_of(second, items), scores_of(second, other))


def test_recent_events_change_no_summary() -> None:
    model = made(groups=3)
    batch = Batch.from_histories([[*history(12), 1, 2], [*history(12), 3, 4]])
    _, state = model.encode(batch)
    assert state.groups.tolist() == [3, 3]
    for values in (state.keys, state.values):
        torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-12)


def test_an_event_changes_the_summaries_from_its_segment_on() -> None:
    """From summary to summary takes a layer more than from events to a summary."""
    model = made(groups=3, layers=3)
    items = history(14)
    other = [*items[:5], (items[5] + 1) % ITEMS, *items[6:]]
    _, state = model.encode(Batch.from_histories([items, other]))
    keys = state.keys[:, :3]
    same = [torch.allclose(*pair, rtol=0, atol=1e-12) for pair in keys.unbind(1)]
    assert same == [True, False, False]


def test_one_history_has_one_summary() -> None:
    model = made()
    _, state = model.encode(Batch.from_histories([history(9), history(9)]))
    torch.testing.assert_close(state.keys[0], state.keys[1], rtol=0, atol=1e-12)


def test_tokens_learn_from_what_comes_after_their_segment() -> None:
    model = made()
    events = Batch.from_histories([history(6)])
    later = model.score_vectors(model(events))[5:]
    (gradient,) = torch.autograd.grad((later * torch.randn_like(later)).sum(), model.reader.tokens)
    assert (gradient.abs().sum(1) > 0).all()
    within = model.score_vectors(model(events))[:4]
    (gradient,) = torch.autograd.grad(
        (within * torch.randn_like(within)).sum(), model.reader.tokens, allow_unused=True
    )
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stored_summaries_give_the_scores_of_the_whole_pass(
    shape: dict[str, object], dtype: torch.dtype, tolerance: float
) -> None:
    """Fold by fold, each state written and read again, against all segments at once."""
    model = made(**shape).to(dtype)
    items = history(23)
    trained = model.score_vectors(model(Batch.from_histories([items])))
    state = model.initial_state(1)
    for number, item in enumerate(items):
        scores = model.score(state, at=torch.tensor([number]))
        scale = 1 + trained.abs().max()
        assert (scores[0] - trained[number]).abs().max() / scale <= tolerance
        state = model.step(Batch.from_histories([[item]], [[number]]), state)
        state = states.from_bytes(states.to_bytes(state), like=state)


def test_training_draws_the_first_cut() -> None:
    events, torch_seed = Batch.from_histories([history(30), history(3)]), 0
    for random_cuts in (True, False):
        model = made(keep=2, random_cuts=random_cuts)
        torch.manual_seed(torch_seed)
        found = torch.stack([model.train()(events) for _ in range(30)])
        assert (len(found[:, 20].unique(dim=0)) > 2) == random_cuts
        # up to the shortest first segment, and what is kept after it, nothing is cut off
        torch.testing.assert_close(found[:, :3].std(0), torch.zeros(3, 8).double())
        torch.testing.assert_close(found[0, :3], model.eval()(events)[:3])
        served = torch.stack([model.eval()(events) for _ in range(2)])
        assert torch.equal(served[0], served[1])


def test_a_carried_history_is_cut_where_it_is_served() -> None:
    model = made(keep=2)
    _, state = model.encode(Batch.from_histories([history(9)]))
    later = Batch.from_histories([history(20, 1)], [list(range(9, 29))])
    torch.testing.assert_close(model.train()(later, state), model.eval()(later, state))


CUES, FILLERS, ASK = 4, 10, 18


def asked(number: int, generator: torch.Generator) -> Tensor:
    """``[number, 72]``: a cue among the first 32 items, fillers, and at the end its answer."""
    items = CUES + torch.randint(FILLERS, (number, 72), generator=generator)
    cue = torch.randint(CUES, (number,), generator=generator)
    items[torch.arange(number), torch.randint(32, (number,), generator=generator)] = cue
    items[:, -2] = ASK
    items[:, -1] = CUES + FILLERS + cue
    return items


def answered(model: UserModel, items: Tensor) -> Tensor:
    """User vectors before the last item."""
    number, length = items.shape
    offsets = torch.arange(number + 1) * length
    times = torch.arange(length).repeat(number)
    vectors = model(Batch(items=items.flatten(), times=times, offsets=offsets))
    return vectors.view(number, length, -1)[:, -1]


@pytest.mark.slow
def test_a_cue_beyond_the_recent_events_is_learned_through_tokens() -> None:
    """It is 38 to 70 events back; without tokens the model sees 31 at most."""
    shape = {"num_items": ASK + 1, "dim": 32, "dropout": 0.0}
    stream = PerSRecConfig(**shape, segment=32, keep=8, groups=2, random_cuts=False)  # type: ignore[arg-type]
    accuracy = {}
    for name, make in {
        "tokens": lambda: PerSRec(stream),
        "recent": lambda: HSTU(HSTUConfig(**shape, window=16)),  # type: ignore[arg-type]
    }.items():
        torch.manual_seed(0)
        model, generator = make(), torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(120):
            items = asked(64, generator)
            loss = full_softmax(answered(model, items), model.item_embeddings(), items[:, -1])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
        items = asked(200, generator)
        best = model.score_vectors(answered(model.eval(), items)).argmax(1)
        accuracy[name] = float((best == items[:, -1]).double().mean())
    assert accuracy["tokens"] > 0.95
    assert accuracy["recent"] < 0.4


def test_bytes_of_the_state() -> None:
    model = PerSRec(PerSRecConfig(num_items=5))
    summaries, events = 8 * 2 * 1 * 4 * 64 + 8 * 1, 12 * (256 + 64) + 16
    assert states.bytes_per_user(model.initial_state(1)) == summaries + events


def test_a_state_of_another_shape_is_refused() -> None:
    one, two = made(groups=1), made(groups=2)
    data = states.to_bytes(one.initial_state(1))
    with pytest.raises(ValueError, match="belongs to another model"):
        states.from_bytes(data, like=two.initial_state(1))


def test_a_state_of_another_schedule_is_refused() -> None:
    stream = made()
    cut = paper()
    for written, reader in ((stream, cut), (cut, stream)):
        data = states.to_bytes(written.initial_state(1))
        with pytest.raises(ValueError, match="belongs to another model"):
            states.from_bytes(data, like=reader.initial_state(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 1}, "layers >= 2, received 1"),
        ({"segment": 0}, "segment >= 1, received 0"),
        ({"tokens": 0}, "tokens >= 1, received 0"),
        ({"groups": 0}, "groups >= 1, received 0"),
        ({"segment": 4, "keep": 5}, "0 <= keep <= segment, received keep=5 and segment=4"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerSRecConfig(num_items=5, **settings)  # type: ignore[arg-type]
