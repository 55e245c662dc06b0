"""Finds words that make persons of things, in code, names, tests and documents.

``python .ci/prose.py [PATH ...]`` prints each place with what to write instead, and fails if there
is one. A name counts as the words that it is made of.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATHS = ("src", "tests", "docs", "examples", "benchmarks", ".ci", "README.md", "CONTRIBUTING.md")
PATHS += ("CHANGELOG.md", "SECURITY.md", "Makefile", "Containerfile", "pyproject.toml")
KINDS = {".py", ".md", ".toml", ".html", ".js", ".css", ""}

PEOPLE = "authors?|customers?|developers?|maintainers?|newcomers?|operators?|people|persons?|users?"
"""After one of these ``who`` is about people."""
OF_PEOPLE = re.compile(rf"\b({PEOPLE}),?[\s#]*$", re.IGNORECASE)

BE = "am|is|are|was|were|be|been|being|gets?|got"
INSTEAD = {
    r"nobody": "no user, no process, nothing: name it",
    r"(some|any|every)body|(some|any|every)one else": "name the user, the process, the request",
    r"who(so)?ever|whom": "name the thing",
    r"who": "that, or name the thing",
    rf"({BE})( not| also| never)? told": "receives, reports, raises: say what happens",
    r"as told|told (so|alike|apart)": "say what is equal or reported",
    r"goes? before (who|what|those|all)": "runs at a higher priority than, precedes",
}
PATTERN = re.compile(
    "|".join(rf"(?P<w{n}>\b(?:{words})\b)" for n, words in enumerate(INSTEAD)), re.IGNORECASE
)


def found_in(text: str) -> Iterator[tuple[int, str, str]]:
    """The line, the words and what to write instead, for each place in a text."""
    # a name is read as words; its length stays, and with it the place
    text = text.replace("_", " ")
    for match in PATTERN.finditer(text):
        before = text[max(0, match.start() - 100) : match.start()]
        if match.group().lower() == "who" and OF_PEOPLE.search(before):
            continue
        number = int(str(match.lastgroup)[1:])
        yield text.count("\n", 0, match.end()) + 1, match.group(), list(INSTEAD.values())[number]


WORDS_OF_OTHERS = (
    "src/everlong/server/http/pages/swagger-ui",
    "tests/formats",
    "tests/test_formats.py",
)
"""A vendored viewer with its licence, and fixtures with the ids that version 1 has written."""


def files(paths: list[Path]) -> Iterator[Path]:
    """The texts below some paths, but for this list of words and the words of others."""
    left_out = [ROOT / folder for folder in WORDS_OF_OTHERS]
    for path in paths:
        below = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in below:
            if not file.is_file() or file.suffix not in KINDS or file == Path(__file__).resolve():
                continue
            if not any(file.is_relative_to(folder) for folder in left_out):
                yield file


def main(arguments: list[str]) -> int:
    count = 0
    for file in files([Path(path).resolve() for path in arguments] or [ROOT / p for p in PATHS]):
        for line, words, instead in found_in(file.read_text("utf-8")):
            count += 1
            print(f"{file.relative_to(ROOT)}:{line}: {words!r}: {instead}")
    if count:
        print(f"{count} places speak of things as of persons", file=sys.stderr)
    return int(count > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
