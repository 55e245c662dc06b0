import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner, Result

import everlong
from everlong.cli.app import app
from everlong.cli.options import pairs
from everlong.data.synthetic import demo_log, exposures

SMALL = [
    *("--set", "dim=8", "--set", "channels=8", "--set", "layers=1"),
    *("--train", "batch_events=512", "--train", "precision=float32"),
]
EVERLONG = [sys.executable, "-c", "from everlong.cli.app import app; app()"]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVERLONG_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log") / "log.parquet"
    demo_log(0, num_users=30).frame.write_parquet(path)
    return path


@pytest.fixture(scope="module")
def fitted(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder that the command line made, with what it printed beside."""
    folder = tmp_path_factory.mktemp("fitted") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERLONG_CACHE", str(folder.parent / "cache"))
        result = run(
            *("fit", log, "--out", folder, "--protocol", "paper", "--train", "epochs=2"),
            *("--split", "window=none", "--baselines", *SMALL),
        )
    assert result.exit_code == 0, result.stderr
    (folder.parent / "printed").write_text(result.stdout)
    return folder


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def refused(*words: object) -> str:
    """The one line of a command that must end as a mistake of the user."""
    result = run(*words)
    assert result.exit_code == 2, (result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    (line,) = [text for text in result.stderr.splitlines() if text.startswith("error: ")]
    return line


def test_fit_prints_results_beside_baselines_and_writes_all_files(fitted: Path) -> None:
    printed = (fitted.parent / "printed").read_text()
    for word in ("test: ", "validation: ", "popularity", "recent_popularity", "markov", "NDCG@10"):
        assert word in printed
    assert {path.name for path in (fitted.parent / "model.run").iterdir()} == {
        "train.jsonl",
        "learning_curve.png",
        "quality_by_history.png",
    }
    recommender = everlong.load(fitted)
    assert recommender.origin.protocol.window is None
    assert recommender.origin.train.epochs == 2
    assert recommender.model.config.dim == 8


def test_evaluate_repeats_what_fit_measured(fitted: Path, log: Path, tmp_path: Path) -> None:
    result = run("evaluate", fitted, log, "--json", tmp_path / "deep" / "result.json")
    assert result.exit_code == 0, result.stderr
    assert "history (events)" in result.stdout
    record = json.loads((tmp_path / "deep" / "result.json").read_text())
    stored = everlong.load(fitted).origin.metrics["test"]
    assert record["metrics"] == stored["metrics"]
    assert record["protocol"]["name"] == "paper"
    assert run("evaluate", fitted, log, "--part", "validation").exit_code == 0


def test_fit_takes_vectors_of_items(log: Path, tmp_path: Path) -> None:
    out, items = tmp_path / "model", tmp_path / "items.parquet"
    ids = pl.read_parquet(log)["item_id"].unique(maintain_order=True)
    random = np.random.default_rng(0)
    columns = {name: random.normal(size=(len(ids), n)).tolist() for name, n in (("a", 2), ("b", 3))}
    pl.DataFrame({"item_id": ids, **columns}).write_parquet(items)
    fit = ("fit", log, "--out", out, "--protocol", "paper", "--train", "epochs=1", *SMALL)
    result = run(*fit, "--items", items, "--vectors", "b", "--vectors", "a", "--set", "ids=false")
    assert result.exit_code == 0, result.stderr
    config = everlong.load(out).model.config
    assert (config.vectors, config.ids) == (5, False)
    assert everlong.load(out).origin.data["item_vectors"] == {"a": 2, "b": 3}

    assert "--items and --vectors or --categories go together" in refused(*fit, "--items", items)
    assert "--items and --vectors or --categories go together" in refused(*fit, "--vectors", "a")
    assert "no file at" in refused(*fit, "--items", tmp_path / "none", "--vectors", "a")
    assert "no column 'c'" in refused(*fit, "--items", items, "--vectors", "c")


def test_recommend_prints_the_users_own_ids(fitted: Path, tmp_path: Path) -> None:
    result = run("recommend", fitted, "--user", 3, "--user", 4, "-k", 2, "--json", tmp_path / "r")
    assert result.exit_code == 0, result.stderr
    expected = everlong.load(fitted).recommend([3, 4], k=2)
    assert pl.DataFrame(json.loads((tmp_path / "r").read_text()))["item_id"].equals(
        expected["item_id"]
    )
    for item in expected["item_id"]:
        assert item in result.stdout


def test_recommend_reads_histories(fitted: Path) -> None:
    history = "item-001, item-002,evening"
    expected = everlong.load(fitted).recommend({"x": ["item-001", "item-002", "evening"]}, k=3)
    result = run("recommend", fitted, "--history", history, "-k", 3)
    assert result.exit_code == 0, result.stderr
    for item in expected["item_id"]:
        assert item in result.stdout
    seen = run("recommend", fitted, "--history", history, "-k", 500, "--keep-seen")
    assert "evening " in seen.stdout.replace(history, "")


def test_data_audit_prints_statistics_and_data_cache_writes_a_cache(
    log: Path, tmp_path: Path
) -> None:
    printed = run("data", "audit", log).stdout
    assert "30 users" in printed
    assert "id order" in printed
    index = tmp_path / "index"
    assert "30 users" in run("data", "cache", log, index).stdout
    # an index is a log
    assert run("data", "audit", index).stdout.splitlines()[:6] == printed.splitlines()[:6]
    assert "exists already" in refused("data", "cache", log, index)


def test_bench_prints_and_writes_its_measurements(tmp_path: Path) -> None:
    result = run("bench", "--items", 50, "--seconds", 0.02, "--json", tmp_path / "bench.json")
    assert result.exit_code == 0, result.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    assert [(s["work"], s["batch"]) for s in record["speeds"]] == [
        ("step", 1),
        ("step", 64),
        ("step", 256),
        ("encode", 8192),
        ("train", 8192),
    ]
    assert all(speed["events_per_second"] > 0 for speed in record["speeds"])
    assert record["hardware"]["processor"]
    assert "2,304 bytes per user" in result.stdout
    assert "expected num_items >= 1" in refused("bench", "--items", 0)


def test_every_user_error_is_one_line(fitted: Path, log: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fit = ("fit", log, "--out", out)
    empty = tmp_path / "empty.csv"
    empty.write_text("user_id,item_id,timestamp\n")
    assert "no events" in refused("fit", empty, "--out", out)
    assert "no file at" in refused("fit", tmp_path / "nothing.csv", "--out", out)
    assert "no column 'person'" in refused(*fit, "--user-id", "person")
    assert "did you mean 'lru'" in refused(*fit, "--model", "lur")
    assert "did you mean 'dim'" in refused(*fit, "--set", "dmi=8")
    assert "did you mean 'epochs'" in refused(*fit, "--train", "epcohs=8")
    assert "--set: expected name=value" in refused(*fit, "--set", "dim")
    assert "unknown protocol" in refused(*fit, "--protocol", "papre")
    assert "did you mean 'window'" in refused(*fit, "--split", "windo=3")
    assert "holds other files" in refused("fit", log, "--out", log.parent)
    assert "no model folder" in refused("evaluate", tmp_path / "nothing", log)
    assert "is not the one" in refused("evaluate", fitted, log, "--timestamp", "")
    assert "either --user or --history" in refused("recommend", fitted)
    assert "users are unknown" in refused("recommend", fitted, "--user", "123456")
    assert "expected ids of type Int64" in refused("recommend", fitted, "--user", "me")
    assert "not in the catalogue" in refused("recommend", fitted, "--history", "nothing")
    assert "k >= 1" in refused("recommend", fitted, "--user", "1", "-k", "0")
    assert not out.exists()


def test_a_damaged_model_is_an_error_of_one_line(fitted: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(fitted, broken)
    (broken / "model.safetensors").write_bytes(b"")
    assert "was cut or changed" in refused("recommend", broken, "--user", "1")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("--debug", "evaluate", tmp_path / "nothing", tmp_path)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_settings_are_name_and_value() -> None:
    assert pairs("--set", ["a=1", " b = x=y ", "c=none"]) == {"a": "1", "b": "x=y", "c": None}
    assert pairs("--set", None) == {}
    with pytest.raises(ValueError, match="received two; give it once"):
        pairs("--set", ["a=1", "a=2"])


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import everlong.cli.app, sys; print([m for m in ('torch', 'polars') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert run("--version").stdout.strip() == everlong.__version__


def fit_words(log: Path, out: Path, *more: str) -> list[str]:
    # long enough that it is not over when a signal comes
    epochs = ("--train", "epochs=30", "--train", "patience=30")
    return ["fit", str(log), "--out", str(out), "--protocol", "paper", *SMALL, *epochs, *more]


def start_fit(log: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*EVERLONG, *fit_words(log, out, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # the bits are equal on the same number of threads: the tests themselves have one
        env={**os.environ, "NUMBA_NUM_THREADS": "1"},
    )


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if word in line:
            return
    raise AssertionError(f"ended before {word!r}")


def assert_same_model(a: Path, b: Path) -> None:
    for name in ("model.safetensors", "users.safetensors", "users.parquet", "items.parquet"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.fixture(scope="module")
def whole(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of a run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "model"
    result = run(*fit_words(log, out))
    assert result.exit_code == 0, result.stderr
    return out


@pytest.mark.skipif(os.name != "posix", reason="signals are sent")
def test_ctrl_c_stops_a_fit_and_it_resumes_to_the_same_bits(
    log: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "cut"
    process = start_fit(log, out)
    wait_for(process, "epoch 1:")
    assert "an unfinished run is in" in refused("fit", log, "--out", out)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "interrupted: stopped at epoch" in errors
    assert "--resume continues it" in errors
    assert "Traceback" not in errors
    assert not out.exists()

    with caplog.at_level("INFO", "everlong"):
        result = run(*fit_words(log, out, "--resume"))
    assert result.exit_code == 0, result.stderr
    assert "resumed at epoch" in caplog.text
    assert_same_model(out, whole)


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals are sent")
def test_a_killed_fit_resumes_to_the_same_bits(log: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "cut"
    process = start_fit(log, out)
    for word in ("epoch 3:", "epoch 7:"):
        wait_for(process, word)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not out.exists()
        process = start_fit(log, out, "--resume")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "resumed at epoch" in errors
    assert_same_model(out, whole)


@pytest.fixture(scope="module")
def exposure_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exposures") / "log.parquet"
    exposures(num_users=60, num_items=40, seed=3).frame.write_parquet(path)
    return path


@pytest.fixture(scope="module")
def ranked(exposure_log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a ranker behind a retriever, with what was printed beside."""
    folder = tmp_path_factory.mktemp("ranked") / "both"
    retriever = folder.parent / "retriever"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EVERLONG_CACHE", str(folder.parent / "cache"))
        result = run("fit", exposure_log, "--out", retriever, "--train", "epochs=1", *SMALL)
        assert result.exit_code == 0, result.stderr
        result = run(
            *("fit", exposure_log, "--task", "rank", "--retriever", retriever, "--out", folder),
            *("--set", 'fields=[["outcome", 2]]', "--set", "dim=16", "--set", "window=4"),
            *("--train", "epochs=2", "--train", "batch_size=1024", "--candidates", "12"),
        )
    assert result.exit_code == 0, result.stderr
    (folder.parent / "printed").write_text(result.stdout)
    return folder


def test_a_ranker_is_fitted_and_evaluated(exposure_log: Path, ranked: Path, tmp_path: Path) -> None:
    printed = (ranked.parent / "printed").read_text()
    assert "ranking: " in printed
    assert "GAUC" in printed
    assert "GAUC" in (ranked / "README.md").read_text()
    made = {path.name for path in (ranked.parent / "both.run").iterdir()}
    assert made == {"train.jsonl", "learning_curve.png"}
    recommender = everlong.load(ranked)
    assert recommender.model.config.candidates == 12
    result = run("evaluate", ranked, exposure_log, "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.stderr
    assert "targets of" in result.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    stored = recommender.origin.metrics["ranking"]["metrics"]
    assert found["ranking"]["metrics"] == stored
    # the list of both stages, not that of the retriever
    events = everlong.read_events(exposure_log, fields=["outcome"])
    assert found["metrics"] == recommender.evaluate(events).as_dict()["metrics"]
    one, other = (
        run("evaluate", ranked, exposure_log, "--part", part).stdout
        for part in ("test", "validation")
    )
    assert one != other


def test_options_of_another_task_are_refused(log: Path, fitted: Path, tmp_path: Path) -> None:
    words = ("fit", log, "--out", tmp_path / "model")
    assert "--label goes with --task rank" in refused(*words, "--label", "liked")
    rank = (*words, "--task", "rank")
    assert "expected --retriever and a model folder" in refused(*rank)
    rank = (*rank, "--retriever", fitted)
    assert "--baselines goes with --task next-item" in refused(*rank, "--baselines")
    assert "everlong fit --task next-item" in refused(*rank, "--model", "lru")
    assert "everlong fit --task rank" in refused(*words, "--model", "ifa")
    assert "unknown setting 'windows'" in refused(*rank, "--set", "windows=3")
    assert "no column 'liked'" in refused(*rank, "--label", "liked")


def test_errors_of_recommend_speak_of_its_options(fitted: Path) -> None:
    line = refused("recommend", fitted, "--user", "123456789")
    assert "--history" in line
    assert "update()" not in line
