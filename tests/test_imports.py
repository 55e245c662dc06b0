"""A folder imports only from those before it, and no modules form a circle."""

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import everlong

ROOT = Path(everlong.__file__).parent

ORDER = [
    *("system", "ops", "models", "data", "text", "inference", "training", "evaluation"),
    *(
        "recommender",
        "server.store",
        "server.engine",
        "server.http",
        "client",
        "testing",
        "cli.runs",
        "cli",
    ),
]
"""The folders in the order in which they may import each other."""

PUBLIC_FACE = {"__init__", "__main__"}


def imports(source: str, modules: Sequence[str]) -> Iterator[str]:
    """The modules of the package that a source imports, also inside functions and for types."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [
                name if name.removeprefix("everlong.") in modules else str(node.module)
                for name in whole
            ]
        else:
            continue
        yield from (n.removeprefix("everlong.") for n in names if n.startswith("everlong."))


def folder_of(module: str) -> str:
    """``server.store.log`` lies in ``server.store``, ``data.events`` in ``data``."""
    return module.rpartition(".")[0]


def arrows_back(sources: Mapping[str, str], order: Sequence[str]) -> list[str]:
    """Modules without a place in the order, and imports from a later folder: one line each."""
    found = []
    for module, source in sources.items():
        folder = folder_of(module)
        if folder not in order:
            found.append(f"{module} has no place in the order")
            continue
        for name in imports(source, list(sources)):
            other = folder_of(name) if name in sources else name
            if other in order and order.index(other) > order.index(folder):
                found.append(f"{module} imports {name}")
    return found


def circles(sources: Mapping[str, str]) -> list[str]:
    """The modules that are left when those without an import of a remaining one are taken away."""
    left = {module: set(imports(text, list(sources))) for module, text in sources.items()}
    while free := {module for module, names in left.items() if not names & left.keys()}:
        left = {module: names for module, names in left.items() if module not in free}
    return sorted(left)


def sources() -> dict[str, str]:
    """The source of every module below the root, by its dotted name."""
    paths = sorted(ROOT.rglob("*.py"))
    named = {".".join(p.relative_to(ROOT).with_suffix("").parts): p.read_text() for p in paths}
    return {name.removesuffix(".__init__"): text for name, text in named.items()}


def modules() -> dict[str, str]:
    """The modules that the order holds for: all but the public face and the folders themselves."""
    folders = {*ORDER, "server"}
    return {n: t for n, t in sources().items() if n not in PUBLIC_FACE | folders - {"testing"}}


def test_the_root_holds_the_public_face_and_folders_alone() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == PUBLIC_FACE
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == {name.partition(".")[0] for name in ORDER}


def test_imports_point_one_way() -> None:
    named = {f"{n}.__init__" if n == "testing" else n: text for n, text in modules().items()}
    assert arrows_back(named, ORDER) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles(modules()) == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from everlong.training.loop import run", ["data.split imports training.loop"]),
        ("import everlong.training.loop", ["data.split imports training.loop"]),
        ("from everlong.training import loop", ["data.split imports training.loop"]),
        ("def late():\n    import everlong.training.loop", ["data.split imports training.loop"]),
        (
            "if TYPE_CHECKING:\n    from everlong.training.loop import run",
            ["data.split imports training.loop"],
        ),
        ("from everlong.models.state import State", []),
        ("import json", []),
        ("from everlong import __version__", []),
    ],
)
def test_an_arrow_back_is_found(source: str, expected: list[str]) -> None:
    tree = {"models.state": "", "data.split": source, "training.loop": ""}
    assert arrows_back(tree, ["models", "data", "training"]) == expected


def test_an_arrow_back_inside_the_server_is_found() -> None:
    tree = {
        "server.store.log": "from everlong.server.http.app import make",
        "server.http.app": "from everlong.server.store.log import EventLog",
    }
    assert arrows_back(tree, ORDER) == ["server.store.log imports server.http.app"]
    assert circles(tree) == ["server.http.app", "server.store.log"]


def test_a_module_without_a_place_is_found() -> None:
    assert arrows_back({"novel": ""}, ["data"]) == ["novel has no place in the order"]


def test_models_import_neither_files_nor_ids() -> None:
    inside = {name: text for name, text in modules().items() if name.startswith("models.")}
    used = {folder_of(name) for text in inside.values() for name in imports(text, list(modules()))}
    assert used <= {"models", "ops", "system"}
