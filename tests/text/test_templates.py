"""Texts of items from the columns of a table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everlong.data.ids import IdMap
from everlong.data.items import ItemTable, read_items
from everlong.system.progress import Progress
from everlong.text.encoder import Encoded
from everlong.text.item_text import encode_items
from everlong.text.templates import TextTemplate, item_texts


def table() -> ItemTable:
    frame = pl.DataFrame(
        {
            "item_id": ["a", "b", "c"],
            "title": ["Alien", " Heat ", None],
            "genres": ["Horror|Sci-Fi", None, None],
            "kind": ["film", "unknown", None],
        }
    )
    return read_items(
        frame,
        IdMap.from_values(["a", "b", "c", "d"]),
        text=["title"],
        multi=["genres"],
        categorical=["kind"],
    )


class Lengths:
    """Encodes a text as its length and its first letter; longer than 12 is cut."""

    width = 2
    digest = "ab" * 32

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str], *, progress: Progress | None = None) -> Encoded:
        self.texts += texts
        vectors = np.array([[len(text), ord(text[0])] for text in texts], np.float32)
        return Encoded(
            vectors=vectors.reshape(-1, 2), cut=np.array([len(text) > 12 for text in texts], bool)
        )

    def describe(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            TextTemplate(columns=("title", "genres", "kind")),
            ["title: Alien; genres: Horror, Sci-Fi; kind: film", "title: Heat", "", ""],
        ),
        (
            TextTemplate(columns=("genres", "title")),
            ["genres: Horror, Sci-Fi; title: Alien", "title: Heat", "", ""],
        ),
        (
            TextTemplate(form="{{{title}}}. {genres}"),
            ["{Alien}. Horror, Sci-Fi", "{Heat}.", "", ""],
        ),
        (TextTemplate(form="{title} ({title})"), ["Alien (Alien)", "Heat (Heat)", "", ""]),
    ],
)
def test_columns_become_texts(template: TextTemplate, expected: list[str]) -> None:
    assert item_texts(table(), template, missing="zero") == expected


def test_items_without_text_are_counted_and_named() -> None:
    with pytest.raises(
        ValueError, match=r"2 of 4 items .* title, genres, .* 'c', 'd'; pass missing="
    ):
        item_texts(table(), TextTemplate(columns=("title", "genres")))


def test_the_error_of_an_unknown_column_names_the_others() -> None:
    with pytest.raises(ValueError, match=r"'name' of text .* which has title, kind, genres"):
        item_texts(table(), TextTemplate(form="{name}"), missing="zero")
    with pytest.raises(ValueError, match=r'expected missing "error" or "zero", received "?\'drop'):
        item_texts(table(), TextTemplate(form="{title}"), missing="drop")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "form", ["{title.upper}", "{title[0]}", "{0.__class__}", "{title!r}", "{title:>9}", "{}", "{"]
)
def test_a_form_accepts_only_plain_column_names(form: str) -> None:
    with pytest.raises(ValueError, match=r"column names|is invalid"):
        TextTemplate(form=form)


@pytest.mark.parametrize(
    ("columns", "form"), [((), ""), (("title",), "{title}"), ((), "no columns")]
)
def test_a_template_is_columns_or_a_form(columns: tuple[str, ...], form: str) -> None:
    with pytest.raises(ValueError, match="columns"):
        TextTemplate(columns=columns, form=form)


@given(st.dictionaries(st.sampled_from(["title", "genres"]), st.text(), min_size=2, max_size=2))
def test_braces_in_values_are_not_interpreted(values: dict[str, str]) -> None:
    text = TextTemplate(form="{title}|{genres}").fill(values)
    joined = f"{values['title']}|{values['genres']}".strip()
    assert text == (joined if any(values.values()) else "")


def test_vectors_are_in_the_rows_of_their_items(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = Lengths()
    with caplog.at_level(logging.WARNING):
        found = encode_items(
            table(), encoder, columns=["title", "kind"], missing="zero", cache=tmp_path / "vectors"
        )
    expected = [[len("title: Alien; kind: film"), ord("t")], [11, ord("t")], [0, 0], [0, 0]]
    assert found.vectors["text"].tolist() == expected
    assert found.vectors["text"].dtype == np.float32
    assert encoder.texts == ["title: Alien; kind: film", "title: Heat"]
    assert "1 of 4 texts exceed the limit" in caplog.text
    assert "2 of 4 items have no text" in caplog.text
    by_form = encode_items(found, encoder, template="{title}", name="other", missing="zero")
    assert set(by_form.vectors) == {"text", "other"}
    found.write(tmp_path / "items")
    assert ItemTable.read(tmp_path / "items").vectors["text"].tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "received neither; .* title, kind, genres"),
        ({"columns": ["title"]}, "2 of 4 items have no text"),
        ({"columns": ["name"]}, "no column 'name' of text or categories"),
        ({"columns": "title"}, r"use \['title'\]"),
        ({"columns": ["title"], "template": "{title}"}, "received both"),
        ({"columns": ["title"], "missing": "zero", "name": "old"}, "already; choose another name"),
    ],
)
def test_invalid_arguments_raise_an_error_before_encoding(
    arguments: dict[str, Any], message: str
) -> None:
    encoder = Lengths()
    items = table()
    items.vectors["old"] = np.zeros((4, 2), np.float32)  # type: ignore[index]
    with pytest.raises(ValueError, match=message):
        encode_items(items, encoder, **arguments)
    assert encoder.texts == []


def test_items_without_any_text_have_zero_vectors() -> None:
    encoder = Lengths()
    found = encode_items(table(), encoder, template="{kind}", missing="zero")
    assert found.vectors["text"].any(1).tolist() == [True, False, False, False]
    empty = ItemTable(
        item_ids=IdMap.from_values(["a"]),
        known=np.zeros(1, bool),
        text={"title": pl.Series([""])},
    )
    assert encode_items(empty, encoder, columns=["title"], missing="zero").vectors[
        "text"
    ].tolist() == [[0, 0]]
