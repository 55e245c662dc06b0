"""Errors on the command line speak of its options."""

import ast
from pathlib import Path

import everlong
from everlong.cli.words import WORDS, in_words_of_command_line


def texts_of_library() -> list[str]:
    """All parts of texts in the library that have no value between them."""
    package = Path(everlong.__file__).parent
    trees = [
        ast.parse(path.read_text())
        for path in package.rglob("*.py")
        if "cli" not in path.relative_to(package).parts
    ]
    return [
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]


def test_the_library_says_what_is_put_into_other_words() -> None:
    texts = texts_of_library()
    for said in WORDS:
        assert any(said in text for text in texts), said


def test_calls_are_commands() -> None:
    said = "trained with everlong.fit_ranker: expected"
    assert in_words_of_command_line(said) == "trained with everlong fit --task rank: expected"
