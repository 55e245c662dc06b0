"""What the documents say is run: their Python for real, their commands by name."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from everlong.cli.app import app
from everlong.data.synthetic import demo_log
from everlong.models.registry import (
    BUILTIN,
    config_class,
    load_model_class,
)
from everlong.models.state import bytes_per_user
from everlong.training.settings import TrainConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


def commands(path: Path) -> list[list[str]]:
    """Every ``everlong ...`` line of a document's shell blocks, as words."""
    lines = "\n".join(blocks(path, "sh")).splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("everlong ")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_runs(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    # those of the client need a service: test_client.py has one
    found = [] if path.name == "client.md" else blocks(path, "python")
    for place, code in enumerate(found):
        exec(compile(code, f"{path.name}:{place}", "exec"), names)
    if path.name == "README.md":
        printed = capsys.readouterr().out
        assert "new user" in printed
        assert "bytes per user" in printed
        assert (tmp_path / "model" / "config.json").is_file()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_exist(path: Path) -> None:
    # click parses the words and stops before anything runs
    root = get_command(app)
    for words in commands(path):
        group, name = root, words.pop(0)
        while hasattr(group, "commands"):
            assert name in group.commands, f"no command {name!r}"
            group = group.commands[name]
            if hasattr(group, "commands"):
                name = words.pop(0)
        group.make_context(name, words)


def test_the_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EVERLONG_CACHE", str(tmp_path / "cache"))
    demo_log(0, num_users=50).frame.write_parquet("log.parquet")
    found = commands(ROOT / "README.md")
    assert len(found) == 5
    for words in found:
        if words[0] == "fit":
            words += ["--train", "batch_events=2048", "--protocol", "paper"]
            words[words.index("epochs=30")] = "epochs=1"
        if words[0] == "bench":
            words += ["--seconds", "0.01", "--items", "100"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (words, result.stderr)
        assert result.stdout


def test_links_lead_somewhere() -> None:
    for path in [*DOCUMENTS, ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_training_defaults_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    documented: dict[str, str] = {}
    for names, values in re.findall(r"^\| (`.*?) \| (.*?) \|", text, re.MULTILINE):
        documented |= zip(names.split(", "), values.split(", "), strict=True)
    assert {name.strip("`"): value.strip("`") for name, value in documented.items()} == {
        name: str(value) for name, value in TrainConfig().model_dump().items()
    }


def script(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def test_the_example_passes_its_own_check(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = script(ROOT / "examples" / "add_a_model.py", monkeypatch).main()
    assert "7 trained = served: kept" in capsys.readouterr().out
    # chance is 1 in 20; the best is about 1 in 2
    assert result.metrics["HitRate@1"].mean > 0.3


def test_the_tables_are_what_the_records_say(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = script(ROOT / "benchmarks" / "tables.py", monkeypatch)
    runs = tables.read_records(tables.RECORDS)
    readme = (ROOT / "README.md").read_text()
    assert tables.insert(readme, tables.short_table(runs)) == readme
    results = (ROOT / "docs" / "results.md").read_text()
    assert tables.insert(results, tables.long_table(runs)) == results


def test_the_table_of_models_is_complete_and_true() -> None:
    rows = re.findall(
        r"^\| (`.*`) \|.*\| ([\d,]+) \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    stated = {
        name: int(size.replace(",", ""))
        for names, size in rows
        for name in re.findall("`(.*?)`", names)
    }
    sizes = {}
    for name in BUILTIN:
        kind = load_model_class(name, None)
        state = kind(config_class(kind)(num_items=10)).initial_state(1)  # type: ignore[arg-type]
        sizes[name] = bytes_per_user(state)
    assert stated == sizes
