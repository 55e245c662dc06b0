"""Vectors on disk: found again, never wrong, and kept while they are made."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everlong.system.progress import Progress
from everlong.text import vector_cache
from everlong.text.encoder import Encoded
from everlong.text.vector_cache import encode_cached

SCRIPT = """
import sys, time
from pathlib import Path
from everlong.text import vector_cache
sys.path.insert(0, {tests!r})
from tests.text.test_vector_cache import Hashes, many
vector_cache.CHUNK = 10

class Slow(Hashes):
    def encode(self, texts, *, progress=None):
        time.sleep(0.01)
        print(len(texts), flush=True)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == {stop}:
            time.sleep(3_600)
        return super().encode(texts, progress=progress)

vector_cache.encode_cached(Slow(), many(), Path(sys.argv[1]))
print("done", flush=True)
"""


class Hashes:
    """A vector of five numbers from the hash of a text; texts with an "x" are cut."""

    width = 5

    def __init__(self, digest: str = "0a" * 32) -> None:
        self.digest = digest
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str], *, progress: Progress | None = None) -> Encoded:
        self.texts += texts
        salted = [hashlib.sha256((self.digest + text).encode()).digest() for text in texts]
        vectors = np.array([list(h[:5]) for h in salted], np.float32).reshape(-1, 5) / 7
        return Encoded(vectors=vectors, cut=np.array(["x" in text for text in texts], bool))

    def describe(self) -> dict[str, Any]:
        return {}


def many() -> list[str]:
    return [f"text {number}" for number in range(100)]


def start(cache: Path, stop: int = 0) -> subprocess.Popen[str]:
    """A process that encodes and keeps all texts, or stands still in the call of that number."""
    script = SCRIPT.format(tests=str(Path(__file__).parents[2]), stop=stop)
    return subprocess.Popen(
        [sys.executable, "-c", script, str(cache)], stdout=subprocess.PIPE, text=True
    )


def change(cache: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(cache)) as database, database:
        database.execute(statement, values)


@settings(max_examples=20)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=3), max_size=20))
def test_a_cache_changes_no_vector(texts: list[str]) -> None:
    direct = Hashes().encode(texts)
    found = encode_cached(Hashes(), texts, None)
    assert np.array_equal(found.vectors, direct.vectors)
    assert found.vectors.dtype == np.float32
    assert np.array_equal(found.cut, direct.cut)


def test_each_text_is_encoded_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = tmp_path / "below" / "vectors.sqlite"
    first, second = Hashes(), Hashes()
    texts = ["a", "bx", "a", "", "bx", "c"]
    expected = first.encode(texts)
    first.texts.clear()
    with caplog.at_level(logging.INFO, "everlong.text.vector_cache"):
        for encoder in (first, second):
            found = encode_cached(encoder, texts, cache)
            assert np.array_equal(found.vectors, expected.vectors)
            assert found.num_cut == 2
    assert first.texts == ["a", "bx", "", "c"]
    assert second.texts == []
    assert "0 vectors found" in caplog.text
    assert "4 vectors found" in caplog.text
    encode_cached(second, ["d", "a"], cache)
    assert second.texts == ["d"]


def test_more_texts_than_a_query_takes(tmp_path: Path) -> None:
    texts = [f"{number}" for number in range(3 * vector_cache.LOOKUP + 7)]
    expected = Hashes().encode(texts).vectors
    for encoded in (len(texts), 0):
        encoder = Hashes()
        assert np.array_equal(encode_cached(encoder, texts, tmp_path / "cache").vectors, expected)
        assert len(encoder.texts) == encoded


def test_encoders_share_a_file_but_no_vectors(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one, other = Hashes("01" * 32), Hashes("02" * 32)
    vectors = [encode_cached(encoder, ["a"], cache).vectors for encoder in (one, other)]
    assert other.texts == ["a"]
    assert not np.array_equal(*vectors)
    assert np.array_equal(encode_cached(one, ["a"], cache).vectors, vectors[0])


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE vectors SET vector = x'00' WHERE text = ?",
        "UPDATE vectors SET vector = 'twenty letters, here' WHERE text = ?",
        "UPDATE vectors SET vector = zeroblob(20) WHERE text = ?",
        "UPDATE vectors SET cut = 1 WHERE text = ?",
        "UPDATE vectors SET checksum = checksum + 1 WHERE text = ?",
    ],
)
def test_a_damaged_row_is_encoded_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    expected = encode_cached(Hashes(), ["a", "b"], cache)
    change(cache, damage, hashlib.sha256(b"b").digest())
    for again in (["b"], []):
        encoder = Hashes()
        found = encode_cached(encoder, ["a", "b"], cache)
        assert np.array_equal(found.vectors, expected.vectors)
        assert found.num_cut == 0
        assert encoder.texts == again
    assert caplog.text.count("1 vectors of the cache are damaged") == 1


def test_a_killed_run_continues_from_the_cache(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    process = start(cache, stop=4)
    assert process.stdout is not None
    # three chunks are kept, the fourth is being encoded
    lines = [process.stdout.readline() for _ in range(4)]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert lines == ["10\n"] * 4
    assert process.returncode == -signal.SIGKILL
    encoder = Hashes()
    found = encode_cached(encoder, many(), cache)
    assert np.array_equal(found.vectors, Hashes().encode(many()).vectors)
    assert encoder.texts == many()[30:]


def test_an_interrupted_run_keeps_its_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector_cache, "CHUNK", 10)

    class Interrupted(Hashes):
        def encode(self, texts: Sequence[str], *, progress: Progress | None = None) -> Encoded:
            if len(self.texts) == 30:
                raise KeyboardInterrupt
            return super().encode(texts)

    with pytest.raises(KeyboardInterrupt):
        encode_cached(Interrupted(), many(), tmp_path / "cache")
    encoder = Hashes()
    encode_cached(encoder, many(), tmp_path / "cache")
    assert encoder.texts == many()[30:]


def test_two_processes_use_one_cache(tmp_path: Path) -> None:
    processes = [start(tmp_path / "cache") for _ in range(2)]
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0
        assert output.endswith("done\n")
    encoder = Hashes()
    found = encode_cached(encoder, many(), tmp_path / "cache")
    assert encoder.texts == []
    assert np.array_equal(found.vectors, Hashes().encode(many()).vectors)


def test_a_file_that_is_not_a_cache_is_unchanged(tmp_path: Path) -> None:
    other = tmp_path / "other.sqlite"
    change(other, "CREATE TABLE mine (value)")
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but long enough to be read as one " * 20)
    for path in (other, text):
        before = path.read_bytes()
        with pytest.raises(ValueError, match="is not a vector cache, or is damaged"):
            encode_cached(Hashes(), ["a"], path)
        assert path.read_bytes() == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_the_error_of_an_unwritable_cache_names_its_path(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be used"):
        encode_cached(Hashes(), ["a"], tmp_path / "cache")


def test_a_folder_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be used: .*; choose another file"):
        encode_cached(Hashes(), ["a"], tmp_path)


def test_vectors_that_are_not_finite_are_not_stored(tmp_path: Path) -> None:
    class Diverged(Hashes):
        def encode(self, texts: Sequence[str], *, progress: Progress | None = None) -> Encoded:
            encoded = super().encode(texts)
            encoded.vectors[1:] = np.nan
            return encoded

    with pytest.raises(ValueError, match="NaN or infinity for 1 texts, for example 'b'"):
        encode_cached(Diverged(), ["a", "b"], tmp_path / "cache")
    encoder = Hashes()
    encode_cached(encoder, ["a", "b"], tmp_path / "cache")
    assert encoder.texts == ["a", "b"]


def test_vectors_of_another_width_are_an_error() -> None:
    encoder = Hashes()
    encoder.width = 6
    with pytest.raises(
        ValueError, match=r"expected vectors of shape \(1, 6\) .* received \(1, 5\)"
    ):
        encode_cached(encoder, ["a"], None)
