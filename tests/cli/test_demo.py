from pathlib import Path

import everlong
from everlong.cli.runs.demo import COUNTERS, DEMO, Contender, Demo, run_demo
from everlong.models.registry import config_class, load_model_class
from everlong.training.settings import TrainConfig

TINY = Demo(
    users=40,
    ours=Contender(
        label="ours",
        model="lru",
        architecture={"dim": 8, "channels": 8, "layers": 1},
        training={"epochs": 1, "batch_events": 2048},
    ),
    others=COUNTERS,
)


def test_every_stage_is_printed(tmp_path: Path) -> None:
    lines: list[str] = []
    run_demo(TINY, tmp_path, seed=1, say=lines.append)
    text = "\n".join(lines)
    for place in range(1, 6):
        assert f"{place}. " in text
    table = [line.split() for line in text.splitlines()]
    scores = {row[0]: float(row[1]) for row in table if row and row[0] in ("popularity", "markov")}
    # habits are what a Markov chain can learn
    assert scores["markov"] > scores["popularity"]
    assert "best possible" in text
    loaded = everlong.load(tmp_path / "model")
    size = f"{loaded.bytes_per_user.state:,}"
    assert f"Bytes of the state: {size} before, {size} after." in text
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "quality_by_history.png",
        "cost_by_history.png",
    }


def test_equal_seeds_give_equal_output(tmp_path: Path) -> None:
    told: list[list[str]] = []
    for run in ("a", "b"):
        lines: list[str] = []
        run_demo(TINY, tmp_path / run, seed=0, say=lines.append)
        # what is measured in seconds, and the folder, may differ
        told.append([x for x in lines if "ms for one" not in x and str(tmp_path) not in x])
    assert told[0] == told[1]


def test_the_settings_of_the_real_demo_exist() -> None:
    for contender in (DEMO.ours, *DEMO.others):
        config = config_class(load_model_class(contender.model))
        config(num_items=10, **contender.architecture)
        TrainConfig(**contender.training)
