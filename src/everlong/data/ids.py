"""The map between ids of the log and rows of arrays."""

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
    """External ids <-> rows 0 .. n-1; the rows follow the sorted order of the ids.

    Ids that come later (``extended``) have the rows after those, so that no row ever changes.

    Ids are integers, strings, dates, times or floats, all of one type, without nulls. Categories
    are kept as strings. Whole floats are kept as integers, because they are what data frames make
    of an integer column with holes.
    """

    def __init__(self, ids: pl.Series) -> None:
        """Takes ids that are sorted and unique already.

        See ``from_values`` for any others, and ``in_order`` to keep an order.

        Raises:
            ValueError: if ids repeat, are out of order, null, or of a type that cannot be an id.
        """
        checked = _usable(ids.rename("id"))
        if len(checked) > 1 and not (checked[1:] > checked[:-1]).all():
            raise ValueError(
                "an id map needs ids that rise without repeats; use IdMap.from_values, which sorts"
            )
        self._ids = self._sorted = checked
        # where each of the sorted ids is among the ids; None where they are the same
        self._order: np.ndarray | None = None

    @classmethod
    def from_values(cls, values: Ids) -> IdMap:
        """The map of all different ids among ``values``.

        Raises:
            ValueError: if ids are null, NaN, of several types, or of a type that cannot be an id.
        """
        return cls(_usable(_series(values)).unique().sort())

    @classmethod
    def in_order(cls, values: Ids) -> IdMap:
        """The map whose rows follow the order of ``values``, all different.

        Raises:
            ValueError: if ids repeat, are null, or of a type that cannot be an id.
        """
        ids = _usable(_series(values))
        if ids.is_sorted():
            return cls(ids)
        repeats = len(ids) - ids.n_unique()
        if repeats:
            raise ValueError(f"an id has one row: {repeats} of {len(ids)} are repeats; drop them")
        order = ids.arg_sort()
        found = cls(ids.gather(order))
        found._ids, found._order = ids, order.to_numpy().astype(np.int64)
        return found

    def extended(self, values: Ids) -> IdMap:
        """The map with new ids in the rows after those that it has.

        Raises:
            ValueError: if an id is there already, or cannot be of the type of this map.
        """
        new = self._alike(_series(values))
        if new.null_count():
            raise ValueError(
                f"ids of this log are {self.dtype}: {new.null_count()} of {len(new)} new ones are "
                "null or have no place in that type; give ids of the type that the log has"
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
            ValueError: if the values are of another kind than the ids (text against numbers).
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
        """The row of each id, for those who look few up at a time; it is made at the first use."""
        return {value: row for row, value in enumerate(self._ids.to_list())}

    def ids(self, rows: np.ndarray | Sequence[int]) -> pl.Series:
        """The id of each row; null for row -1.

        Raises:
            ValueError: if a row is outside of the map.
        """
        index = np.asarray(rows, dtype=np.int64)
        if index.size and (index.min() < -1 or index.max() >= len(self)):
            raise ValueError(
                f"this map has rows 0..{len(self) - 1} (-1 for none), "
                f"received rows {index.min()}..{index.max()}"
            )
        return self._ids.gather(pl.Series(index).replace(-1, None))

    def from_text(self, texts: Sequence[str]) -> pl.Series:
        """Ids written as text, such as command line words, in the type of this map.

        Raises:
            ValueError: if a text cannot be read as that type.
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
                f"ids of this log are {self.dtype}, received {list(texts)[:3]}; "
                "write them as in the log"
            ) from error

    def write(self, path: str | Path) -> None:
        """Writes the map as a Parquet file with one column, ``id``."""
        # through memory, so that a full disk is always an error
        buffer = io.BytesIO()
        self._ids.to_frame().write_parquet(buffer, compression="zstd")
        Path(path).write_bytes(buffer.getvalue())

    @classmethod
    def read(cls, path: str | Path) -> IdMap:
        """The map that ``write`` stored.

        Raises:
            ValueError: if the file is not an id map.
        """
        try:
            # memory_map=False: the file may be replaced while the map lives
            frame = pl.read_parquet(Path(path), memory_map=False)
            return cls.in_order(frame["id"])
        except (pl.exceptions.PolarsError, ValueError, OSError) as error:
            raise ValueError(
                f"{path} is not an id map: expected Parquet with one column 'id' without repeats "
                f"({error})"
            ) from error

    def _alike(self, values: pl.Series) -> pl.Series:
        """The values in the type of this map; null where that would change them."""
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
                f"ids of this log are {self.dtype}, received {values.dtype}, "
                f"e.g. {values[:3].to_list()}; give ids of the type that the log has"
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
            f"ids must all have one type, received {list(values[:3])} and others ({error}); "
            "turn them into strings"
        ) from error


def _usable(ids: pl.Series) -> pl.Series:
    """The ids in the type in which the map keeps them."""
    dtype = ids.dtype
    if dtype in (pl.Categorical, pl.Enum):
        return _usable(ids.cast(pl.String))
    if dtype == pl.Null and len(ids) == 0:
        return ids.cast(pl.Int64)
    if ids.null_count():
        raise ValueError(f"ids cannot be null: {ids.null_count()} of {len(ids)} are; drop them")
    if dtype.is_float():
        if not ids.is_finite().all():
            raise ValueError("ids cannot be NaN or infinite; drop those rows")
        whole = ids.cast(pl.Int64, strict=False)
        # beyond 2^53 neighbouring integers share a float: not safe to call them whole
        safe = whole.null_count() == 0 and not (ids.abs() > 2.0**53).any()
        return whole if safe and (whole.cast(dtype) == ids).all() else ids
    if dtype.is_integer() and dtype not in (pl.Int128, pl.UInt128):
        return ids
    if dtype == pl.String or dtype in (pl.Date, pl.Datetime, pl.Time, pl.Duration):
        return ids
    raise ValueError(
        f"ids of type {dtype} are not supported: expected integers, strings or dates; "
        "turn them into strings"
    )
