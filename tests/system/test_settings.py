from dataclasses import dataclass
from typing import Literal

import pytest

from everlong.models.lru import LRUConfig
from everlong.system.settings import Settings, load_settings, unknown
from everlong.training.settings import TrainConfig


class Knobs(Settings):
    size: int = 3
    rate: float = 0.5
    kind: Literal["soft", "hard"] = "soft"
    on: bool = False


@dataclass(frozen=True, kw_only=True)
class Shape:
    width: int
    share: float = 0.1

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"expected width >= 1, received {self.width}")


@dataclass(frozen=True)
class Places:
    placement: tuple[tuple[int, int], ...] = ()
    name: str = ""


def test_lists_are_parsed_from_json() -> None:
    assert load_settings(Places, {"placement": "[[64, 4], [128, 2]]"}).placement == (
        (64, 4),
        (128, 2),
    )
    with pytest.raises(ValueError, match=r"placement: .* received '\[\[64'"):
        load_settings(Places, {"placement": "[[64"})
    assert load_settings(Places, {"name": "[a"}).name == "[a"


def test_values_and_defaults() -> None:
    knobs = load_settings(Knobs, {"size": 7})
    assert (type(knobs), knobs.size, knobs.rate) == (Knobs, 7, 0.5)
    shape = load_settings(Shape, {"width": 2})
    assert shape == Shape(width=2)


def test_numbers_are_parsed_from_text() -> None:
    knobs = load_settings(Knobs, {"size": "7", "rate": "1e-3", "on": "true", "kind": "hard"})
    assert (knobs.size, knobs.rate, knobs.on, knobs.kind) == (7, 1e-3, True, "hard")
    assert load_settings(Shape, {"width": "12", "share": "0.25"}) == Shape(width=12, share=0.25)


@pytest.mark.parametrize("kind", [Knobs, Shape])
def test_the_error_of_an_unknown_key_names_the_most_similar(kind: type) -> None:
    key, near = ("rat", "rate") if kind is Knobs else ("wdith", "width")
    with pytest.raises(
        ValueError, match=f"unknown setting '{key}' of {kind.__name__}: did you mean"
    ):
        load_settings(kind, {key: 1})
    assert f"did you mean '{near}'?" in unknown("setting", key, ["rate", "width"])


def test_the_error_of_a_dissimilar_key_lists_all() -> None:
    text = unknown("setting", "zzzz", ["rate", "kind"])
    assert text == "unknown setting 'zzzz': Valid names: kind, rate"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": "many"}, "size: .*integer.*received 'many'"),
        ({"size": 2.5}, r"size: .*integer.*received 2\.5"),
        ({"size": None}, "size: .*received None"),
        ({"rate": [1]}, r"rate: .*number.*received \[1\]"),
        ({"kind": "mild"}, "kind: .*'soft' or 'hard'.*received 'mild'"),
        ({"size": "x", "rate": "y"}, "size: .*; rate: "),
    ],
)
def test_the_error_of_an_invalid_value_names_it(values: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=f"^Knobs: {words}"):
        load_settings(Knobs, values)


def test_rules_of_a_dataclass_hold() -> None:
    with pytest.raises(ValueError, match=r"Shape: .*width >= 1, received 0"):
        load_settings(Shape, {"width": 0})
    with pytest.raises(ValueError, match=r"Shape: width: .*required"):
        load_settings(Shape, {})


def test_settings_cannot_be_changed_or_misspelt() -> None:
    knobs = Knobs()
    with pytest.raises(ValueError, match="frozen"):
        knobs.size = 4  # type: ignore[misc]
    with pytest.raises(ValueError, match="Extra inputs are not permitted"):
        Knobs.model_validate({"sise": 4})


def test_the_settings_of_the_library_load_strictly() -> None:
    config = load_settings(LRUConfig, {"num_items": "10", "dim": "8", "max_radius": "0.999"})
    assert (config.num_items, config.dim, config.max_radius) == (10, 8, 0.999)
    with pytest.raises(ValueError, match="did you mean 'max_radius'"):
        load_settings(LRUConfig, {"num_items": 10, "max_radus": 0.9})
    with pytest.raises(ValueError, match="min_radius < max_radius"):
        load_settings(LRUConfig, {"num_items": 10, "max_radius": 1.0})
    with pytest.raises(ValueError, match="did you mean 'weight_decay'"):
        load_settings(TrainConfig, {"weigth_decay": 0.1})
    with pytest.raises(ValueError, match=r"epochs: .*greater than 0"):
        load_settings(TrainConfig, {"epochs": 0})
