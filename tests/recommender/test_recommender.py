import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

import everlong
from everlong.data.events import read_events, restrict_to_catalogue
from everlong.data.ids import IdMap
from everlong.models import state as states
from everlong.models.batch import Batch
from everlong.recommender.recommender import Recommender
from everlong.recommender.users import read_into

ARCHITECTURE = {"dim": 8, "channels": 8, "layers": 1}
TRAINING = {"epochs": 1, "batch_events": 256, "precision": "float32"}
START = 1_700_000_000


def log_frame(seed: int = 0, users: int = 12, items: int = 15) -> pl.DataFrame:
    """Histories of 4 to 12 events, with text ids."""
    random = np.random.default_rng(seed)
    rows = [
        {"user_id": f"u{user:02d}", "item_id": f"i{item:02d}", "timestamp": START + 60 * place}
        for user in range(users)
        for place, item in enumerate(random.integers(items, size=random.integers(4, 13)))
    ]
    return pl.DataFrame(rows)


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    return log_frame()


@pytest.fixture(scope="module")
def fitted(frame: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recommender = everlong.fit(
        frame, "lru", architecture=ARCHITECTURE, training=TRAINING, protocol="paper"
    )
    folder = tmp_path_factory.mktemp("fitted") / "model"
    recommender.save(folder)
    return folder


@pytest.fixture
def recommender(fitted: Path) -> Recommender:
    return everlong.load(fitted)


def new_events(users: list[str], items: list[str], late: int = 0) -> pl.DataFrame:
    times = [START + 86_400 + place - late for place in range(len(items))]
    return pl.DataFrame({"user_id": users, "item_id": items, "timestamp": times})


def test_every_known_user_gets_k_items_of_the_log(
    recommender: Recommender, frame: pl.DataFrame
) -> None:
    users = frame["user_id"].unique().sort()
    result = recommender.recommend(users, k=3)
    assert result.columns == ["user_id", "item_id", "score", "rank"]
    assert result["user_id"].to_list() == [u for u in users for _ in range(3)]
    assert result["rank"].to_list() == [1, 2, 3] * len(users)
    assert set(result["item_id"]) <= set(frame["item_id"])
    for part in result.partition_by("user_id"):
        assert part["score"].is_sorted(descending=True)


def test_recommendations_follow_the_scores_of_the_model(
    recommender: Recommender, frame: pl.DataFrame
) -> None:
    # the oracle reads the history by itself and sorts all scores
    user = "u03"
    history = frame.filter(pl.col("user_id") == user)["item_id"]
    rows = torch.from_numpy(recommender.item_ids.rows(history))
    batch = Batch.from_histories([rows.tolist()])
    with torch.no_grad():
        _, state = recommender.model.encode(batch)
        scores = recommender.model.score(state)[0]
    scores[rows] = -torch.inf
    best = recommender.item_ids.ids(scores.argsort(descending=True)[:4].numpy())
    assert recommender.recommend([user], k=4)["item_id"].to_list() == best.to_list()


def test_seen_items_are_left_out_unless_asked_for(
    recommender: Recommender, frame: pl.DataFrame
) -> None:
    for user in frame["user_id"].unique():
        seen = set(frame.filter(pl.col("user_id") == user)["item_id"])
        fresh = set(recommender.recommend([user], k=100)["item_id"])
        everything = set(recommender.recommend([user], k=100, filter_seen=False)["item_id"])
        assert everything == set(frame["item_id"])
        assert fresh == everything - seen


def test_k_beyond_the_catalogue_gives_what_there_is(recommender: Recommender) -> None:
    result = recommender.recommend(["u00"], k=10_000, filter_seen=False)
    assert result.height == len(recommender.item_ids)
    assert result["item_id"].n_unique() == result.height


def test_nothing_is_left_for_a_user_who_saw_everything(recommender: Recommender) -> None:
    everything = recommender.item_ids.ids(range(len(recommender.item_ids))).to_list()
    result = recommender.recommend({"me": everything}, k=3)
    assert result.height == 0
    assert result.columns == ["user_id", "item_id", "score", "rank"]
    assert recommender.recommend({}, k=3).height == 0


def test_a_history_gives_what_its_user_gets(recommender: Recommender, frame: pl.DataFrame) -> None:
    history = frame.filter(pl.col("user_id") == "u05")["item_id"].to_list()
    known = recommender.recommend(["u05"], k=5)
    # with neighbours of other lengths, one of them without any event
    given = recommender.recommend({"new": [], "me": history, "other": history[:2]}, k=5)
    mine = given.filter(pl.col("user_id") == "me")
    assert mine["item_id"].equals(known["item_id"])
    np.testing.assert_allclose(mine["score"], known["score"], atol=1e-5)
    assert given.filter(pl.col("user_id") == "new").height == 5
    assert len(recommender.users) == 12


def test_an_update_equals_reading_the_whole_log(
    recommender: Recommender, frame: pl.DataFrame
) -> None:
    new = new_events(["u01", "u02", "u01", "guest"], ["i03", "i01", "i04", "i05"])
    report = recommender.update(new)
    assert (report.events, report.users, report.new_users) == (4, 3, 1)
    assert (report.unknown_items, report.late, dict(report.skipped)) == (0, 0, {})

    known, _ = restrict_to_catalogue(read_events(pl.concat([frame, new])), recommender.item_ids)
    again = Recommender(recommender.model, recommender.item_ids, recommender.origin)
    again.users.add(known.user_ids.ids(range(known.num_users)))
    read_into(again.model, again.users, known)
    users = pl.Series([*frame["user_id"].unique().sort(), "guest"])
    one = recommender.users.read_states(torch.from_numpy(recommender.users.rows(users)))
    two = again.users.read_states(torch.from_numpy(again.users.rows(users)))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    found, expected = (one.recommend(users, k=4)["item_id"] for one in (recommender, again))
    assert found.equals(expected)


def test_an_update_changes_only_its_users(recommender: Recommender) -> None:
    before = recommender.recommend(["u00", "u01"], k=5)
    recommender.update(new_events(["u01"], ["i09"]))
    after = recommender.recommend(["u00", "u01"], k=5)
    assert before.filter(user_id="u00").equals(after.filter(user_id="u00"))
    assert not before.filter(user_id="u01").equals(after.filter(user_id="u01"))
    assert "i09" not in after.filter(user_id="u01")["item_id"]


def test_what_cannot_be_read_is_counted(recommender: Recommender) -> None:
    new = pl.DataFrame(
        {
            "user_id": ["u01", "u01", None, "stranger"],
            "item_id": ["i03", "never-seen", "i04", "never-seen"],
            # before the log began
            "timestamp": [START - 5, START + 10**6, START + 10**6, START + 10**6],
        }
    )
    report = recommender.update(new)
    assert (report.events, report.users, report.unknown_items) == (1, 1, 2)
    assert report.late == 1
    assert dict(report.skipped) == {"null user_id": 1}
    # a history of unknown items alone is a user without events
    assert recommender.recommend(["stranger"], k=2).height == 2


def test_the_bytes_of_a_user_never_grow(recommender: Recommender) -> None:
    size = recommender.bytes_per_user.state
    spec = states.spec(recommender.users.states)
    for _ in range(3):
        recommender.update(new_events(["u01"] * 700, [f"i{n % 15:02d}" for n in range(700)]))
    assert recommender.bytes_per_user.state == size
    assert states.spec(recommender.users.states) == spec
    assert recommender.users.num_events[recommender.users.rows(pl.Series(["u01"]))[0]] > 2_000
    kept = {n: v for n, v in recommender.users.trimmed().items() if n.startswith("state/")}
    assert sum(value.nbytes for value in kept.values()) == size * len(recommender.users)


def test_nothing_that_was_seen_is_forgotten(recommender: Recommender, tmp_path: Path) -> None:
    frame = log_frame(items=2_500).with_columns(pl.lit("u").alias("user_id"))
    wide = pl.DataFrame(
        {
            "user_id": ["u01"] * 2_400,
            "item_id": [f"i{n:04d}" for n in range(2_400)],
            "timestamp": [START + n for n in range(2_400)],
        }
    )
    found = everlong.fit(
        pl.concat([frame, wide]), "popularity", protocol=everlong.PAPER.replace({"window": 50})
    )
    items = set(found.item_ids.ids(range(len(found.item_ids))))
    for one in (found, _again(found, tmp_path)):
        listed = set(one.recommend(["u01"], k=5_000)["item_id"])
        assert listed == items - set(wide["item_id"])
        assert one.bytes_per_user.seen >= 4 * 2_400 / len(one.users)


def _again(recommender: Recommender, folder: Path) -> Recommender:
    recommender.save(folder / "model")
    return everlong.load(folder / "model")


def test_seen_items_come_where_the_protocol_keeps_them(frame: pl.DataFrame) -> None:
    kept = everlong.fit(frame, "popularity", protocol=everlong.PAPER.replace({"seen": "keep"}))
    every = kept.recommend(["u03"], k=100, filter_seen=False)
    assert kept.recommend(["u03"], k=100).equals(every)
    assert kept.recommend(["u03"], k=100, filter_seen=True).height < every.height


def test_filters_are_for_all_or_for_each(recommender: Recommender) -> None:
    users, how = ["u01", "u02"], {"k": 100, "filter_seen": False}
    whole = recommender.recommend(users, **how)  # type: ignore[arg-type]
    gone = recommender.recommend(users, exclude=["i03", "nothing"], **how)  # type: ignore[arg-type]
    assert gone.equals(_ranked(whole.filter(pl.col("item_id") != "i03")))
    mine = recommender.recommend(users, exclude={"u01": ["i03"]}, among={"u02": ["i04", "i05"]}, **how)  # type: ignore[arg-type]  # noqa: E501  # fmt: skip
    expected = whole.filter(
        ((pl.col("user_id") == "u01") & (pl.col("item_id") != "i03"))
        | ((pl.col("user_id") == "u02") & pl.col("item_id").is_in(["i04", "i05"]))
    )
    assert mine.equals(_ranked(expected))
    named = [["i04", "i03", "nothing"], ["i05", "i03"]]
    ranked = recommender.rank(users, named, exclude={"u02": ["i05"]}, among=["i03", "i05"])
    assert ranked.select("user_id", "item_id", "rank").rows() == [
        ("u01", "i03", 1),
        ("u01", "nothing", None),
        ("u02", "i03", 1),
    ]


def _ranked(frame: pl.DataFrame) -> pl.DataFrame:
    rank = pl.int_range(1, pl.len() + 1, dtype=pl.Int32).over("user_id")
    return frame.with_columns(rank.alias("rank"))


def test_saved_and_loaded_in_a_fresh_process_is_the_same(
    recommender: Recommender, tmp_path: Path
) -> None:
    recommender.update(new_events(["u01", "guest"], ["i03", "i07"]))
    recommender.save(tmp_path / "model")
    users = ["guest", "u01", "u02"]
    code = (
        "import everlong, sys\n"
        "found = everlong.load(sys.argv[1]).recommend(sys.argv[3:], k=5)\n"
        "found.write_parquet(sys.argv[2])\n"
    )
    arguments = [str(tmp_path / "model"), str(tmp_path / "found.parquet"), *users]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, timeout=120)
    found = pl.read_parquet(tmp_path / "found.parquet")
    assert_frame_equal(found, recommender.recommend(users, k=5))


def test_a_loaded_recommender_goes_on_as_the_saved_one(
    recommender: Recommender, tmp_path: Path
) -> None:
    recommender.save(tmp_path / "model")
    loaded = everlong.load(tmp_path / "model")
    for one in (recommender, loaded):
        one.update(new_events(["u01", "u01", "guest"], ["i03", "i07", "i01"]))
    users = ["u01", "guest", "u05"]
    assert_frame_equal(loaded.recommend(users, k=6), recommender.recommend(users, k=6))
    assert loaded.origin == recommender.origin


def test_similar_items_are_nearest_by_cosine(recommender: Recommender) -> None:
    result = recommender.similar_items(["i03", "i07"], k=4)
    assert result.columns == ["item_id", "similar_item_id", "score", "rank"]
    weight = recommender.model.item_embeddings().weight.detach().double().numpy()
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    row = recommender.item_ids.rows(["i03"])[0]
    cosine = unit @ unit[row]
    cosine[row] = -np.inf
    best = recommender.item_ids.ids(np.argsort(-cosine)[:4])
    mine = result.filter(item_id="i03")
    assert mine["similar_item_id"].to_list() == best.to_list()
    np.testing.assert_allclose(mine["score"], np.sort(cosine)[::-1][:4], atol=1e-5)


def test_evaluate_repeats_the_stored_test(recommender: Recommender, frame: pl.DataFrame) -> None:
    found = recommender.evaluate(frame)
    stored = recommender.origin.metrics["test"]["metrics"]
    assert found.metrics["NDCG@10"].mean == pytest.approx(stored["NDCG@10"]["mean"])
    with pytest.raises(ValueError, match="this log is not the one"):
        recommender.evaluate(frame[:-1])
    with pytest.raises(ValueError, match="'test' or 'validation'"):
        recommender.evaluate(frame, part="train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"users": ["u01"], "k": 0}, "k >= 1"),
        ({"users": ["u01", "stranger"]}, "1 users are unknown, for example 'stranger'"),
        ({"users": {"me": ["i01", "nothing"]}}, "not in the catalogue, for example 'nothing'"),
        ({"users": {"me": [1, 2]}}, "expected ids of type String"),
        ({"users": "u01"}, r"expected a list of ids, received 'u01'; use \['u01'\]"),
        ({"users": ["u01", 3]}, "one type"),
    ],
)
def test_mistakes_are_named(
    recommender: Recommender, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recommender.recommend(**arguments)  # type: ignore[arg-type]


def test_users_of_another_type_are_refused(recommender: Recommender) -> None:
    numbers = pl.DataFrame({"user_id": [1], "item_id": ["i01"], "timestamp": [START]})
    with pytest.raises(ValueError, match="user ids have one type"):
        recommender.update(numbers)


def test_a_full_disk_leaves_the_old_folder_whole(recommender: Recommender, tmp_path: Path) -> None:
    recommender.save(tmp_path / "model")
    before = {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()}
    # a limit on the size of files stands for a disk that fills up while states are written
    code = (
        "import everlong, resource, signal, sys\n"
        "recommender = everlong.load(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try:\n"
        "    recommender.save(sys.argv[1])\n"
        "except OSError as error:\n"
        "    print('refused:', error)\n"
    )
    assert max(len(data) for data in before.values()) > 9000
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "refused:" in done.stdout
    assert {p.name: p.read_bytes() for p in (tmp_path / "model").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    everlong.load(tmp_path / "model")


def test_the_printed_form_names_the_bytes_per_user(recommender: Recommender) -> None:
    assert str(recommender.bytes_per_user) in repr(recommender)


@pytest.mark.parametrize("history", ["i01", 7])
def test_a_history_that_is_no_list_is_refused(recommender: Recommender, history: object) -> None:
    with pytest.raises(ValueError, match="history of 'me': expected a list of item ids"):
        recommender.recommend({"me": history})  # type: ignore[dict-item]


def test_the_time_of_a_request_is_seconds_or_a_datetime_in_utc(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []
    query = recommender.model.query

    def listen(state: states.State, at: torch.Tensor | None = None) -> object:
        assert at is not None
        asked.append(at.tolist())
        return query(state, at)

    monkeypatch.setattr(recommender.model, "query", listen)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        for at in (START, datetime.fromtimestamp(START, UTC), datetime(2023, 11, 14, 22, 13, 20)):
            recommender.recommend(["u01"], at=at)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert asked == [[START]] * 3
    with pytest.raises(ValueError, match="at: expected Unix seconds or a datetime, received 'now'"):
        recommender.recommend(["u01"], at="now")  # type: ignore[arg-type]


def test_new_events_without_times_are_refused_where_the_log_had_times(
    recommender: Recommender,
) -> None:
    events = new_events(["u01"], ["i01"])
    before = recommender.recommend(["u01"])
    with pytest.raises(ValueError, match="had times: expected the same of new events"):
        recommender.update(events, timestamp=None)
    with pytest.raises(ValueError, match="received positions, no times"):
        recommender.update(events.with_columns(timestamp=5))
    assert recommender.recommend(["u01"]).equals(before)


def test_a_log_without_times_is_continued_by_the_order_of_rows(frame: pl.DataFrame) -> None:
    events = read_events(frame.drop("timestamp"), timestamp=None)
    recommender = everlong.fit(events, "popularity")
    last = recommender.users.last_time[recommender.users.rows(pl.Series(["u01"]))]
    new = new_events(["u01", "u01", "new"], ["i01", "i02", "i01"])
    report = recommender.update(new.drop("timestamp"), timestamp=None)
    assert (report.events, report.new_users, report.late) == (3, 1, 0)
    rows = recommender.users.rows(pl.Series(["u01", "new"]))
    assert recommender.users.last_time[rows].tolist() == [last[0] + 2, 0]
    with pytest.raises(ValueError, match="had positions, no times"):
        recommender.update(read_events(new))


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_does_not_exist_is_refused_at_once(fitted: Path, device: str) -> None:
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here"):
        everlong.load(fitted, device=device)
    with pytest.raises(ValueError, match=f"device '{device}' cannot be used here"):
        everlong.fit("no such log.csv", device=device)


def test_every_public_name_can_be_imported() -> None:
    assert {name for name in everlong.__all__ if getattr(everlong, name, None) is None} == set()


def items_of(ids: list[str], width: int = 3) -> everlong.ItemTable:
    """A vector for each item that depends on the id alone; none for ``i99``."""
    vectors = [
        np.random.default_rng(int(name[1:])).normal(size=width) * (name != "i99") for name in ids
    ]
    frame = pl.DataFrame({"item_id": ids, "text": [vector.tolist() for vector in vectors]})
    return everlong.read_items(frame, IdMap.from_values(ids), vectors=["text"])


@pytest.fixture(scope="module")
def fitted_with_vectors(frame: pl.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    items = items_of(frame["item_id"].unique().to_list())
    settings = {"architecture": ARCHITECTURE, "training": TRAINING, "protocol": "paper"}
    folder = tmp_path_factory.mktemp("with_vectors") / "model"
    everlong.fit(frame, "lru", items=items, **settings).save(folder)  # type: ignore[arg-type]
    return folder


def test_added_items_are_recommended_and_read(
    fitted_with_vectors: Path, frame: pl.DataFrame, tmp_path: Path
) -> None:
    recommender = everlong.load(fitted_with_vectors)
    users, num_items = frame["user_id"].unique().sort(), len(recommender.item_ids)
    before = recommender.recommend(users, k=100)
    # ids that come before, between and after those of the log, and one without a vector
    new = ["i000", "i16", "i011"]
    assert recommender.add_items(items_of([*new, "i03", "i99"])) == 3
    assert recommender.add_items(items_of([*new, "i03", "i99"])) == 0
    assert len(recommender.item_ids) == recommender.model.num_items == num_items + 3
    after = recommender.recommend(users, k=100)
    assert set(after["item_id"]) == set(before["item_id"]) | set(new)
    # what users have seen, and what they like of it, is as before
    old = after.filter(~pl.col("item_id").is_in(new))
    assert old.select("user_id", "item_id").equals(before.select("user_id", "item_id"))
    np.testing.assert_allclose(old["score"], before["score"], atol=1e-5)

    report = recommender.update(new_events(["u01", "u02", "guest"], ["i16", "i99", "i000"]))
    assert (report.events, report.unknown_items) == (2, 1)
    found = recommender.recommend(["u01", "guest"], k=100)
    assert "i16" not in found.filter(user_id="u01")["item_id"]
    assert "i000" not in found.filter(user_id="guest")["item_id"]
    assert recommender.similar_items(["i16"], k=3).height == 3

    recommender.save(tmp_path / "model")
    loaded = everlong.load(tmp_path / "model")
    assert loaded.item_ids == recommender.item_ids
    assert_frame_equal(loaded.recommend(["u01", "guest"], k=100), found)
    assert loaded.add_items(items_of(["i17"])) == 1


def test_items_that_cannot_be_added_are_refused(
    recommender: Recommender, fitted_with_vectors: Path
) -> None:
    with pytest.raises(ValueError, match="knows items by their ids alone; fit one with vectors"):
        recommender.add_items(items_of(["i16"]))
    other = everlong.load(fitted_with_vectors)
    with pytest.raises(ValueError, match=r"columns {'text': 3}, as in training, received {'text':"):
        other.add_items(items_of(["i16"], width=4))
    numbers = pl.DataFrame({"item_id": [16], "text": [[1.0, 2.0, 3.0]]})
    table = everlong.read_items(numbers, IdMap.from_values([16]), vectors=["text"])
    with pytest.raises(ValueError, match="expected ids of type String"):
        other.add_items(table)
    assert other.model.num_items == len(other.item_ids)


@pytest.mark.parametrize("setting", ["dim", "channels", "layers"])
def test_a_size_below_one_is_refused(frame: pl.DataFrame, setting: str) -> None:
    with pytest.raises(ValueError, match=f"LRUConfig: expected {setting} >= 1, received 0"):
        everlong.fit(frame, "lru", architecture={setting: 0})
