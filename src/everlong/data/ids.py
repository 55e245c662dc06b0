"""Id maps: from ids of a log to rows of arrays and back."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

Ids = pl.Series | np.ndarray | Sequence[object]
"""Ids of one type: a polars series, a numpy array or a plain list."""


class IdMap:
    """A map from external ids to rows 0 .. n-1 and back; rows follow the sorted order of the ids.

    ``extended`` appends new ids after the existing rows, so that no row changes.

    Ids are integers, strings, dates, times or floats, all of one type, without nulls. Categorical
    ids are stored as strings. Whole floats are stored as integers, because data frames convert an
    integer column with nulls to floats.
    """

    def __init__(self, ids: pl.Series) -> None:
        """Creates a map of sorted, unique ids.

        ``from_values`` sorts ids and removes duplicates; ``in_order`` keeps their order.

        Raises:
            ValueError: if ids repeat, are unsorted or null, or have an unsupported type.
        """
        checked = _usable(ids.rename("id"))
        if len(checked) > 1 and not (checked[1:] > checked[:-1]).all():
            raise ValueError(
                "expected sorted ids without duplicates, received others; use IdMap.from_values"
            )
        self._ids = self._sorted = checked
        # the row of each sorted id; None where rows follow the sorted order
        self._order: np.ndarray | None = None

    @classmethod
    def from_values(cls, values: Ids) -> IdMap:
        """The map of all distinct ids of ``values``.

        Raises:
            ValueError: if ids are null, NaN, of several types, or of an unsupported type.
        """
        return cls(_usable(_series(values)).unique().sort())

    @classmethod
    def in_order(cls, values: Ids) -> IdMap:
        """The map whose rows follow the order of ``values``, which must be distinct.

        Raises:
            ValueError: if ids repeat, are null, or have an unsupported type.
        """
        ids = _usable(_series(values))
        if ids.is_sorted():
            return cls(ids)
        repeats = len(ids) - ids.n_unique()
        if repeats:
            raise ValueError(
                f"expected distinct ids, received {repeats} duplicates among {len(ids)}; remove "
                "them"
            )
        order = ids.arg_sort()
        found = cls(ids.gather(order))
        found._ids, found._order = ids, order.to_numpy().astype(np.int64)
        return found

    def extended(self, values: Ids) -> IdMap:
        """A map with new ids appended after the existing rows.

        Raises:
            ValueError: if an id is already in the map, or cannot be converted to its type.
        """
        new = self._alike(_series(values))
        if new.null_count():
            raise ValueError(
                f"expected ids of type {self.dtype}, as in the log, received {new.null_count()} of "
                f"{len(new)} that are null or cannot be converted to it"
            )
        return IdMap.in_order(pl.concat([self._ids, new]))

    def __len__(self) -> int:
        return len(self._ids)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, IdMap):
            return NotImplemented
        return self.dtype == other.dtype and self._ids.equals(other._ids)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"IdMap({len(self)} ids of type {self.dtype})"

    @property
    def dtype(self) -> pl.DataType:
        """The polars type of the ids."""
        return self._ids.dtype

    @cached_property
    def fingerprint(self) -> str:
        """Sha256 (hex) of the type and the ids."""
        digest = hashlib.sha256(f"{self.dtype}:{len(self)}:".encode())
        if self.dtype == pl.String:
            digest.update(np.ascontiguousarray(self._ids.str.len_bytes().to_numpy()).data)
            digest.update((self._ids.str.join("")[0] if len(self) else "").encode())
        else:
            digest.update(np.ascontiguousarray(self._ids.to_physical().to_numpy()).data)
        return digest.hexdigest()

    def rows(self, values: Ids) -> np.ndarray:
        """The row of each id, ``[n]`` int64; -1 where the id is unknown or null.

        Raises:
            ValueError: if the values have another kind of type than the ids (text, not numbers).
        """
        wanted = self._alike(_series(values))
        if not len(self):
            return np.full(len(wanted), -1, dtype=np.int64)
        found = self._sorted.search_sorted(wanted).clip(upper_bound=len(self) - 1)
        known = (self._sorted.gather(found) == wanted).fill_null(False)
        rows = found.to_numpy().astype(np.int64)
        if self._order is not None:
            rows = self._order[rows]
        rows[~known.to_numpy()] = -1
        return rows

    @cached_property
    def row_of(self) -> Mapping[Any, int]:
        """A dictionary of rows by id, for single look-ups; built at the first use."""
        return {value: row for row, value in enumerate(self._ids.to_list())}

    def ids(self, rows: np.ndarray | Sequence[int]) -> pl.Series:
        """The id of each row; null for row -1.

        Raises:
            ValueError: if a row is not between -1 and ``len(self) - 1``.
        """
        index = np.asarray(rows, dtype=np.int64)
        if index.size and (index.min() < -1 or index.max() >= len(self)):
            raise ValueError(
                f"expected rows 0..{len(self) - 1}, or -1 for none, "
                f"received {index.min()}..{index.max()}"
            )
        return self._ids.gather(pl.Series(index).replace(-1, None))

    def from_text(self, texts: Sequence[str]) -> pl.Series:
        """Parses ids given as text, for example on a command line, to the type of this map.

        Raises:
            ValueError: if a text cannot be parsed as that type.
        """
        words = pl.Series("id", texts, dtype=pl.String)
        if self.dtype == pl.String:
            return words
        try:
            if isinstance(self.dtype, pl.Date | pl.Datetime | pl.Time):
                return words.str.strptime(self.dtype)
            return words.cast(self.dtype)
        except pl.exceptions.PolarsError as error:
            raise ValueError(
                f"expected ids of type {self.dtype}, as in the log, received {list(texts)[:3]}"
            ) from error

    def write(self, path: str | Path) -> None:
        """Writes the map as a Parquet file with one column, ``id``."""
        # write through memory, so that a full disk always raises an error
        buffer = io.BytesIO()
        self._ids.to_frame().write_parquet(buffer, compression="zstd")
        Path(path).write_bytes(buffer.getvalue())

    @classmethod
    def read(cls, path: str | Path) -> IdMap:
        """Reads the map that ``write`` stored.

        Raises:
            ValueError: if the file is not an id map.
        """
        try:
            # memory_map=False: the file may be replaced while the map lives
            frame = pl.read_parquet(Path(path), memory_map=False)
            return cls.in_order(frame["id"])
        except (pl.exceptions.PolarsError, ValueError, OSError) as error:
            raise ValueError(
                f"{path} is not an id map: expected Parquet with one column 'id' of distinct ids "
                f"({error})"
            ) from error

    def _alike(self, values: pl.Series) -> pl.Series:
        """Casts values to the type of this map; null where the cast would change a value."""
        if values.dtype in (pl.Categorical, pl.Enum):
            values = values.cast(pl.String)
        if values.dtype == self.dtype or values.dtype == pl.Null:
            return values.cast(self.dtype)
        same_kind = (values.dtype.is_numeric() and self.dtype.is_numeric()) or (
            values.dtype.is_temporal() and self.dtype.is_temporal()
        )
        try:
            if not same_kind:
                raise TypeError("text and numbers do not mix")
            cast = values.cast(self.dtype, strict=False)
            kept = (cast.cast(values.dtype, strict=False) == values).fill_null(False)
        except (pl.exceptions.PolarsError, TypeError) as error:
            raise ValueError(
                f"expected ids of type {self.dtype}, as in the log, received {values.dtype}, "
                f"e.g. {values[:3].to_list()}"
            ) from error
        return cast.zip_with(kept, pl.Series([None], dtype=self.dtype))


def _series(values: Ids) -> pl.Series:
    """The values as a polars series."""
    if isinstance(values, pl.Series):
        return values.rename("id")
    try:
        return pl.Series("id", values, strict=True)
    except (TypeError, OverflowError, pl.exceptions.PolarsError) as error:
        raise ValueError(
            f"expected ids of one type, received {list(values[:3])} and others ({error}); "
            "convert them to strings"
        ) from error


def _usable(ids: pl.Series) -> pl.Series:
    """Converts ids to the type in which the map stores them."""
    dtype = ids.dtype
    if dtype in (pl.Categorical, pl.Enum):
        return _usable(ids.cast(pl.String))
    if dtype == pl.Null and len(ids) == 0:
        return ids.cast(pl.Int64)
    if ids.null_count():
        raise ValueError(
            f"expected ids without nulls, received {ids.null_count()} nulls among {len(ids)}; "
            "remove them"
        )
    if dtype.is_float():
        if not ids.is_finite().all():
            raise ValueError("expected finite ids, received NaN or infinity; remove those rows")
        whole = ids.cast(pl.Int64, strict=False)
        # above 2^53 adjacent integers have the same float, so the integer id is not known
        safe = whole.null_count() == 0 and not (ids.abs() > 2.0**53).any()
        return whole if safe and (whole.cast(dtype) == ids).all() else ids
    if dtype.is_integer() and dtype not in (pl.Int128, pl.UInt128):
        return ids
    if dtype == pl.String or dtype in (pl.Date, pl.Datetime, pl.Time, pl.Duration):
        return ids
    raise ValueError(
        f"expected ids that are integers, strings or dates, received {dtype}; "
        "convert them to strings"
    )
