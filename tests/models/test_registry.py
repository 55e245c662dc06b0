from __future__ import annotations

import dataclasses
import subprocess
import sys

import numba
import pytest
import torch
from tests.forms import slow

from everlong.models import state as states
from everlong.models.batch import Batch
from everlong.models.item_vectors import item_vectors
from everlong.models.registry import (
    BUILTIN,
    built_in_names,
    config_class,
    import_path,
    load_model_class,
    model_name,
    stored_model_class,
)
from everlong.models.user_model import CountingModel, UserModel
from everlong.testing import check_model

ITEMS = 20
NAMES = built_in_names("next_item")
SMALL = {
    "dim": 8,
    "hidden": 6,
    "channels": 5,
    "layers": 2,
    "heads": 2,
    "window": 16,
    "segment": 8,
    "keep": 3,
    "placement": ((6, 2),),
    "recent": 5,
}
EXEMPT = {
    "sasrec": {2, 7},
    "persrec_paper": {2, 3, 4, 7},
    "persrec_paper_hllm": {2, 3, 4, 7},
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads(), numba.get_num_threads()
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    yield
    torch.set_num_threads(threads[0])
    numba.set_num_threads(threads[1])


def config_fields(name: str) -> set[str]:
    return {f.name for f in dataclasses.fields(config_class(load_model_class(name)))}


def small(name: str, **settings: object) -> UserModel:
    model_class = load_model_class(name)
    config = config_class(model_class)
    sizes = {key: SMALL[key] for key in config_fields(name) & set(SMALL)}
    torch.manual_seed(0)
    model = model_class(config(num_items=ITEMS, **sizes, **settings))
    if isinstance(model, CountingModel):
        histories = torch.randint(ITEMS, (30, 10)).tolist()
        model.observe(Batch.from_histories(histories))
    return model


@pytest.mark.parametrize("dtype", [torch.float64, slow(torch.float32)])
@pytest.mark.parametrize("name", NAMES)
def test_every_model_keeps_the_laws(name: str, dtype: torch.dtype) -> None:
    model = small(name)
    report = check_model(model, num_users=6, dtype=dtype)
    assert set(report.kept) | set(report.exempt) == set(range(1, 8))
    assert set(report.exempt) == EXEMPT.get(name, set())


@pytest.mark.parametrize("name", NAMES)
def test_after_50_000_events_the_state_is_as_large_as_before(name: str) -> None:
    model = small(name).eval()
    items = torch.randint(ITEMS, (50_000,))
    batch = Batch(items=items, times=torch.arange(50_000), offsets=torch.tensor([0, 50_000]))
    initial = model.initial_state(1)
    with torch.no_grad():
        _, state = model.encode(batch, initial)
    states.check_same(initial, state)
    assert torch.isfinite(model.score(state)).all()


@pytest.mark.parametrize("name", NAMES)
def test_models_are_made_from_a_frozen_config(name: str) -> None:
    model = small(name)
    assert isinstance(model.config, config_class(type(model)))
    assert model.config.num_items == model.num_items == ITEMS
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.config.num_items = 3
    with pytest.raises(TypeError):
        config_class(type(model))(ITEMS)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown model 'SASRecs': did you mean 'sasrec'"):
        load_model_class("SASRecs")
    with pytest.raises(ValueError, match="Valid names: popularity"):
        load_model_class("zzz")
    with pytest.raises(ValueError, match=r"did you mean 'ifa'.*: ifa, target_attention;"):
        load_model_class("iffa", "rank")


@pytest.mark.parametrize("name", BUILTIN)
def test_built_in_models_are_what_the_registry_says(name: str) -> None:
    kind = load_model_class(name, None)
    assert kind.task == BUILTIN[name].task
    assert model_name(kind) == name
    assert stored_model_class(name, None) is kind


def test_a_model_of_another_task_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"'ifa' ranks candidates .* expected .* such as popularity"
    ):
        load_model_class("ifa")
    with pytest.raises(ValueError, match=r"'lru' predicts next items.* such as ifa"):
        stored_model_class("lru", "rank")
    with pytest.raises(ValueError, match="'ifa' ranks candidates"):
        load_model_class("everlong.models.ifa:IFA")


OWN = """
from everlong.models.gru4rec import GRU4Rec

class Mine(GRU4Rec):
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module that no test has imported yet."""
    module = f"own_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{module}.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield module
    sys.modules.pop(module, None)


def test_a_class_of_ones_own_is_found_by_its_path(own: str) -> None:
    kind = load_model_class(f"{own}:Mine")
    assert model_name(kind) == import_path(kind) == f"{own}:Mine"
    assert load_model_class(kind) is stored_model_class(f"{own}:Mine") is kind


def test_what_is_stored_has_nothing_imported(own: str) -> None:
    with pytest.raises(ValueError, match=f"--allow {own}:Mine"):
        stored_model_class(f"{own}:Mine")
    assert own not in sys.modules


def test_an_entry_point_is_a_name(own: str, tmp_path) -> None:
    facts = tmp_path / "own_models-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: own-models\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[everlong.models]\nmine_{own} = {own}:Mine\n")
    assert model_name(load_model_class(f"mine_{own}")) == f"{own}:Mine"
    with pytest.raises(ValueError, match=f"did you mean 'mine_{own}'"):
        load_model_class(f"mime_{own}")
    (facts / "entry_points.txt").write_text(f"[everlong.models]\nlru = {own}:Mine\n")
    assert load_model_class("lru").__name__ == "LRU"


def test_a_path_that_leads_nowhere_says_where_it_ends(own: str) -> None:
    with pytest.raises(ValueError, match="did you mean 'Mine'"):
        load_model_class(f"{own}:Mime")
    with pytest.raises(ValueError, match="no module 'not_there_at_all'"):
        load_model_class("not_there_at_all:Mine")
    with pytest.raises(ValueError, match=r"expected an import path package\.module:Class"):
        load_model_class(":Mine")
    with pytest.raises(TypeError, match=r"inherits everlong\.models\.user_model\.UserModel"):
        load_model_class("json:JSONDecoder")


def test_a_class_of_a_script_has_the_name_of_its_file(own: str, tmp_path) -> None:
    (tmp_path / "script.py").write_text(
        OWN + "from everlong.models.registry import model_name\nprint(model_name(Mine))"
    )
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "script:Mine"


def test_a_constructor_without_a_config_is_named() -> None:
    class Bare(UserModel):
        def __init__(self) -> None:
            super().__init__(1)

    with pytest.raises(TypeError, match=r"Bare\.__init__"):
        config_class(Bare)


VECTORS = [name for name in NAMES if "vectors" in config_fields(name)]


@pytest.mark.parametrize("ids", [True, False])
@pytest.mark.parametrize("name", VECTORS)
def test_narrow_products_leave_states_as_they_are(name: str, ids: bool) -> None:
    model = small(name, vectors=6, ids=ids)
    items = item_vectors(model)
    assert items is not None
    items.fill(torch.randn(ITEMS, 6))
    batch = Batch.from_histories([[1, 2, 3] * 20, [], [4]])
    with torch.autocast("cpu", torch.bfloat16):
        outputs, state = model.encode(batch)
        trained = model(batch, state)
        state = model.final_state(batch, state)
        one = Batch.one_event_each(torch.tensor([1, 2, 3]), torch.tensor([7, 7, 7]))
        state = model.step(one, state)
        scores = model.score(state)
    assert all(v.dtype == torch.float32 for v in state if v.is_floating_point())
    assert all(bool(torch.isfinite(values).all()) for values in (outputs, trained, scores))


@pytest.mark.parametrize("name", VECTORS)
def test_the_head_of_some_items_is_that_of_all(name: str) -> None:
    model = small(name, vectors=6).double()
    found = item_vectors(model)
    assert found is not None
    found.fill(torch.randn(ITEMS, 6))
    items = torch.tensor([3, 0, 3, ITEMS - 1])
    whole, some = model.item_embeddings(), model.embeddings_of(items)
    torch.testing.assert_close(some.weight, whole.weight[items])
    torch.testing.assert_close(some.bias, whole.bias[items])
