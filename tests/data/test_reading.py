import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from everlong.data.reading import read_table

WANTED = {"a": 'pass a="{name}"', "b": 'pass b="{name}"'}
FRAME = pl.DataFrame({"x": [None, None, None], "b": ["p", None, "q"], "a": [3, 1, 2]})
EXPECTED = {"a": [3, 1, 2], "b": ["p", None, "q"]}


def test_all_types_of_sources_give_equal_columns(tmp_path):
    FRAME.write_csv(tmp_path / "t.csv")
    FRAME.write_csv(tmp_path / "t.tsv", separator="\t")
    FRAME.write_parquet(tmp_path / "t.parquet")
    pandas = pd.DataFrame({"x": [1, "mixed", None], "b": ["p", None, "q"], "a": [3, 1, 2]})
    table = pa.table({"a": [3, 1, 2], "b": ["p", None, "q"], "x": [1, 2, 3]})
    for source in (
        str(tmp_path / "t.csv"),
        tmp_path / "t.tsv",
        tmp_path / "t.parquet",
        [tmp_path / "t.parquet"],
        FRAME,
        FRAME.lazy(),
        pandas,
        pandas.set_index("x"),
        table,
        table.to_reader(),
    ):
        frame = read_table(source, WANTED)
        assert frame.to_dict(as_series=False) == EXPECTED, source


def test_rows_keep_the_order_of_the_source(tmp_path):
    n = 300_000
    frame = pl.DataFrame({"a": pl.int_range(n, eager=True).shuffle(1), "b": ["x"] * n})
    frame.write_parquet(tmp_path / "t.parquet", row_group_size=10_000)
    frame.write_csv(tmp_path / "t.csv")
    for name in ("t.parquet", "t.csv"):
        assert read_table(tmp_path / name, WANTED)["a"].equals(frame["a"])


def test_files_with_columns_in_different_orders_are_concatenated(tmp_path):
    FRAME.write_csv(tmp_path / "1.csv")
    FRAME.select("b", "a").write_csv(tmp_path / "2.csv")
    frame = read_table([tmp_path / "1.csv", tmp_path / "2.csv"], WANTED)
    assert frame["a"].to_list() == EXPECTED["a"] * 2
    assert frame["b"].to_list() == EXPECTED["b"] * 2
    FRAME.write_parquet(tmp_path / "1.parquet")
    FRAME.cast({"a": pl.Int32}).write_parquet(tmp_path / "2.parquet")
    assert read_table([tmp_path / f"{i}.parquet" for i in (1, 2)], WANTED)["a"].dtype == pl.Int64
    FRAME.cast({"a": pl.String}).write_parquet(tmp_path / "2.parquet")
    with pytest.raises(ValueError, match="expected one type in all files"):
        read_table([tmp_path / f"{i}.parquet" for i in (1, 2)], WANTED)


def test_text_ids_keep_their_zeros_and_whole_numbers_become_integers(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n007,1\n7,-2\n,nan\n")
    frame = read_table(path, WANTED)
    assert frame.to_dict(as_series=False) == {"a": ["007", "7", None], "b": [1, -2, None]}


@pytest.mark.parametrize(
    ("column", "advice"), [("A", 'pass a="A"'), ("aa", 'pass a="aa"'), ("zzz", 'pass a="..."')]
)
def test_the_error_of_a_missing_column_names_the_most_similar_one(column, advice):
    with pytest.raises(ValueError, match="no column 'a'") as caught:
        read_table(pl.DataFrame({column: [1], "b": [1]}), WANTED)
    assert advice in str(caught.value)
    with pytest.raises(ValueError, match="no column 'a'"):
        read_table(pd.DataFrame({column: [1], "b": [1]}), WANTED)


def test_invalid_sources_raise_an_error_that_names_the_fault(tmp_path):
    broken = tmp_path / "t.parquet"
    FRAME.write_parquet(broken)
    broken.write_bytes(broken.read_bytes()[:-20])
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "ragged.csv").write_text("a,b\n1,2\n1,2,3\n")
    (tmp_path / "bytes.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    mixed = pd.DataFrame({"a": [1, "x", 2.5], "b": [1, 2, 3]})
    for source, message in (
        (broken, "complete and valid"),
        (tmp_path / "empty.csv", "is empty"),
        (tmp_path / "ragged.csv", "complete and valid"),
        (tmp_path / "bytes.csv", "complete and valid"),
        (tmp_path / "t.xlsx", "files of one format"),
        ([broken, tmp_path / "t.csv"], "files of one format"),
        ([], "received list"),
        (42, "received int"),
        (mixed, "cannot read the pandas DataFrame"),
    ):
        with pytest.raises(ValueError, match=message):
            read_table(source, WANTED)
    with pytest.raises(FileNotFoundError, match="no file at"):
        read_table(tmp_path / "absent.csv", WANTED)
