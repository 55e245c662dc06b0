"""Reading of tables: files, data frames and Arrow objects, as polars frames."""

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
    """An object with the Arrow C stream interface: pandas, pyarrow, duckdb, cudf and others."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | pl.LazyFrame | ArrowStream
"""The source of a table: a path, several paths, or a frame (polars frames are Arrow streams)."""


def read_table(source: Source, columns: Mapping[str, str]) -> pl.DataFrame:
    """Reads columns of a table; rows keep the order of the source.

    Columns of CSV and TSV files are text, or Int64 where every value is a plain whole number.

    Args:
        source: a path to .csv, .tsv or .parquet, a list of such paths, or a frame.
        columns: the columns to read, each with the advice of its error if it is missing;
            ``{name}`` in it stands for the most similar column (``'pass user_id="{name}"'``).

    Raises:
        ValueError: if a column is missing or the source cannot be read.
        FileNotFoundError: if a file does not exist.
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
        "expected a path to .csv, .tsv or .parquet, a list of paths, or a polars, pandas or Arrow "
        f"frame, received {type(source).__name__}"
    )


def describe(source: Source) -> str:
    """Names a source in messages: by its paths, or the type of the frame."""
    if isinstance(source, str | os.PathLike):
        return str(source)
    if isinstance(source, list | tuple):
        return ", ".join(str(path) for path in source)
    module = type(source).__module__.partition(".")[0]
    return f"{module} {type(source).__name__}"


def _read_files(paths: list[Path], columns: Mapping[str, str]) -> pl.DataFrame:
    """Reads files and concatenates their rows."""
    kinds = {KINDS.get(path.suffix.lower(), "") for path in paths}
    if len(kinds) != 1 or "" in kinds:
        raise ValueError(
            f"expected files of one format, .csv, .tsv or .parquet, received {describe(paths)}"
        )
    kind = kinds.pop()
    frames = []
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no file at {path}; check the path")
        if kind == "parquet":
            frames.append(_select(pl.scan_parquet(path, glob=False), columns, str(path)))
        else:
            # read as text, because type inference would turn the id "007" into 7
            rows = pl.scan_csv(
                path, separator=kind, infer_schema=False, null_values=MISSING_TEXT, glob=False
            )
            frames.append(_select(rows, columns, str(path)))
    frame = _concat(frames)
    return frame if kind == "parquet" else frame.select(_whole_numbers(c) for c in frame)


def _concat(frames: list[pl.DataFrame]) -> pl.DataFrame:
    """Concatenates frames; numeric columns may differ in width, other types may not differ."""
    if len(frames) == 1:
        return frames[0]
    for name in frames[0].columns:
        types = {frame[name].dtype for frame in frames} - {pl.Null()}
        if len(types) > 1 and not all(dtype.is_numeric() for dtype in types):
            raise ValueError(
                f"column {name!r}: expected one type in all files, received "
                f"{', '.join(sorted(map(str, types)))}; convert them to one type"
            )
    return pl.concat(frames, how="vertical_relaxed")


def _whole_numbers(column: pl.Series) -> pl.Series:
    """Converts a column to Int64 if that is lossless."""
    numbers = column.cast(pl.Int64, strict=False)
    return numbers if numbers.cast(pl.String).equals(column, null_equal=True) else column


def _read_arrow(source: ArrowStream, columns: Mapping[str, str]) -> pl.DataFrame:
    """Reads columns of an Arrow object; of a pandas frame, converts no others."""
    name = describe(source)
    if name.startswith("pandas "):
        _check_columns([str(c) for c in source.columns], columns, name)  # type: ignore[attr-defined]
        source = source[list(columns)]  # type: ignore[index]
    try:
        frame = pl.DataFrame(source)
    except ImportError as error:
        raise ImportError(f"reading a {name} requires pyarrow: pip install pyarrow") from error
    # pandas raises exceptions of pyarrow, which may not be installed; all of them derive from
    # ValueError or TypeError
    except (TypeError, ValueError, pl.exceptions.PolarsError) as error:
        raise ValueError(
            f"cannot read the {name}: {error}; convert each column to one type"
        ) from error
    return _select(frame.lazy(), columns, name)


def _select(rows: pl.LazyFrame, columns: Mapping[str, str], name: str) -> pl.DataFrame:
    """Collects columns of a query."""
    try:
        _check_columns(rows.collect_schema().names(), columns, name)
        return rows.select(list(columns)).collect()
    except pl.exceptions.NoDataError as error:
        raise ValueError(f"{name} is empty: expected a header and rows") from error
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ValueError(
            f"cannot read {name}: {error}; check that the file is complete and valid"
        ) from error


def _check_columns(names: Sequence[str], columns: Mapping[str, str], source: str) -> None:
    """Raises ``ValueError`` that names the most similar column if one is missing."""
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
