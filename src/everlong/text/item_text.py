"""Item vectors from item text: composes texts from columns and encodes them, with a cache."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from everlong.data.items import ItemTable
from everlong.text.encoder import TextEncoder
from everlong.text.templates import Missing, TextTemplate, item_texts
from everlong.text.vector_cache import encode_cached

logger = logging.getLogger(__name__)


def encode_items(
    table: ItemTable,
    encoder: TextEncoder,
    *,
    columns: Sequence[str] = (),
    template: TextTemplate | str | None = None,
    name: str = "text",
    missing: Missing = "error",
    cache: str | Path | None = None,
) -> ItemTable:
    """Encodes the texts of items and adds them to a table as a vector column ``[I, V]``.

    Args:
        table: an item table with text or categories.
        encoder: the text encoder.
        columns: the columns of the text, as in ``"title: ..; genres: .."``.
        template: a template such as ``"{title}. {genres}"`` instead of ``columns``.
        name: the name of the new column.
        missing: whether an item without text is an error or has a zero vector.
        cache: a file that stores vectors between runs, see ``encode_cached``.

    Raises:
        ValueError: if the texts cannot be composed (before any is encoded), the column exists
            already, or the cache cannot be used.
    """
    if template is not None and columns:
        raise ValueError(
            "expected columns= or template=, received both; name the columns in the template"
        )
    if isinstance(columns, str):
        raise ValueError(f"expected a list of columns, received {columns!r}; use [{columns!r}]")
    if name in table.vectors:
        raise ValueError(f"the table has vectors {name!r} already; choose another name=")
    if template is None and not columns:
        available = ", ".join([*table.text, *table.categories]) or "none"
        raise ValueError(
            f"expected columns= or template=, received neither; the table has the columns "
            f"{available}"
        )
    if template is None:
        template = TextTemplate(columns=tuple(columns))
    elif isinstance(template, str):
        template = TextTemplate(form=template)
    texts = item_texts(table, template, missing=missing)
    there_is = np.array([bool(text) for text in texts], np.bool_)
    encoded = encode_cached(
        encoder, [text for text in texts if text], None if cache is None else Path(cache)
    )
    vectors = np.zeros((table.num_items, encoder.width), np.float32)
    vectors[there_is] = encoded.vectors
    if encoded.num_cut:
        logger.warning(
            "%d of %d texts exceed the limit of the encoder: truncated", encoded.num_cut, len(texts)
        )
    if not there_is.all():
        logger.warning(
            "%d of %d items have no text: zero vectors", int((~there_is).sum()), len(texts)
        )
    return dataclasses.replace(table, vectors={**table.vectors, name: vectors})
