"""Composition of item texts from the columns of an item table."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from everlong.data.items import Categories, ItemTable

Missing = Literal["error", "zero"]
"""The treatment of items without text: an error, or a zero vector."""


@dataclass(frozen=True, kw_only=True)
class TextTemplate:
    """A template of item texts: a list of columns, or a format string; exactly one of the two.

    Attributes:
        columns: named columns, as in ``"title: Alien; genres: Horror, Sci-Fi"``; empty ones are
            left out.
        form: a format string such as ``"{title}. {genres}"``, with column names in braces and
            ``{{`` for a brace.
    """

    columns: tuple[str, ...] = ()
    form: str = ""

    def __post_init__(self) -> None:
        given: object = self.columns
        if isinstance(given, str):
            raise ValueError(f"expected a tuple of columns, received {given!r}")
        if bool(self.columns) == bool(self.form):
            raise ValueError(
                "expected either columns or form, received "
                f"columns={self.columns}, form={self.form!r}"
            )
        if not self.fields:
            raise ValueError(
                f'expected column names in braces, such as "{{title}}", received {self.form!r}'
            )

    @property
    def fields(self) -> tuple[str, ...]:
        """The distinct columns of the template.

        Raises:
            ValueError: if braces of the form contain anything but column names.
        """
        if self.columns:
            return tuple(dict.fromkeys(self.columns))
        try:
            parts = list(string.Formatter().parse(self.form))
        except ValueError as error:
            raise ValueError(f"the form {self.form!r} is invalid: {error}") from error
        names = []
        for _, name, spec, conversion in parts:
            if name is None:
                continue
            if not name or spec or conversion or name.isdigit() or set(name) & set(".[]{}"):
                raise ValueError(
                    f'expected column names in braces, such as "{{title}}", received '
                    f"{name!r} in {self.form!r}"
                )
            names.append(name)
        return tuple(dict.fromkeys(names))

    def fill(self, values: Mapping[str, str]) -> str:
        """Composes the text of an item from the values of its columns; "" if all are empty."""
        if not any(values.values()):
            return ""
        if self.columns:
            return "; ".join(f"{name}: {values[name]}" for name in self.fields if values[name])
        return self.form.format_map(values).strip()


def item_texts(
    table: ItemTable, template: TextTemplate, *, missing: Missing = "error"
) -> list[str]:
    """Composes the texts of the ``I`` items of a table, in row order.

    Several categories of an item are joined by ", "; the category "unknown" counts as empty.

    Args:
        table: an item table with text or categories.
        template: the template of the texts.
        missing: whether an item without text is an error, or has the text "".

    Raises:
        ValueError: if a column does not exist, or items have no text and ``missing`` is "error".
    """
    if missing not in ("error", "zero"):
        raise ValueError(f'expected missing "error" or "zero", received {missing!r}')
    names = template.fields
    unknown = [name for name in names if name not in table.text and name not in table.categories]
    if unknown:
        available = ", ".join([*table.text, *table.categories]) or "none"
        raise ValueError(
            f"no column {unknown[0]!r} of text or categories in the item table, which has "
            f"{available}; name it in text= or categorical= of read_items"
        )
    columns = [_values(table, name) for name in names]
    texts = [
        template.fill(dict(zip(names, values, strict=True)))
        for values in zip(*columns, strict=True)
    ]
    empty = [row for row, text in enumerate(texts) if not text]
    if empty and missing == "error":
        some = ", ".join(repr(item) for item in table.item_ids.ids(empty[:3]))
        raise ValueError(
            f"{len(empty)} of {table.num_items} items have no text in {', '.join(names)}, for "
            f'example {some}; pass missing="zero" for zero vectors'
        )
    return texts


def _values(table: ItemTable, name: str) -> list[str]:
    if name in table.text:
        return [value.strip() for value in table.text[name].to_list()]
    return _joined(table.categories[name])


def _joined(column: Categories) -> list[str]:
    names, codes, offsets = column.names, column.codes.tolist(), column.offsets.tolist()
    return [
        ", ".join(names[code] for code in codes[start:stop] if code)
        for start, stop in pairwise(offsets)
    ]
