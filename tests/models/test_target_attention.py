"""Rankers that read events one by one: the laws, and the readers against their definitions."""

import pytest
import torch
from tests.models.test_ifa import random_events, random_requests

from everlong.models.ranker import Recent
from everlong.models.target_attention import (
    DINReader,
    SearchReader,
    TargetAttention,
    TargetAttentionConfig,
)
from everlong.ops.sets import Sets
from everlong.testing import check_model

READERS = ("mean", "din", "softmax", "sim_soft", "sim_hard")


def small(reader: str, **changes: object) -> TargetAttention:
    torch.manual_seed(0)
    shape = {"num_items": 9, "dim": 8, "heads": 2, "window": 6, "found": 3, "newest": 2}
    more = {"fields": (("label", 2),), "categories": (("kind", 3, 9),), "reader": reader}
    model = TargetAttention(TargetAttentionConfig(**{**shape, **more, **changes}))  # type: ignore[arg-type]
    if model.config.categories:
        model.items.offsets_0.copy_(torch.arange(10))  # type: ignore[operator]
        model.items.codes_0.copy_(torch.arange(9) % 3)  # type: ignore[operator]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return model.double().eval()


@pytest.mark.parametrize("reader", READERS)
def test_keeps_the_seven_laws(reader: str) -> None:
    model = small(reader, candidate_attention=reader == "softmax")
    report = check_model(model, fields={"label": 2}, num_users=4, max_events=14, long_events=60)
    assert report.exempt == {}


@pytest.mark.parametrize("reader", READERS)
def test_one_pass_is_the_score_from_each_state(reader: str) -> None:
    model, events = small(reader), random_events([9, 0, 1, 14], 1)
    batch = random_requests(events, 1)
    with torch.no_grad():
        trained = model.rank(batch)
        for number in range(batch.user.numel()):
            start = int(events.offsets[batch.user[number]])
            index = torch.arange(start, start + int(batch.cut[number]))
            state = model.final_state(events.select(index, torch.tensor([0, len(index)])))
            a, b = batch.offsets[number : number + 2].tolist()
            served = model.score(state, batch.items[None, a:b], batch.times[number : number + 1])
            assert torch.allclose(served[0], trained[a:b], atol=1e-10)


def recent_of(rows: int, size: int) -> Recent:
    present = torch.ones(rows, size, dtype=torch.float64)
    present[0, : size // 2] = 0
    events = torch.randn(rows, size, 8, dtype=torch.float64) * present[..., None]
    return Recent(events, torch.rand(rows, size).double(), present, torch.zeros(rows, size).long())


def test_din_weighs_every_pair_by_its_network() -> None:
    model = small("din")
    reader = model.reader
    assert isinstance(reader, DINReader)
    recent, values = recent_of(2, 5), torch.randn(3, 8, dtype=torch.float64)
    found = reader(values, recent, Sets.of(torch.tensor([0, 1, 3])))
    for row, request in enumerate((0, 1, 1)):
        mixed = torch.zeros(8, dtype=torch.float64)
        for place in range(5):
            event = recent.events[request, place]
            # [q, k, q * k] through one product
            inner = reader.of_candidate(values[row]) + reader.of_event(event)
            inner = inner + reader.of_product(values[row] * event)
            weight = reader.weigh(torch.nn.functional.silu(inner)) * recent.present[request, place]
            mixed = mixed + weight * event
        assert torch.allclose(found[row], reader.leave(mixed))


def test_search_reads_only_what_it_finds() -> None:
    model = small("sim_soft")
    reader = model.reader
    assert isinstance(reader, SearchReader)
    recent, values = recent_of(2, 6), torch.randn(2, 8, dtype=torch.float64)
    sets = Sets.of(torch.tensor([0, 1, 2]))
    base = reader(values, recent, sets, None)
    scores = (reader.query(values)[:, None] * reader.enter(recent.events)[..., :8]).sum(-1)
    scores = scores.masked_fill(recent.present == 0, -torch.inf)
    # an event that is neither found nor among the newest two does not matter
    for row in range(2):
        order = scores[row].argsort(descending=True).tolist()
        for place in range(6):
            events = recent.events.clone()
            events[row, place] *= 0.999
            changed = reader(values, recent._replace(events=events), sets, None)
            matters = place >= 4 or (place in order[:3] and bool(recent.present[row, place]))
            same = torch.allclose(base[row], changed[row], rtol=0, atol=1e-12)
            assert same is not (matters and bool(recent.present[row, place]))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="expected reader one of mean, din"):
        small("lstm")
    with pytest.raises(ValueError, match="sim_hard searches by category"):
        small("sim_hard", categories=())
    with pytest.raises(ValueError, match="expected window, found and newest >= 1"):
        small("sim_soft", found=0)
