"""Imports point one way: a module may import only from those before it in this list."""

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

import everlong

ROOT = Path(everlong.__file__).parent

# modules of one line may not import each other unless they are in that order
LAYERS = """
    atomic interrupt clock table state batch model config progress provenance
    ids events index audit items sources
    text encoders vector_cache item_text
    split dataset requests encode
    ops models pretrained
    losses checkpoint train train_jointly
    topk metrics evaluate
    ranking_losses ranking train_ranker
    users folder card two_stage recommender pipeline ranking_pipeline
    report plots testing bench demo fitting
    service client
    cli __main__
"""
ORDER = LAYERS.split()


def imports(source: str) -> Iterator[str]:
    """Modules of the package that a source imports when it runs, first name after ``everlong``."""
    tree = ast.parse(source)
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("everlong."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            parts = (node.module or "").split(".")
            if parts == ["everlong"]:
                yield from (alias.name for alias in node.names)
            elif parts[0] == "everlong":
                yield parts[1]


def violations(sources: Mapping[str, str], order: Sequence[str]) -> list[str]:
    """What is wrong with sources, by module: one line each."""
    found = []
    for module, source in sources.items():
        if module not in order:
            found.append(f"{module} has no place in the order")
            continue
        for name in imports(source):
            # a package imports its own parts, and anybody the version
            if name in (module, "__version__"):
                continue
            if name not in order[: order.index(module)]:
                found.append(f"{module} imports {name}")
    return found


def sources() -> dict[str, str]:
    """The source of every module; the files of a package count as one."""
    texts: dict[str, str] = {}
    for path in sorted(ROOT.rglob("*.py")):
        module = path.relative_to(ROOT).with_suffix("").parts[0]
        if module != "__init__":
            texts[module] = texts.get(module, "") + path.read_text().replace(
                "from __future__ import annotations\n", ""
            )
    return texts


def test_imports_point_one_way() -> None:
    assert violations(sources(), ORDER) == []


def test_every_name_of_the_order_exists() -> None:
    assert set(ORDER) == set(sources())
    assert len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from everlong.train import train", ["model imports train"]),
        ("import everlong.train", ["model imports train"]),
        ("from everlong import train", ["model imports train"]),
        ("def late():\n    from everlong.train import train", ["model imports train"]),
        ("from everlong.state import State", []),
        ("import json", []),
        ("if TYPE_CHECKING:\n    from everlong.train import train", []),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import everlong.train", ["model imports train"]),
    ],
)
def test_a_wrong_import_is_found(source: str, expected: list[str]) -> None:
    assert violations({"model": source}, ["state", "model", "train"]) == expected


def test_a_module_without_a_place_is_found() -> None:
    assert violations({"novel": ""}, ["state"]) == ["novel has no place in the order"]


def test_models_never_meet_files_or_ids() -> None:
    models = set(
        imports(
            "\n".join(p.read_text() for p in (ROOT / "models").glob("*.py")).replace(
                "from __future__ import annotations\n", ""
            )
        )
    )
    assert models <= {"batch", "model", "models", "ops", "state"}
