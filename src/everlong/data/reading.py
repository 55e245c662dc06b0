"""Tables from outside: files, data frames and Arrow objects, read as polars frames."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import polars as pl

KINDS = {".parquet": "parquet", ".pq": "parquet", ".csv": ",", ".tsv": "\t"}
MISSING_TEXT = ["", "NaN", "nan", "NULL", "null"]


class ArrowStream(Protocol):
    """Anything with the Arrow C stream interface: pandas, pyarrow, duckdb, cudf and others."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | pl.LazyFrame | ArrowStream
"""Where a table comes from: a path, several paths, or a frame (polars frames are Arrow too)."""


def read_table(source: Source, columns: Mapping[str, str]) -> pl.DataFrame:
    """The named columns of a table, rows in the order of the source.

    Columns of CSV and TSV files are text, or Int64 where every value is a plain whole number.

    Args:
        source: a path to .csv, .tsv or .parquet, a list of such paths, or a frame.
        columns: each wanted column, and what to do if it is missing, with ``{name}`` where the
            nearest existing column belongs (``'pass user_id="{name}"'``).

    Raises:
        ValueError: if a column is missing or the source cannot be read.
        FileNotFoundError: if there is no such file.
    """
    if isinstance(source, str | os.PathLike):
        return _read_files([Path(source)], columns)
    if isinstance(source, pl.DataFrame | pl.LazyFrame):
        return _select(source.lazy(), columns, describe(source))
    if hasattr(source, "__arrow_c_stream__"):
        return _read_arrow(source, columns)
    if isinstance(source, Sequence) and source:
        return _read_files([Path(path) for path in source], columns)
    raise ValueError(
        f"cannot read a table from {type(source).__name__}: expected a path to .csv, .tsv or "
        ".parquet, a list of paths, or a polars, pandas or Arrow frame"
    )


def describe(source: Source) -> str:
    """A short name of a source for messages: its paths, or the type of the frame."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    if isinstance(source, list | tuple):
        return ", ".join(str(path) for path in source)
    module = type(source).__module__.partition(".")[0]
    return f"{module} {type(source).__name__}"


def _read_files(paths: list[Path], columns: Mapping[str, str]) -> pl.DataFrame:
    """The rows of all files, one file after the other."""
    kinds = {KINDS.get(path.suffix.lower(), "") for path in paths}
    if len(kinds) != 1 or "" in kinds:
        raise ValueError(
            f"cannot tell how to read {describe(paths)}: expected one kind of file, "
            ".csv, .tsv or .parquet"
        )
    kind = kinds.pop()
    frames = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}; check the path")
        if kind == "parquet":
            frames.append(_select(pl.scan_parquet(path, glob=False), columns, str(path)))
        else:
            # as text: a guessed type would turn the id "007" into 7
            rows = pl.scan_csv(
                path, separator=kind, infer_schema=False, null_values=MISSING_TEXT, glob=False
            )
            frames.append(_select(rows, columns, str(path)))
    frame = _concat(frames)
    return frame if kind == "parquet" else frame.select(_whole_numbers(c) for c in frame)


def _concat(frames: list[pl.DataFrame]) -> pl.DataFrame:
    """The rows of all frames; number columns may differ in width, other types may not differ."""
    if len(frames) == 1:
        return frames[0]
    for name in frames[0].columns:
        types = {frame[name].dtype for frame in frames} - {pl.Null()}
        if len(types) > 1 and not all(dtype.is_numeric() for dtype in types):
            raise ValueError(
                f"column {name!r} has a different type in each file: {sorted(map(str, types))}; "
                "give it one type"
            )
    return pl.concat(frames, how="vertical_relaxed")


def _whole_numbers(column: pl.Series) -> pl.Series:
    """The column as Int64 if that loses nothing, else as it is."""
    numbers = column.cast(pl.Int64, strict=False)
    return numbers if numbers.cast(pl.String).equals(column, null_equal=True) else column


def _read_arrow(source: ArrowStream, columns: Mapping[str, str]) -> pl.DataFrame:
    """The columns of an Arrow object; of a pandas frame only those are converted."""
    name = describe(source)
    if name.startswith("pandas "):
        _check_columns([str(c) for c in source.columns], columns, name)  # type: ignore[attr-defined]
        source = source[list(columns)]  # type: ignore[index]
    try:
        frame = pl.DataFrame(source)
    except ImportError as error:
        raise ImportError(
            f"a {name} is read through Arrow, which needs pyarrow: pip install pyarrow"
        ) from error
    # pandas raises the exceptions of pyarrow, which cannot be named without importing it;
    # all of them are ValueError or TypeError
    except (TypeError, ValueError, pl.exceptions.PolarsError) as error:
        raise ValueError(f"cannot read the {name}: {error}; give each column one type") from error
    return _select(frame.lazy(), columns, name)


def _select(rows: pl.LazyFrame, columns: Mapping[str, str], name: str) -> pl.DataFrame:
    """The wanted columns of a query, in memory."""
    try:
        _check_columns(rows.collect_schema().names(), columns, name)
        return rows.select(list(columns)).collect()
    except pl.exceptions.NoDataError as error:
        raise ValueError(f"{name} is empty: expected a header and rows") from error
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(f"cannot read {name}: {error}; is the file whole and valid?") from error


def _check_columns(names: Sequence[str], columns: Mapping[str, str], source: str) -> None:
    """Raises ``ValueError`` naming the nearest column if a wanted one is missing."""
    for column, advice in columns.items():
        if column in names:
            continue
        lowered = {name.lower(): name for name in names}
        near = difflib.get_close_matches(column.lower(), lowered, n=1, cutoff=0.4)
        nearest = lowered[near[0]] if near else "..."
        raise ValueError(
            f"no column {column!r} in {source}: its columns are {list(names)[:20]}; "
            + advice.format(name=nearest)
        )
