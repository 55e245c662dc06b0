from datetime import date, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.data.ids import IdMap

EXAMPLES = settings(max_examples=40)
SAME_TYPE = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1)),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
    st.lists(st.dates()),
    st.lists(st.datetimes(min_value=datetime(1700, 1, 1), max_value=datetime(2200, 1, 1))),
)


@EXAMPLES
@given(SAME_TYPE)
def test_rows_follow_the_sorted_ids_and_map_back(values):
    ids = IdMap.from_values(values)
    # polars sorts text by its bytes, python by code point: the same order
    expected = {value: row for row, value in enumerate(sorted(set(values)))}
    rows = ids.rows(values)
    assert rows.dtype == np.int64
    assert rows.tolist() == [expected[value] for value in values]
    assert ids.ids(rows).to_list() == values


@EXAMPLES
@given(st.lists(st.integers(-50, 50), min_size=1), st.lists(st.integers(-60, 60)))
def test_unknown_ids_have_row_minus_one(known, asked):
    ids = IdMap.from_values(known)
    rows = ids.rows(asked)
    assert [(row >= 0) for row in rows] == [a in known for a in asked]


def test_look_ups_with_other_number_types_never_match_a_rounded_id():
    ids = IdMap.from_values(np.array([1, 2, 300], dtype=np.int32))
    assert ids.dtype == pl.Int32
    assert ids.rows(np.array([300, 1, 2**40], dtype=np.int64)).tolist() == [2, 0, -1]
    assert ids.rows(np.array([1.0, 1.5, np.nan, np.inf])).tolist() == [0, -1, -1, -1]
    assert ids.rows(pl.Series([2, None])).tolist() == [1, -1]
    assert ids.rows([]).tolist() == []
    exact = IdMap.from_values([2**53, 2**53 + 1])
    assert exact.rows(pl.Series([2**53 + 1])).tolist() == [1]


def test_in_an_empty_map_every_id_is_unknown():
    ids = IdMap.from_values([])
    assert len(ids) == 0
    assert ids.rows([1, 2]).tolist() == [-1, -1]


def test_categories_become_text_and_whole_floats_integers():
    assert IdMap.from_values(pl.Series(["b", "a"], dtype=pl.Categorical)).dtype == pl.String
    assert IdMap.from_values([3.0, -1.0]).ids([0, 1]).to_list() == [-1, 3]
    assert IdMap.from_values([0.5, 1.0]).dtype == pl.Float64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, None], "null"),
        ([None], "null"),
        ([1.0, float("nan")], "NaN"),
        ([1, "a"], "one type"),
        ([[1], [2]], "integers, strings or dates"),
        ([True, False], "integers, strings or dates"),
    ],
)
def test_invalid_ids_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        IdMap.from_values(values)


def test_text_and_numbers_do_not_mix():
    ids = IdMap.from_values([1, 2])
    with pytest.raises(
        ValueError, match="expected ids of type Int64, as in the log, received String"
    ):
        ids.rows(["1"])
    with pytest.raises(ValueError, match="received Int64"):
        IdMap.from_values(["1"]).rows([1])


def test_rows_outside_of_the_map_are_refused_and_minus_one_is_null():
    ids = IdMap.from_values(["a", "b"])
    assert ids.ids([1, -1]).to_list() == ["b", None]
    for row in (2, -2):
        with pytest.raises(ValueError, match=r"rows 0\.\.1"):
            ids.ids([row])


def test_text_is_parsed_to_the_type_of_the_ids():
    assert IdMap.from_values([7, 8]).from_text(["8"]).to_list() == [8]
    assert IdMap.from_values(["x"]).from_text(["y"]).to_list() == ["y"]
    day = date(2024, 1, 31)
    assert IdMap.from_values([day]).from_text(["2024-01-31"]).to_list() == [day]
    with pytest.raises(ValueError, match="expected ids of type Int64"):
        IdMap.from_values([7]).from_text(["seven"])


@EXAMPLES
@given(values=SAME_TYPE)
def test_a_map_is_unchanged_by_write_and_read(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("ids") / "ids.parquet"
    ids = IdMap.from_values(values)
    ids.write(path)
    again = IdMap.read(path)
    assert again == ids
    assert again.fingerprint == ids.fingerprint


def test_different_maps_are_unequal_and_have_different_fingerprints():
    maps = [
        IdMap.from_values(values)
        for values in (["a", "bc"], ["ab", "c"], ["a"], [1, 2], [1, 3], np.int32([1, 2]), [])
    ]
    assert len({ids.fingerprint for ids in maps}) == len(maps)
    assert all((a == b) == (i == j) for i, a in enumerate(maps) for j, b in enumerate(maps))
    assert maps[0] != "a"


@EXAMPLES
@given(st.lists(st.integers(-50, 50), unique=True), st.lists(st.integers(-60, 60), unique=True))
def test_an_extended_map_keeps_its_rows(tmp_path_factory, known, more):
    ids = IdMap.from_values(known)
    new = [value for value in more if value not in known]
    longer = ids.extended(new)
    expected = [*sorted(known), *new]
    assert longer.ids(range(len(longer))).to_list() == expected
    assert longer.rows(expected).tolist() == list(range(len(expected)))
    assert longer.rows(known).tolist() == ids.rows(known).tolist()
    assert longer.rows([100, None]).tolist() == [-1, -1]
    path = tmp_path_factory.mktemp("ids") / "ids.parquet"
    longer.write(path)
    assert IdMap.read(path) == longer
    assert longer.extended([]) == longer
    if new:
        assert longer.fingerprint != ids.fingerprint
        with pytest.raises(ValueError, match="duplicates"):
            longer.extended(new[:1])


def test_new_ids_are_cast_to_the_type_of_the_map():
    ids = IdMap.from_values(np.int32([3, 4]))
    assert ids.extended(np.int64([2])).dtype == pl.Int32
    for values in ([2**40], [2, None]):
        with pytest.raises(
            ValueError, match="expected ids of type Int32, as in the log, received 1 of"
        ):
            ids.extended(values)
    with pytest.raises(
        ValueError, match="expected ids of type Int32, as in the log, received String"
    ):
        ids.extended(["2"])


def test_a_file_that_is_not_an_id_map_is_refused(tmp_path):
    path = tmp_path / "ids.parquet"
    for frame in (
        pl.DataFrame({"other": [1]}),
        pl.DataFrame({"id": [1, 1]}),
        pl.DataFrame({"id": [2, 1, 2]}),
        pl.DataFrame({"id": [1, None]}),
    ):
        frame.write_parquet(path)
        with pytest.raises(ValueError, match="not an id map"):
            IdMap.read(path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="not an id map"):
        IdMap.read(path)
    with pytest.raises(ValueError, match="not an id map"):
        IdMap.read(tmp_path / "absent.parquet")


def test_times_of_several_resolutions_match_only_when_equal():
    moment = datetime(2024, 1, 1)
    ids = IdMap.from_values(pl.Series([moment], dtype=pl.Datetime("ms")))
    fine = pl.Series([moment, moment + timedelta(microseconds=1)], dtype=pl.Datetime("us"))
    assert ids.rows(fine).tolist() == [0, -1]
