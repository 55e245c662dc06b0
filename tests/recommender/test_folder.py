import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch

import everlong
from everlong.recommender.folder import CONFIG, FILES, FORMAT, check_target

ARCHITECTURE = {"dim": 4, "channels": 4, "layers": 1}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a model folder."""
    frame = pl.DataFrame(
        {
            "user_id": [user for user in range(6) for _ in range(5)],
            "item_id": [(user + place) % 7 for user in range(6) for place in range(5)],
            "timestamp": [1_700_000_000 + place for _ in range(6) for place in range(5)],
        }
    )
    recommender = everlong.fit(
        frame, "lru", architecture=ARCHITECTURE, training={"epochs": 1}, protocol="paper"
    )
    folder = tmp_path_factory.mktemp("folder") / "model"
    recommender.save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(written: dict[str, bytes], tmp_path: Path) -> Path:
    """A fresh copy of it."""
    path = tmp_path / "model"
    path.mkdir()
    for name, data in written.items():
        (path / name).write_bytes(data)
    return path


def test_the_folder_holds_what_it_promises(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {*FILES, CONFIG}
    config = json.loads((folder / CONFIG).read_text())
    assert config["model"] == "lru"
    assert config["architecture"]["num_items"] == 7
    assert config["protocol"]["name"] == "paper"
    assert config["versions"]["torch"] == torch.__version__
    assert len(config["data"]["fingerprint"]) == 64
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["test"]["protocol"] == config["protocol"]
    card = (folder / "README.md").read_text()
    assert "bytes per user" in card
    assert "NDCG@10" in card
    assert everlong.load(folder).recommend([3], k=2).height == 2


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_every_damaged_file_is_refused_by_name(
    folder: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(folder / name)
    with pytest.raises(ValueError, match=f"{name} (is missing|was cut or changed)"):
        everlong.load(folder)


def change(folder: Path, path: tuple[str, ...], value: object, *, signed: bool) -> None:
    """Changes a value of config.json; ``signed`` as another version would have written it."""
    config = json.loads((folder / CONFIG).read_text())
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    if signed:
        del config["digest"]
        text = json.dumps(config, sort_keys=True)
        config["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a model folder: config.json"),
        ("[]", "is not a model folder: config.json: expected a description with its format"),
        ('{"fromat": 1}', "config.json: expected a description with its format"),
        ('{"format": 1}', "config.json was changed: its digest does not fit"),
        ('{"format": "1"}', "expected the version of a model folder, from 1 to"),
        ('{"format": 0}', "expected the version of a model folder, from 1 to"),
    ],
)
def test_a_damaged_config_is_refused(folder: Path, text: str, message: str) -> None:
    (folder / CONFIG).write_text(text)
    with pytest.raises(ValueError, match=message):
        everlong.load(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), 99, f"of version 99; .* up to {FORMAT}: install everlong \\S+ or later"),
        (("time_unit",), "parsec", "config.json was changed: its digest does not fit"),
        (("architecture", "dropout"), 0.0, "config.json was changed: its digest does not fit"),
        (("files", "README.md", "bytes"), 1, "config.json was changed: its digest does not fit"),
    ],
)
def test_a_changed_config_is_refused(
    folder: Path, path: tuple[str, ...], value: object, message: str
) -> None:
    change(folder, path, value, signed=False)
    with pytest.raises(ValueError, match=message):
        everlong.load(folder)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model",), "lrux", "unknown model 'lrux'"),
        (("architecture", "dim"), 8, "weights and architecture do not fit"),
        (("architecture", "dmi"), 8, "did you mean 'dim'"),
        (("train", "epcohs"), 8, "did you mean 'epochs'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    folder: Path, path: tuple[str, ...], value: object, message: str
) -> None:
    change(folder, path, value, signed=True)
    with pytest.raises(ValueError, match=message):
        everlong.load(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        everlong.load(tmp_path / "nothing")


def test_saving_replaces_a_model_folder_whole(folder: Path) -> None:
    recommender = everlong.load(folder)
    (folder / "leftover").write_text("x")
    recommender.save(folder)
    assert {path.name for path in folder.iterdir()} == {*FILES, CONFIG}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_saving_never_replaces_anything_else(folder: Path, tmp_path: Path) -> None:
    recommender = everlong.load(folder)
    mine = tmp_path / "photos"
    mine.mkdir()
    check_target(mine)
    (mine / "cat.png").write_bytes(b"cat")
    with pytest.raises(ValueError, match="holds other files"):
        recommender.save(mine)
    with pytest.raises(ValueError, match="is a file"):
        recommender.save(mine / "cat.png")
    assert (mine / "cat.png").read_bytes() == b"cat"
