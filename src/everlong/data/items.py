"""The item table: features of the items of a catalogue, as categories, text and vectors."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from safetensors.numpy import load_file, save

from everlong.data.ids import IdMap
from everlong.data.reading import Source, describe, read_table
from everlong.system.atomic import new_folder, write_bytes
from everlong.system.formats import NewerFormatError, Upgraded, check_version, migrate

UNKNOWN = "unknown"

ABOUT = "items.json"

logger = logging.getLogger(__name__)


def _version_2(about: dict[str, Any]) -> dict[str, Any]:
    """Says its version, and that of everlong."""
    return {"format": 2, "everlong": version("everlong"), **about}


MIGRATIONS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (_version_2,)
"""From each version of ``items.json`` to the next; the other files are those of version 1."""

FORMAT = len(MIGRATIONS) + 1
KIND = "an item table"


@dataclass(frozen=True, kw_only=True, eq=False)
class Categories:
    """A categorical column with one or several categories for each item.

    Item ``i`` has the codes ``codes[offsets[i]:offsets[i + 1]]``; an item without a category has
    code 0 alone, which stands for ``"unknown"``.

    Attributes:
        names: the name of each code; ``names[0]`` is ``"unknown"``.
        codes: ``[M]`` int32.
        offsets: ``[I + 1]`` int64.
    """

    names: tuple[str, ...]
    codes: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class ItemTable:
    """Features of ``I`` items, in the rows of an id map of items.

    Attributes:
        item_ids: external item id <-> row.
        known: ``[I]`` bool, whether the source had the item; others have "unknown", "" and zeros.
        categories: categorical columns by name.
        text: text columns by name, ``[I]`` strings.
        vectors: vector columns by name, ``[I, V]`` float32.
        rows_ignored: rows of the source whose item is not in ``item_ids``.
    """

    item_ids: IdMap
    known: np.ndarray
    categories: Mapping[str, Categories] = field(default_factory=dict)
    text: Mapping[str, pl.Series] = field(default_factory=dict)
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)
    rows_ignored: int = 0

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def num_missing(self) -> int:
        """Items of the catalogue that are missing from the source."""
        return int((~self.known).sum())

    @property
    def vector_widths(self) -> dict[str, int]:
        """The width of each vector column, sorted by name."""
        return {name: self.vectors[name].shape[1] for name in sorted(self.vectors)}

    def joined_vectors(self, item_ids: IdMap) -> np.ndarray:
        """Concatenates all vector columns, sorted by name, for the items of a catalogue.

        Columns are not rescaled, so a column with larger norms has more weight.

        Args:
            item_ids: the catalogue, in any order.

        Returns:
            ``[I, V]`` float32, zeros where this table has no vector of an item.

        Raises:
            ValueError: if there is no vector column, a number in it is not finite, or the ids have
                another kind of type.
        """
        if not self.vectors:
            raise ValueError(
                "expected items with vectors, received none; name the columns in vectors= of "
                "read_items"
            )
        rows = self.item_ids.rows(item_ids.ids(np.arange(len(item_ids))))
        joined = np.concatenate([self.vectors[name] for name in self.vector_widths], axis=1)
        broken = np.flatnonzero(~np.isfinite(joined).all(axis=1))
        if broken.size:
            raise ValueError(
                f"expected finite vectors, received NaN or infinity for {broken.size} items, e.g. "
                f"{self.item_ids.ids(broken[:1])[0]!r}; compute their vectors again"
            )
        found = np.zeros((len(rows), joined.shape[1]), dtype=np.float32)
        found[rows >= 0] = joined[rows[rows >= 0]]
        return found

    def write(self, folder: str | Path) -> None:
        """Writes the table as a new folder, atomically.

        Raises:
            FileExistsError: if the folder exists already.
        """
        folder = Path(folder)
        if folder.exists():
            raise FileExistsError(f"{folder} exists already; remove it or choose another folder")
        with new_folder(folder) as temporary:
            self._write_files(temporary)

    def _write_files(self, folder: Path) -> None:
        arrays = {"known": self.known}
        for i, column in enumerate(self.categories.values()):
            arrays |= {f"codes_{i}": column.codes, f"offsets_{i}": column.offsets}
        for i, values in enumerate(self.vectors.values()):
            arrays[f"vectors_{i}"] = values
        contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        (folder / "items.safetensors").write_bytes(save(contiguous))
        self.item_ids.write(folder / "item_ids.parquet")
        text = {f"text_{i}": values for i, values in enumerate(self.text.values())}
        # write through memory, so that a full disk always raises an error
        buffer = io.BytesIO()
        pl.DataFrame(text).write_parquet(buffer, compression="zstd")
        (folder / "text.parquet").write_bytes(buffer.getvalue())
        about = {
            "format": FORMAT,
            "everlong": version("everlong"),
            "rows_ignored": self.rows_ignored,
            "categories": {name: column.names for name, column in self.categories.items()},
            "text": list(self.text),
            "vectors": list(self.vectors),
        }
        (folder / ABOUT).write_text(json.dumps(about, indent=2), encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> ItemTable:
        """Reads the table that ``write`` stored.

        Raises:
            NewerFormatError: if a later version of everlong wrote it.
            ValueError: if the folder is not a complete item table.
        """
        folder = Path(folder)
        try:
            about, _ = _read_about(folder)
            arrays = load_file(folder / "items.safetensors")
            text = pl.read_parquet(folder / "text.parquet", memory_map=False)
            table = cls(
                item_ids=IdMap.read(folder / "item_ids.parquet"),
                known=arrays["known"],
                categories={
                    name: Categories(
                        names=tuple(names),
                        codes=arrays[f"codes_{i}"],
                        offsets=arrays[f"offsets_{i}"],
                    )
                    for i, (name, names) in enumerate(about["categories"].items())
                },
                text={name: text[f"text_{i}"].rename(name) for i, name in enumerate(about["text"])},
                vectors={name: arrays[f"vectors_{i}"] for i, name in enumerate(about["vectors"])},
                rows_ignored=about["rows_ignored"],
            )
            if len(table.known) != table.num_items:
                raise ValueError(f"expected {table.num_items} items, received {len(table.known)}")
        except NewerFormatError:
            raise
        # the exception class of safetensors derives from Exception only
        except Exception as error:
            raise ValueError(
                f"{folder} is not a complete item table: {error}; write it again from its source"
            ) from error
        return table


def upgrade_items(folder: Path) -> Upgraded:
    """Brings the description of an item table up to this version; it is replaced whole.

    Raises:
        NewerFormatError: if a later version of everlong wrote it.
        OSError: if it cannot be written; then it is as before.
        ValueError: if the folder is not a whole item table.
    """
    ItemTable.read(folder)
    about, found = _read_about(folder)
    if found < FORMAT:
        write_bytes(folder / ABOUT, json.dumps(about, indent=2).encode())
    return Upgraded(KIND, found, FORMAT)


def _read_about(folder: Path) -> tuple[dict[str, Any], int]:
    """The description as the latest version has it, and the version that it has."""
    about: dict[str, Any] = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    # the first version had none
    found = check_version(
        folder, KIND, about.get("format", 1), FORMAT, written_by=about.get("everlong")
    )
    return migrate(about, found, MIGRATIONS), found


def read_items(
    source: Source,
    item_ids: IdMap,
    *,
    item_id: str = "item_id",
    categorical: Sequence[str] = (),
    multi: Sequence[str] = (),
    separator: str = "|",
    text: Sequence[str] = (),
    vectors: Sequence[str] = (),
) -> ItemTable:
    """Reads the item table of a catalogue, with one row per row of ``item_ids``.

    Items missing from the source are unknown and counted; items outside the catalogue are ignored
    and counted.

    Args:
        source: a path to .csv, .tsv or .parquet, a list of paths, or a frame.
        item_ids: the catalogue.
        item_id: the column of item ids.
        categorical: columns with one category per item.
        multi: columns with several, as separated text or as lists of text.
        separator: the separator of categories in ``multi`` text columns.
        text: columns of text.
        vectors: columns of lists of numbers, all of one length within a column.

    Raises:
        ValueError: if a column is missing or has the wrong type, or an item has several rows.
    """
    wanted = {item_id: 'pass item_id="{name}"'}
    for kind, names in (
        ("categorical", categorical),
        ("multi", multi),
        ("text", text),
        ("vectors", vectors),
    ):
        wanted |= dict.fromkeys(names, f'name it in {kind}=["{{name}}"]')
    frame = read_table(source, wanted)
    rows = item_ids.rows(frame[item_id])
    inside = rows >= 0
    _check_unique(frame[item_id].filter(pl.Series(inside)), describe(source))
    # the source row of each item of the catalogue; null if it has none
    place = np.full(len(item_ids), -1, dtype=np.int64)
    place[rows[inside]] = np.flatnonzero(inside)
    where = pl.Series(place).replace(-1, None)
    aligned = {name: frame[name].gather(where) for name in wanted}
    table = ItemTable(
        item_ids=item_ids,
        known=place >= 0,
        categories={name: _categories(aligned[name]) for name in categorical}
        | {name: _many_categories(aligned[name], separator) for name in multi},
        text={name: aligned[name].cast(pl.String).fill_null("") for name in text},
        vectors={name: _vectors(aligned[name]) for name in vectors},
        rows_ignored=int((~inside).sum()),
    )
    if table.num_missing:
        logger.warning(
            "%d of %d items are not in %s: their features are unknown",
            table.num_missing,
            table.num_items,
            describe(source),
        )
    return table


def _check_unique(ids: pl.Series, source: str) -> None:
    repeated = ids.filter(ids.is_duplicated())
    if len(repeated):
        raise ValueError(
            f"{source}: expected one row per item, received {len(repeated)} rows that share an "
            f"item, e.g. {repeated[0]!r}; remove the others"
        )


def _code(values: pl.Series) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of categories, "unknown" first, and the code of each value, ``[n]`` int32."""
    known = values.drop_nulls()
    names = IdMap.from_values(known.filter(known != UNKNOWN))
    codes = (names.rows(values) + 1).astype(np.int32)
    return (UNKNOWN, *names.ids(np.arange(len(names)))), codes


def _categories(column: pl.Series) -> Categories:
    names, codes = _code(column.cast(pl.String))
    return Categories(names=names, codes=codes, offsets=np.arange(len(column) + 1))


def _many_categories(column: pl.Series, separator: str) -> Categories:
    if isinstance(column.dtype, pl.List):
        lists = column.cast(pl.List(pl.String))
    else:
        lists = column.cast(pl.String).str.split(separator)
    pairs = pl.DataFrame({"row": np.arange(len(column)), "name": lists}).explode("name")
    pairs = pairs.with_columns(pl.col("name").str.strip_chars()).filter(pl.col("name") != "")
    lonely = np.setdiff1d(np.arange(len(column)), pairs["row"].to_numpy())
    pairs = pl.concat(
        [pairs, pl.DataFrame({"row": lonely, "name": pl.repeat(None, len(lonely), eager=True)})],
        how="vertical_relaxed",
    ).sort("row", maintain_order=True)
    names, codes = _code(pairs["name"])
    counts = np.bincount(pairs["row"].to_numpy(), minlength=len(column))
    return Categories(names=names, codes=codes, offsets=np.concatenate([[0], counts.cumsum()]))


def _vectors(column: pl.Series) -> np.ndarray:
    """Converts a column of lists to ``[I, V]`` float32; zeros where it is null."""
    if isinstance(column.dtype, pl.Array):
        column = column.arr.to_list()
    if not (isinstance(column.dtype, pl.List) and column.dtype.inner.is_numeric()):
        raise ValueError(
            f"vectors {column.name!r}: expected lists of numbers, received {column.dtype}; "
            "store them as a list column of a Parquet file"
        )
    present = column.drop_nulls()
    widths = present.list.len().unique().sort().to_list()
    if len(widths) != 1:
        raise ValueError(
            f"vectors {column.name!r}: expected one length for all items, received {widths[:5]}"
        )
    values = present.explode().cast(pl.Float32).fill_null(float("nan"))
    if not values.is_finite().all():
        raise ValueError(
            f"vectors {column.name!r}: expected finite numbers, received null, NaN or infinity; "
            "replace them with zeros"
        )
    vectors = np.zeros((len(column), widths[0]), dtype=np.float32)
    vectors[column.is_not_null().to_numpy()] = values.to_numpy().reshape(-1, widths[0])
    return vectors
