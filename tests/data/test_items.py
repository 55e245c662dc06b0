import logging

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.data.ids import IdMap
from everlong.data.items import ItemTable, read_items

ITEMS = IdMap.from_values([10, 20, 30, 40])
FRAME = pl.DataFrame(
    {
        "item_id": [30, 99, 10, 20],
        "year": [1999, 2000, None, 1995],
        "genres": ["b|a", "z", "", "a | unknown"],
        "tags": [["x"], ["z"], [], ["y", "x"]],
        "title": ["Thirty", "Other", None, "Twenty"],
        "image": [[1.0, 2.0], [9.0, 9.0], None, [3.0, 4.0]],
    }
)
COLUMNS = {
    "categorical": ["year"],
    "multi": ["genres", "tags"],
    "text": ["title"],
    "vectors": ["image"],
}


def names_of(table: ItemTable, column: str) -> list[list[str]]:
    categories = table.categories[column]
    return [
        [categories.names[code] for code in categories.codes[start:stop]]
        for start, stop in zip(categories.offsets[:-1], categories.offsets[1:], strict=True)
    ]


def test_columns_are_aligned_with_the_rows_of_the_catalogue(caplog):
    with caplog.at_level(logging.WARNING, logger="everlong"):
        table = read_items(FRAME, ITEMS, **COLUMNS)
    assert table.known.tolist() == [True, True, True, False]
    assert (table.num_missing, table.rows_ignored) == (1, 1)
    assert "1 of 4 items are not in polars DataFrame" in caplog.text
    assert names_of(table, "year") == [["unknown"], ["1995"], ["1999"], ["unknown"]]
    assert names_of(table, "genres") == [["unknown"], ["a", "unknown"], ["b", "a"], ["unknown"]]
    assert names_of(table, "tags") == [["unknown"], ["y", "x"], ["x"], ["unknown"]]
    assert table.categories["genres"].names == ("unknown", "a", "b")
    assert table.categories["genres"].codes.dtype == np.int32
    assert table.categories["genres"].offsets.dtype == np.int64
    assert table.text["title"].to_list() == ["", "Twenty", "Thirty", ""]
    np.testing.assert_array_equal(
        table.vectors["image"], np.float32([[0, 0], [3, 4], [1, 2], [0, 0]])
    )


@settings(max_examples=40)
@given(
    st.dictionaries(
        st.integers(0, 9), st.lists(st.sampled_from(["a", "b", "c", "unknown"])), max_size=10
    )
)
def test_several_categories_of_an_item_keep_their_order(known):
    frame = pl.DataFrame(
        {"item_id": list(known), "tags": ["|".join(tags) for tags in known.values()]},
        schema={"item_id": pl.Int64, "tags": pl.String},
    )
    table = read_items(frame, IdMap.from_values(range(10)), multi=["tags"])
    assert names_of(table, "tags") == [known.get(i) or ["unknown"] for i in range(10)]


def test_a_table_is_unchanged_by_write_and_read(tmp_path):
    table = read_items(FRAME, ITEMS, **COLUMNS)
    table.write(tmp_path / "items")
    again = ItemTable.read(tmp_path / "items")
    assert again.item_ids == table.item_ids
    assert again.known.tolist() == table.known.tolist()
    assert again.rows_ignored == table.rows_ignored
    assert [again.categories[n].names for n in ("year", "genres", "tags")] == [
        table.categories[n].names for n in ("year", "genres", "tags")
    ]
    for name in ("year", "genres", "tags"):
        assert names_of(again, name) == names_of(table, name)
    assert again.text["title"].equals(table.text["title"])
    np.testing.assert_array_equal(again.vectors["image"], table.vectors["image"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["items"]
    with pytest.raises(FileExistsError, match="exists already"):
        table.write(tmp_path / "items")


def test_a_table_without_columns_can_be_written(tmp_path):
    read_items(FRAME, ITEMS).write(tmp_path / "items")
    assert ItemTable.read(tmp_path / "items").num_items == 4


@pytest.mark.parametrize("name", ["items.safetensors", "items.json", "text.parquet"])
def test_a_truncated_or_absent_file_is_an_error(tmp_path, name):
    read_items(FRAME, ITEMS, **COLUMNS).write(tmp_path / "items")
    path = tmp_path / "items" / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match="not a complete item table"):
        ItemTable.read(tmp_path / "items")
    path.unlink()
    with pytest.raises(ValueError, match="not a complete item table"):
        ItemTable.read(tmp_path / "items")


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        (pl.concat([FRAME, FRAME]), {}, "share an item"),
        (FRAME, {"text": ["titel"]}, r'text=\["title"\]'),
        (FRAME, {"vectors": ["year"]}, "expected lists of numbers"),
        (
            FRAME.with_columns(image=pl.Series([[1.0]] * 3 + [[1.0, 2.0]])),
            {"vectors": ["image"]},
            "one length",
        ),
        (
            FRAME.with_columns(image=pl.Series([[1.0, float("nan")]] * 4)),
            {"vectors": ["image"]},
            "null, NaN or infinity",
        ),
        (FRAME.with_columns(item_id=pl.lit("10")), {}, "expected ids of type Int64"),
    ],
)
def test_invalid_tables_raise_an_error_that_names_the_fault(frame, options, message):
    with pytest.raises(ValueError, match=message):
        read_items(frame, ITEMS, **options)


def test_items_outside_the_catalogue_may_have_several_rows():
    extra = FRAME.filter(pl.col("item_id") == 99)
    assert read_items(pl.concat([FRAME, extra]), ITEMS).rows_ignored == 2


def test_vectors_are_joined_by_name_in_the_rows_of_a_catalogue() -> None:
    frame = pl.DataFrame({"item_id": [5, 1, 3], "b": [[5.0], [1.0], None], "a": [[0.0, 5.0]] * 3})
    table = read_items(frame, IdMap.from_values([1, 3, 5, 7]), vectors=["b", "a"])
    assert table.vector_widths == {"a": 2, "b": 1}
    catalogue = IdMap.from_values([5, 9]).extended([3, 1])
    joined = table.joined_vectors(catalogue)
    assert joined.dtype == np.float32
    assert joined.tolist() == [[0, 5, 5], [0, 0, 0], [0, 5, 0], [0, 5, 1]]
    empty = read_items(frame.head(0), IdMap.from_values(np.int64([])), vectors=[])
    with pytest.raises(ValueError, match="expected items with vectors, received none"):
        empty.joined_vectors(catalogue)
    with pytest.raises(
        ValueError, match="expected ids of type Int64, as in the log, received String"
    ):
        table.joined_vectors(IdMap.from_values(["5"]))
