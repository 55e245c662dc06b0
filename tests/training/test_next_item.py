import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from everlong.data.dataset import Dataset, TrainBatch
from everlong.data.events import Events, read_events
from everlong.data.split import TrainSegments, whole_histories
from everlong.data.synthetic import markov_chain, markov_transitions
from everlong.models.batch import Batch
from everlong.models.gru4rec import GRU4Rec, GRU4RecConfig
from everlong.models.hstu import HSTU, HSTUConfig
from everlong.models.lru import LRU, LRUConfig
from everlong.models.markov import Markov, MarkovConfig
from everlong.models.persrec import PerSRec, PerSRecConfig
from everlong.models.persrec_paper import PublishedPerSRecHSTU, PublishedPerSRecHSTUConfig
from everlong.models.popularity import Popularity, PopularityConfig
from everlong.models.sasrec import SASRec, SASRecConfig
from everlong.models.user_model import UserModel
from everlong.system.interrupt import Interrupted
from everlong.training.checkpoint import FILE, LOG
from everlong.training.loop import TrainResult
from everlong.training.next_item import train
from everlong.training.next_item_losses import Negatives, NegativeSampler
from everlong.training.optimizer import parameter_groups, rate_share
from everlong.training.settings import TrainConfig

ITEMS = 11
TIMINGS = ("seconds", "events_per_second")


def log_of(lengths: list[int], seed: int = 0) -> Events:
    random = np.random.default_rng(seed)
    frame = pl.DataFrame(
        {
            "user_id": np.repeat(np.arange(len(lengths)), lengths),
            "item_id": np.concatenate(
                [np.arange(ITEMS), random.integers(ITEMS, size=sum(lengths))]
            )[: sum(lengths)],
        }
    )
    return read_events(frame, timestamp=None)


# histories longer than a batch of 16, and shorter ones
LENGTHS = [27, 3, 7, 18, 1]
EVENTS = log_of(LENGTHS)


def dataset_of(events: Events = EVENTS) -> Dataset:
    return Dataset(events, whole_histories(events))


def lru(seed: int = 0, dropout: float = 0.3) -> LRU:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LRU(
            LRUConfig(
                num_items=ITEMS,
                dim=6,
                channels=5,
                layers=1,
                dropout=dropout,
                recurrence_dropout=dropout,
            )
        )


def settings(**changes: Any) -> TrainConfig:
    plain = {"epochs": 2, "batch_events": 16, "lr": 0.01, "precision": "float32", "warmup": 0.0}
    return TrainConfig.model_validate({**plain, **changes})


def score(model: UserModel) -> dict[str, float]:
    """A validation without data: any number that depends on the parameters."""
    return {"NDCG@10": float(model.item_embeddings().weight.detach().double().sum())}


def outcome(model: UserModel, result: TrainResult) -> tuple[dict[str, Tensor], list[Any], Any]:
    """All that must be equal between two runs: parameters, history without timings, the best."""
    records = [{k: v for k, v in r.items() if k not in TIMINGS} for r in result.history]
    return model.state_dict(), records, (result.best_epoch, result.best_score, result.epochs)


def same(first: tuple[Any, Any, Any], second: tuple[Any, Any, Any]) -> bool:
    states = all(torch.equal(first[0][name], second[0][name]) for name in first[0])
    return states and first[1:] == second[1:]


class Stopping(Dataset):
    """Presses Ctrl-C while the micro-batch of a given number (over all epochs) is read."""

    def __init__(self, events: Events, segments: TrainSegments, stop_at: int) -> None:
        super().__init__(events, segments)
        self.stop_at, self.pressed = stop_at, False

    def batches(
        self, budget: int, *, seed: int, epoch: int, start: int = 0
    ) -> Iterator[TrainBatch]:
        before = sum(self.num_batches(budget, seed=seed, epoch=n) for n in range(epoch))
        found = super().batches(budget, seed=seed, epoch=epoch, start=start)
        for number, batch in enumerate(found, before + start):
            if number == self.stop_at and not self.pressed:
                self.pressed = True
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


def interrupted_then_resumed(
    config: TrainConfig, stop_at: int, folder: Path, model: UserModel | None = None
) -> tuple[dict[str, Tensor], list[Any], Any]:
    stopping = Stopping(EVENTS, whole_histories(EVENTS), stop_at)
    with pytest.raises(Interrupted, match="resume from"):
        train(model or lru(), stopping, config, validate=score, folder=folder)
    # another start of the parameters, so that all must come from the checkpoint
    fresh = lru(seed=99)
    result = train(fresh, dataset_of(), config, validate=score, folder=folder, resume=True)
    return outcome(fresh, result)


def test_a_markov_chain_is_learned_to_near_its_best(tmp_path: Path) -> None:
    items = 20
    chain = markov_chain(150, items, 30, num_next=3)
    events = read_events(chain.frame)
    torch.manual_seed(0)
    model = LRU(
        LRUConfig(
            num_items=items, dim=16, channels=16, layers=1, dropout=0.0, recurrence_dropout=0.0
        )
    )
    config = settings(epochs=8, batch_events=512, lr=0.02)
    result = train(model, dataset_of(events), config, folder=tmp_path)
    chances = markov_transitions(items, num_next=3)
    rows = events.item_ids.ids(np.arange(items)).to_numpy()
    # expected share of hits at rank 1, exactly, after every item
    every_item = Batch.from_histories([[item] for item in range(items)])
    with torch.no_grad():
        _, state = model.encode(every_item)
        guess = model.score(state).argmax(1).numpy()
    reached = chances[rows, rows[guess]].mean()
    assert reached >= 0.95 * chances.max(axis=1).mean()
    assert result.history[-1]["loss"] < result.history[0]["loss"] - 0.5
    lines = (tmp_path / LOG).read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.history


def test_equal_seeds_give_equal_bits_and_others_do_not() -> None:
    def run(seed: int) -> tuple[dict[str, Tensor], list[Any], Any]:
        model = lru()
        return outcome(model, train(model, dataset_of(), settings(seed=seed), validate=score))

    first = run(1)
    assert same(first, run(1))
    assert not torch.equal(first[0]["items.ids.weight"], run(2)[0]["items.ids.weight"])


def test_the_random_numbers_of_the_caller_go_on() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(lru(), dataset_of(), settings(epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_events": 48, "micro_batch_events": 16},
        {"loss": "sampled", "negatives": 4, "schedule": "constant", "weight_decay": 0.1},
        {"loss": "infonce", "negatives": 4},
    ],
    ids=["carried", "micro_batches", "sampled", "infonce"],
)
def test_interrupted_at_any_place_and_resumed_it_ends_with_the_same_bits(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    config = settings(**changes)
    model = lru()
    expected = outcome(model, train(model, dataset_of(), config, validate=score))
    data = dataset_of()
    batches = [data.num_batches(config.micro_batch_budget, seed=0, epoch=epoch) for epoch in (0, 1)]
    assert any(batch.carried for batch in data.batches(16, seed=0, epoch=0))
    for stop_at in range(sum(batches)):
        folder = tmp_path / str(stop_at)
        assert same(interrupted_then_resumed(config, stop_at, folder), expected), stop_at


def test_interrupted_twice(tmp_path: Path) -> None:
    config = settings()
    model = lru()
    expected = outcome(model, train(model, dataset_of(), config, validate=score))
    for stop_at in (1, 4):
        stopping = Stopping(EVENTS, whole_histories(EVENTS), stop_at)
        with pytest.raises(Interrupted):
            train(lru(), stopping, config, validate=score, folder=tmp_path, resume=True)
    fresh = lru(seed=99)
    result = train(fresh, dataset_of(), config, validate=score, folder=tmp_path, resume=True)
    assert same(outcome(fresh, result), expected)


class PressAt:
    """Validates, and presses Ctrl-C the n-th time."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, model: UserModel) -> dict[str, float]:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return score(model)


def test_interrupted_while_validating(tmp_path: Path) -> None:
    config = settings(epochs=3)
    model = lru()
    expected = outcome(model, train(model, dataset_of(), config, validate=score))
    for stop_at in (1, 3):
        folder, validate = tmp_path / str(stop_at), PressAt(stop_at)
        with pytest.raises(Interrupted, match=f"epoch {stop_at + 1}, batch 0"):
            train(lru(), dataset_of(), config, validate=validate, folder=folder)
        fresh = lru(seed=99)
        result = train(fresh, dataset_of(), config, validate=score, folder=folder, resume=True)
        assert same(outcome(fresh, result), expected)


def test_without_a_folder_an_interrupt_says_that_nothing_was_kept() -> None:
    with pytest.raises(Interrupted, match="nothing was kept"):
        train(lru(), Stopping(EVENTS, whole_histories(EVENTS), 0), settings())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_resume_without_a_checkpoint_begins_at_the_start(tmp_path: Path) -> None:
    first, second = lru(), lru()
    train(first, dataset_of(), settings())
    train(second, dataset_of(), settings(), folder=tmp_path / "none", resume=True)
    assert torch.equal(first.start, second.start)


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import tests.conftest
from tests.training.test_next_item import dataset_of, lru, score, settings
from everlong.training.next_item import train
calls = 0
def score_or_wait(model):
    global calls
    calls += 1
    if calls == 4:
        print("three epochs are stored", flush=True)
        time.sleep(3_600)
    return score(model)
train(lru(), dataset_of(), settings(epochs=8), validate=score_or_wait, folder=Path({folder!r}))
"""


def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = settings(epochs=8)
    code = KILLED.format(tests=str(Path(__file__).parents[2]), folder=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"three epochs are stored\n"
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    fresh = lru(seed=99)
    result = train(fresh, dataset_of(), config, validate=score, folder=tmp_path, resume=True)
    model = lru()
    expected = outcome(model, train(model, dataset_of(), config, validate=score))
    assert same(outcome(fresh, result), expected)


@pytest.mark.parametrize(
    ("model", "changes", "events", "name"),
    [
        (lru(), {"lr": 0.02}, EVENTS, r"training\.lr is 0\.01, expected 0\.02"),
        (lru(dropout=0.1), {}, EVENTS, r"architecture\.dropout is 0\.3, expected 0\.1"),
        (GRU4Rec(GRU4RecConfig(num_items=ITEMS)), {}, EVENTS, "model is 'LRU', expected 'GRU4Rec'"),
        (lru(), {}, log_of(LENGTHS, seed=1), r"data\.fingerprint is"),
    ],
    ids=["settings", "architecture", "model", "data"],
)
def test_a_checkpoint_of_another_run_is_refused(
    model: UserModel, changes: dict[str, Any], events: Events, name: str, tmp_path: Path
) -> None:
    train(lru(), dataset_of(), settings(epochs=1), folder=tmp_path)
    before = (tmp_path / FILE).read_bytes()
    config = settings(epochs=1, **changes)
    with pytest.raises(ValueError, match=f"belongs to another run: {name}"):
        train(model, dataset_of(events), config, folder=tmp_path, resume=True)
    assert (tmp_path / FILE).read_bytes() == before


class Scores:
    """Given scores, one a validation, and the parameters that they were given for."""

    def __init__(self, *scores: float) -> None:
        self.scores, self.seen = scores, list[dict[str, Tensor]]()

    def __call__(self, model: UserModel) -> dict[str, float]:
        assert not model.training
        self.seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"NDCG@10": self.scores[len(self.seen) - 1]}


def test_early_stopping_returns_the_weights_of_the_best_epoch(tmp_path: Path) -> None:
    scores = Scores(0.1, 0.3, 0.2, 0.3, 0.9)
    model = lru()
    result = train(model, dataset_of(), settings(epochs=9, patience=2), validate=scores)
    # an equal score is no new best
    assert (result.best_epoch, result.best_score, result.epochs) == (2, 0.3, 4)
    assert [record["NDCG@10"] for record in result.history] == [0.1, 0.3, 0.2, 0.3]
    assert all(torch.equal(v, scores.seen[1][k]) for k, v in model.state_dict().items())
    assert not torch.equal(scores.seen[1]["start"], scores.seen[3]["start"])
    assert not model.training


def test_the_best_weights_come_through_a_resume(tmp_path: Path) -> None:
    batches = dataset_of().num_batches(16, seed=0, epoch=0)
    config = settings(epochs=9, patience=2)
    scores = Scores(0.3, 0.2)
    stopping = Stopping(EVENTS, whole_histories(EVENTS), 2 * batches + 1)
    with pytest.raises(Interrupted):
        train(lru(), stopping, config, validate=scores, folder=tmp_path)
    fresh = lru(seed=99)
    result = train(fresh, dataset_of(), config, validate=Scores(0.1), folder=tmp_path, resume=True)
    assert (result.best_epoch, result.epochs) == (1, 3)
    assert all(torch.equal(v, scores.seen[0][k]) for k, v in fresh.state_dict().items())
    # the run is over: to resume it again changes nothing and validates nothing
    again = lru(seed=98)
    train(again, dataset_of(), config, validate=Scores(), folder=tmp_path, resume=True)
    assert torch.equal(again.start, fresh.start)


def test_validation_comes_every_so_many_epochs_and_at_the_end() -> None:
    scores = Scores(0.1, 0.2, 0.3)
    result = train(lru(), dataset_of(), settings(epochs=5, validate_every=2), validate=scores)
    assert [r["epoch"] for r in result.history if "NDCG@10" in r] == [2, 4, 5]
    assert result.best_epoch == 5


def test_a_metric_that_is_not_measured_is_named() -> None:
    with pytest.raises(ValueError, match=r"unknown monitor 'NDCG@11'.*did you mean 'NDCG@10'"):
        train(lru(), dataset_of(), settings(monitor="NDCG@11"), validate=score)


def test_values_of_the_schedule() -> None:
    constant = settings(schedule="constant")
    assert [rate_share(done, constant) for done in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    cosine = settings(schedule="cosine")
    found = [rate_share(done, cosine) for done in (0.0, 0.25, 0.5, 1.0)]
    assert found == pytest.approx([1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.0])
    warm = settings(schedule="constant", warmup=0.2)
    found = [rate_share(done, warm) for done in (0.0, 0.05, 0.1, 0.2, 0.9)]
    assert found == pytest.approx([0.0, 0.25, 0.5, 1.0, 1.0], abs=1e-4)


def test_the_rate_of_an_update_is_that_of_its_beginning() -> None:
    count = dataset_of().num_batches(16, seed=0, epoch=1)
    for changes in ({}, {"batch_events": 32, "micro_batch_events": 16}):
        config = settings(**changes)
        last = (count - 1) // config.micro_batches_per_update * config.micro_batches_per_update
        result = train(lru(), dataset_of(), config)
        share = rate_share((1 + last / count) / 2, config)
        assert result.history[-1]["lr"] == pytest.approx(config.lr * share)
        assert result.history[-1]["lr"] > 0


def test_weight_decay_spares_biases_norms_and_the_recurrence() -> None:
    model = lru()
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def decayed(config: TrainConfig) -> set[str]:
        groups = parameter_groups(model, config)
        assert sum(len(group["params"]) for group in groups) == len(names)
        return {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}

    parts = ("enter", "leave", "widen", "narrow")
    blocks = {f"blocks.0.{part}.weight" for part in parts}
    assert decayed(settings()) == blocks | {"items.ids.weight", "start"}
    recurrence = {f"blocks.0.recurrence.{part}_log" for part in ("nu", "theta", "gamma")}
    assert decayed(settings(decay_recurrence=True)) == blocks | recurrence | {
        "items.ids.weight",
        "start",
    }
    assert decayed(settings(weight_decay=0.0)) == set()


def stored_precision(folder: Path) -> str:
    with safe_open(str(folder / FILE), framework="pt") as file:
        return str(json.loads(file.metadata()["facts"])["precision"])


def test_narrow_products_are_used_where_they_agree(tmp_path: Path) -> None:
    config = settings(precision="bfloat16")
    result = train(lru(), dataset_of(), config, folder=tmp_path, validate=score)
    assert stored_precision(tmp_path) == "bfloat16"
    assert all(math.isfinite(record["loss"]) for record in result.history)
    wide = train(lru(), dataset_of(), settings(), validate=score)
    assert result.history[0]["loss"] == pytest.approx(wide.history[0]["loss"], rel=0.02)
    assert result.history[0]["loss"] != wide.history[0]["loss"]


def with_large_biases() -> LRU:
    """A model whose scores differ by less than bfloat16 can tell at their size."""
    model = lru()
    with torch.no_grad():
        model.item_bias.fill_(1000.0)
        model.item_bias[:3] = 1001.9
    return model


def test_narrow_products_that_differ_are_not_used(tmp_path: Path) -> None:
    config = settings(precision="bfloat16")
    model = with_large_biases()
    expected = outcome(model, train(model, dataset_of(), config, validate=score, folder=tmp_path))
    assert stored_precision(tmp_path) == "float32"
    # and what the first batch has decided holds after a resume
    resumed = interrupted_then_resumed(config, 2, tmp_path / "resumed", with_large_biases())
    assert same(resumed, expected)


def test_counting_models_see_every_event_and_pair_once() -> None:
    items = [EVENTS.items[EVENTS.user_slice(row)].tolist() for row in range(EVENTS.num_users)]
    pairs = sorted(a * ITEMS + b for history in items for a, b in pairwise(history))
    for budget in (1, 2, 16, 1000):
        markov = Markov(MarkovConfig(num_items=ITEMS))
        train(markov, dataset_of(), settings(batch_events=budget))
        found = markov.pairs.repeat_interleave(markov.pair_counts.long())
        assert found.tolist() == pairs
        popularity = Popularity(PopularityConfig(num_items=ITEMS))
        train(popularity, dataset_of(), settings(batch_events=budget))
        counts = np.bincount(EVENTS.items, minlength=ITEMS).tolist()
        assert popularity.counts.tolist() == markov.popularity.tolist() == counts
        assert not popularity.training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_parameters_change(value: float) -> None:
    model = lru()
    with torch.no_grad():
        model.item_bias[3] = value
    before = model.items.ids.weight.detach().clone()
    with pytest.raises(ValueError, match=r"epoch 1, batch 1.*lower lr or use precision float32"):
        train(model, dataset_of(), settings())
    assert torch.equal(model.items.ids.weight, before)


def test_gradients_left_behind_do_not_count() -> None:
    clean, dirty = lru(), lru()
    for parameter in dirty.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    train(clean, dataset_of(), settings())
    train(dirty, dataset_of(), settings())
    assert torch.equal(clean.start, dirty.start)


def test_an_update_in_micro_batches_is_the_update_of_the_whole() -> None:
    events = log_of([16] * 8)
    models = [lru(dropout=0.0), lru(dropout=0.0)]
    for model, size in zip(models, (64, 16), strict=True):
        train(model, dataset_of(events), settings(batch_events=64, micro_batch_events=size))
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_state_is_carried_where_a_history_is_cut() -> None:
    # one history, one pass, a rate too small to matter: the mean loss is that of the whole
    events = log_of([37])
    losses = [
        train(
            lru(dropout=0.0), dataset_of(events), settings(epochs=1, lr=1e-9, batch_events=n)
        ).history[0]["loss"]
        for n in (64, 10, 3, 1)
    ]
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-4)


class Watched(LRU):
    """Notes the users and the mode of every call that makes states."""

    calls: list[tuple[int, bool]]

    def encode(self, events: Batch, state: Any = None) -> Any:
        self.calls.append((events.num_users, self.training))
        return super().encode(events, state)

    def final_state(self, events: Batch, state: Any = None) -> Any:
        self.calls.append((events.num_users, self.training))
        return super().final_state(events, state)


def test_a_state_is_made_only_where_a_history_goes_on_and_without_dropout() -> None:
    model = Watched(lru().config)
    model.calls = []
    train(model, dataset_of(), settings(epochs=1))
    batches = list(dataset_of().batches(16, seed=0, epoch=0))
    assert 0 < sum(batch.continues for batch in batches) < len(batches)
    expected: list[tuple[int, bool]] = []
    for batch in batches:
        expected += [(1, False)] * batch.continues + [(batch.events.num_users, True)]
    assert model.calls == expected


def test_events_before_the_labels_are_read_and_not_counted() -> None:
    events = log_of([30, 30])
    segments = TrainSegments(
        np.array([0, 1]), np.array([0, 30]), np.array([30, 60]), np.array([25, 31])
    )
    data = Dataset(events, segments)
    whole_loss = train(lru(dropout=0.0), data, settings(epochs=1, lr=1e-9, batch_events=60))
    # some micro-batches have no label at all
    cut = train(lru(dropout=0.0), data, settings(epochs=1, lr=1e-9, batch_events=7))
    assert cut.history[0]["loss"] == pytest.approx(whole_loss.history[0]["loss"], rel=1e-4)


def test_nothing_to_learn_from_is_an_error() -> None:
    nothing = TrainSegments(*(np.zeros(0, dtype=np.int64) for _ in range(4)))
    with pytest.raises(ValueError, match="training part of the log is empty"):
        train(lru(), Dataset(EVENTS, nothing), settings())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (GRU4Rec, GRU4RecConfig(num_items=ITEMS, dim=6, hidden=6)),
        (SASRec, SASRecConfig(num_items=ITEMS, dim=8, heads=2, layers=1, window=12)),
        (HSTU, HSTUConfig(num_items=ITEMS, dim=8, window=12)),
        (PerSRec, PerSRecConfig(num_items=ITEMS, dim=8, segment=6, keep=2)),
        (
            PublishedPerSRecHSTU,
            PublishedPerSRecHSTUConfig(num_items=ITEMS, dim=8, placement=((6, 2),), recent=4),
        ),
    ],
    ids=["gru4rec", "sasrec", "hstu", "persrec", "persrec_paper"],
)
def test_other_models_learn_and_resume_too(
    kind: type[UserModel], config: Any, precision: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = kind(config)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    plan = settings(epochs=3, precision=precision, lr=0.01)
    result = train(model, dataset_of(), plan, validate=score, folder=tmp_path / "whole")
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(start)
    stopping = Stopping(EVENTS, whole_histories(EVENTS), 1)
    with pytest.raises(Interrupted):
        train(model, stopping, plan, validate=score, folder=tmp_path / "cut")
    model.load_state_dict(start)
    train(model, dataset_of(), plan, validate=score, folder=tmp_path / "cut", resume=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_model_learns_by_infonce(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[list[int]] = []

    draw = NegativeSampler.draw

    def recorded(sampler: NegativeSampler) -> Negatives:
        drawn = draw(sampler)
        draws.append(drawn.items.tolist())
        return drawn

    monkeypatch.setattr(NegativeSampler, "draw", recorded)
    result = train(
        lru(dropout=0.0), dataset_of(), settings(loss="infonce", negatives=5, epochs=30, lr=0.03)
    )
    assert result.history[-1]["loss"] < 0.7 * result.history[0]["loss"]
    # fresh for each micro-batch, at most so many, and every item as often as any other
    assert sum(a == b for a, b in pairwise(draws)) < len(draws) / 10
    assert max(map(len, draws)) <= 5
    share = np.bincount([item for drawn in draws for item in drawn], minlength=ITEMS) / len(draws)
    assert share == pytest.approx(1 - (1 - 1 / ITEMS) ** 5, abs=0.15)


def test_the_size_of_the_catalogue_chooses_the_loss() -> None:
    def run(**changes: Any) -> Tensor:
        model = lru()
        train(model, dataset_of(), settings(epochs=1, negatives=4, **changes))
        return model.items.ids.weight.detach()

    full, sampled = run(loss="full"), run(loss="sampled")
    assert not torch.equal(full, sampled)
    assert torch.equal(run(full_softmax_limit=ITEMS), full)
    assert torch.equal(run(full_softmax_limit=ITEMS - 1), sampled)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 0},
        {"batch_events": 0},
        {"lr": 0.0},
        {"patience": 0},
        {"validate_every": 0},
        {"warmup": 1.5},
        {"clip": -1.0},
        {"schedule": "linear"},
        {"loss": "nce"},
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        settings(**changes)
