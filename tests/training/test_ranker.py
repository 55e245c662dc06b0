"""Learning from requests: resumption, what is dropped and added, and offline = served."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors import safe_open

from everlong.data.events import Events, read_events
from everlong.data.items import read_items
from everlong.data.requests import (
    RequestDataset,
    RequestSplit,
    requests_from_events,
    split_requests,
)
from everlong.data.synthetic import exposures
from everlong.evaluation.ranker import evaluate_ranking
from everlong.evaluation.requests import score_requests, serve_requests
from everlong.models.ifa import IFA, IFAConfig
from everlong.models.user_model import UserModel
from everlong.recommender.fit_ranker import fill_items, item_features
from everlong.system.interrupt import Interrupted
from everlong.training.checkpoint import FILE
from everlong.training.optimizer import parameter_groups
from everlong.training.precision import Precision
from everlong.training.ranker import Ranking, add_candidates, drop_candidates, train_ranker
from everlong.training.settings import RankerTrainConfig


def likes(users: int = 60, seed: int = 0) -> tuple[Events, RequestSplit]:
    """Users like items of the group of the first that they liked."""
    generator = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        group = generator.integers(2)
        for session in range(6):
            for _ in range(4):
                item = int(generator.integers(20))
                start = 10**9 + session * 100_000
                rows.append(
                    (user, item, start + int(generator.integers(900)), float(item % 2 == group))
                )
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "label"], orient="row")
    frame = frame.with_columns(outcome=pl.col("label").cast(pl.Int64))
    events = read_events(frame, fields=["label", "outcome"], time_unit="s")
    return events, split_requests(
        requests_from_events(events), validation_share=0.15, test_share=0.15
    )


def small(events: Events, **changes: object) -> IFA:
    shape = {"num_items": events.num_items, "dim": 16, "heads": 2, "layers": 1, "window": 4}
    torch.manual_seed(0)
    fields = (("outcome", 2),)
    return IFA(IFAConfig(**{**shape, "fields": fields, "dropout": 0.1, **changes}))  # type: ignore[arg-type]


def test_learns_and_serves_what_was_measured() -> None:
    events, parts = likes(users=150)
    model = small(events)
    dataset = RequestDataset(events, parts.train)
    config = RankerTrainConfig(epochs=16, batch_size=256, lr=5e-3, patience=14)

    def validate(trained: UserModel) -> dict[str, float]:
        assert isinstance(trained, IFA)
        found = evaluate_ranking(score_requests(trained, events, parts.validation))
        return {name: value.mean for name, value in found.metrics.items()}

    result = train_ranker(model, dataset, config, validate=validate)
    assert result.best_score > 0.9
    offline = score_requests(model, events, parts.test, budget=200)
    online = serve_requests(model, events, parts.test)
    assert evaluate_ranking(offline).metrics["GAUC"].mean > 0.85
    order = np.argsort(offline.request, kind="stable"), np.argsort(online.request, kind="stable")
    assert offline.request[order[0]].tolist() == online.request[order[1]].tolist()
    np.testing.assert_allclose(offline.logits[order[0]], online.logits[order[1]], atol=1e-4)


def test_resumes_to_the_same_bits(tmp_path: Path) -> None:
    events, parts = likes(users=20)
    dataset = RequestDataset(events, parts.train)
    settings = {"batch_size": 256, "candidate_drop": 0.3, "unexposed": 2, "schedule": "constant"}
    config = RankerTrainConfig(epochs=3, **settings)  # type: ignore[arg-type]
    calls = 0

    def better_and_better(model: UserModel) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise Interrupted("in the middle")
        return {"GAUC": calls / 10}

    whole, cut, resumed = small(events), small(events), small(events)
    train_ranker(whole, dataset, config, validate=better_and_better)
    with pytest.raises(Interrupted):
        train_ranker(cut, dataset, config, validate=better_and_better, folder=tmp_path)
    train_ranker(resumed, dataset, config, validate=better_and_better, folder=tmp_path, resume=True)
    assert calls == 7  # one epoch was done, the second began anew
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    other = RequestDataset(events, parts.test)
    with pytest.raises(ValueError, match="run"):
        train_ranker(small(events), other, config, folder=tmp_path, resume=True)


def test_same_seed_same_bits() -> None:
    events, parts = likes(users=20)
    dataset = RequestDataset(events, parts.train)
    config = RankerTrainConfig(epochs=2, batch_size=256, candidate_drop=0.3, unexposed=2)
    a, b = small(events), small(events)
    train_ranker(a, dataset, config)
    train_ranker(b, dataset, config)
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


def test_dropped_candidates_leave_a_labelled_one() -> None:
    events, parts = likes(users=10)
    (batch, *_) = RequestDataset(events, parts.train).in_order(10**9)
    torch.manual_seed(0)
    less = drop_candidates(batch, 0.9)
    known = (~less.labels.isnan()).double()
    owner = torch.arange(less.user.numel()).repeat_interleave(less.offsets.diff())
    assert bool((torch.zeros(less.user.numel()).double().index_add(0, owner, known) >= 1).all())
    assert less.items.numel() < 0.6 * batch.items.numel()
    assert drop_candidates(batch, 0.0) is batch


@pytest.mark.parametrize("label", [0.0, torch.nan])
def test_added_candidates_are_new_and_change_nothing_that_was_shown(label: float) -> None:
    events, parts = likes(users=10)
    (batch, *_) = RequestDataset(events, parts.train).in_order(10**9)
    torch.manual_seed(0)
    chosen = torch.zeros(batch.user.numel(), dtype=torch.bool)
    chosen[::2] = True
    more = add_candidates(batch, chosen, 3, torch.ones(events.num_items).double(), label)
    for number in range(batch.user.numel()):
        a, b = batch.offsets[number : number + 2].tolist()
        c, d = more.offsets[number : number + 2].tolist()
        assert more.items[c : c + b - a].tolist() == batch.items[a:b].tolist()
        assert more.labels[c : c + b - a].tolist() == batch.labels[a:b].tolist()
        extra = more.items[c + b - a : d].tolist()
        assert len(extra) <= (3 if chosen[number] else 0)
        assert len(set(more.items[c:d].tolist())) == d - c
        assert more.labels[c + b - a : d].isnan().all() == (label != label or not extra)
    assert more.items.numel() > batch.items.numel()


def test_nothing_labelled_is_an_error() -> None:
    events, parts = likes(users=10)
    requests = parts.train
    requests.labels[:] = np.nan
    with pytest.raises(ValueError, match="labelled candidates, received none"):
        train_ranker(small(events), RequestDataset(events, requests), RankerTrainConfig())


@pytest.mark.slow
def test_reaches_what_can_be_known_of_made_up_exposures() -> None:
    log = exposures(num_users=300, num_items=60, num_groups=6)
    events = read_events(log.frame, fields=["label", "outcome"], time_unit="s")
    parts = split_requests(requests_from_events(events))
    table = pl.DataFrame({"item_id": range(60), "group": [str(n % 6) for n in range(60)]})
    items = read_items(table, events.item_ids, categorical=["group"])
    features = item_features(items)._asdict()
    model = small(events, dim=32, layers=2, window=16, **features)
    fill_items(model, items)
    config = RankerTrainConfig(epochs=8, batch_size=256, lr=5e-3)
    train_ranker(model, RequestDataset(events, parts.train), config)
    found = evaluate_ranking(score_requests(model, events, parts.test)).metrics["AUC"].mean
    assert found > 0.75
    assert found < log.best["AUC"] + 0.03


@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_narrow_products_are_used_where_the_first_loss_agrees(scale: float, tmp_path: Path) -> None:
    events, parts = likes(users=20)
    dataset = RequestDataset(events, parts.train)
    config = RankerTrainConfig(epochs=1, batch_size=256, precision="bfloat16", pairwise=1.0)
    model = small(events)
    with torch.no_grad():
        # a score is the sum of two numbers of which bfloat16 tells only the larger one
        model.head[3].bias.fill_(scale)
        model.item_bias.weight.fill_(-scale)
    train_ranker(model, dataset, config, folder=tmp_path)
    with safe_open(str(tmp_path / FILE), framework="pt") as file:
        stored = json.loads(file.metadata()["facts"])["precision"]
    assert stored == ("bfloat16" if scale == 0 else "float32")


def test_auto_is_the_precision_that_the_machine_multiplies_fast() -> None:
    device = torch.device("cpu")
    narrow = Precision("auto", device).narrow
    capabilities = torch.cpu.get_capabilities()
    assert narrow == any(capabilities.get(n) is True for n in ("avx512_bf16", "amx_bf16", "bf16"))
    events, parts = likes(users=20)
    config = RankerTrainConfig(precision="auto")
    task = Ranking(small(events), RequestDataset(events, parts.train), config, device)
    assert task.precision.narrow == narrow


def test_a_metric_that_is_better_when_smaller_chooses_its_smallest() -> None:
    events, parts = likes(users=20)
    losses = iter([0.5, 0.3, 0.4, 0.35])
    result = train_ranker(
        small(events),
        RequestDataset(events, parts.train),
        RankerTrainConfig(epochs=4, batch_size=256, monitor="LogLoss", patience=9),
        validate=lambda model: {"LogLoss": next(losses)},
        minimise=True,
    )
    assert (result.best_epoch, result.best_score) == (2, 0.3)


def test_weight_decay_is_of_matrices_and_what_the_model_declares() -> None:
    events, _ = likes(users=20)
    model = small(events)
    config = RankerTrainConfig()
    decayed = {
        id(parameter)
        for group in parameter_groups(model, config)
        if group["weight_decay"]
        for parameter in group["params"]
    }
    odd = {n for n, p in model.named_parameters() if (p.ndim >= 2) != (id(p) in decayed)}
    assert odd == set(IFA.weight_decay) == {"head.0.weight", "item_bias.weight"}
