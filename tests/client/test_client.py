"""The client against a real service, and against networks and services that fail on the way."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
import httpx
import msgspec
from hypothesis import given
from hypothesis import strategies as st
from tests.server_models import ITEMS, event
from tests.server_running import running

from everlong.client.client import (
    KEY,
    MAX_BYTES,
    Client,
    ServiceError,
    UnreachableError,
    _bodies,
    _part,
    _retry_after,
)
from everlong.server.engine.served_model import ServedModel
from everlong.server.engine.service import Service
from everlong.server.http.keys import Key, Keys
from everlong.server.http.messages import MAX_EVENTS, MAX_UNKNOWN, EventIn

SECRET = "open sesame"
SHA256 = hashlib.sha256(SECRET.encode()).hexdigest()


@pytest.fixture(scope="module")
def url(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service on a real port that wants a key."""
    service = Service(tmp_path_factory.mktemp("data"), ServedModel.read(models[0]), shards=2)
    key = Key(name="all", sha256=SHA256, scopes=frozenset({"ingest", "read", "admin"}))
    with running(service, Keys([key])) as found:
        yield found


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, key=SECRET) as found:
        yield found


def test_the_document_runs(
    url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KEY, SECRET)
    text = (Path(__file__).parents[2] / "docs" / "client.md").read_text()
    codes = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert codes
    for code in codes:
        exec(compile(code.replace("http://127.0.0.1:8000", url), "client.md", "exec"), {})
    assert "i0" in capsys.readouterr().out


class Between(ThreadingHTTPServer):
    """Hands requests on to a service, unless it has something else to do with them.

    Args:
        url: of the service.
        acts: what to do with the first requests: a status and its headers, ``drop`` to hang up at
            once, or ``lose`` to hand the request on and hang up without the answer.
    """

    daemon_threads = True

    def __init__(self, url: str, acts: list[Any]) -> None:
        super().__init__(("127.0.0.1", 0), Passing)
        self.behind, self.acts = httpx.URL(url), acts
        self.asked: list[tuple[float, str]] = []


class Passing(BaseHTTPRequestHandler):
    server: Between
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((time.monotonic(), f"{self.command} {self.path}"))
        act = self.server.acts.pop(0) if self.server.acts else None
        if act == "drop":
            self.close_connection = True
            return
        if isinstance(act, tuple):
            status, headers = act
            self.answer(status, headers, b'{"detail": "wait"}')
            return
        behind = self.server.behind
        connection = http.client.HTTPConnection(behind.host, behind.port or 80, timeout=10)
        connection.request(self.command, self.path, body, dict(self.headers))
        found = connection.getresponse()
        read = found.read()
        connection.close()
        if act == "lose":
            self.close_connection = True
            return
        self.answer(found.status, {}, read)

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_DELETE = handle_any  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def between(url: str, *acts: Any) -> Iterator[tuple[str, Between]]:
    with Between(url, list(acts)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", server
        server.shutdown()
        thread.join()


def test_everything_that_can_be_asked(client: Client, models: list[Path]) -> None:
    assert client.ready()
    receipts = client.send(event("a", n, event_id=f"a{n}") for n in range(5))
    assert all(one.new for one in receipts)
    assert [one.offset for one in receipts] == sorted(one.offset for one in receipts)
    assert not any(one.new for one in client.send(event("a", n, event_id=f"a{n}") for n in (2, 3)))
    found = client.recommend("a", k=3, min_offset=receipts[-1].offset)
    assert (found.items[0].item_id, found.known, found.stale) == ("i05", True, False)
    allowed = client.recommend("a", k=9, among=["i05", "i07", "i09"], exclude=["i07"])
    assert {one.item_id for one in allowed.items} == {"i05", "i09"}
    assert len(client.recommend("a", k=ITEMS, at=1_800_000_000, filter_seen=False).items) == ITEMS
    assert [one.item_id for one in client.rank("a", ["i09", "i05"]).items] == ["i05", "i09"]
    ranked = client.rank("a", ["i09", *(f"x{n}" for n in range(30)), "x0"])
    assert [one.item_id for one in ranked.items] == ["i09"]
    assert (ranked.unknown.count, ranked.unknown.item_ids[:2]) == (30, ["x0", "x1"])
    assert len(ranked.unknown.item_ids) == MAX_UNKNOWN
    assert len(client.similar("i03", k=2).items) == 2
    about = client.user("a")
    assert (about.events, about.history[0].item_id) == (5, "i04")
    assert client.hide(["i05"]) == client.hidden() == ["i05"]
    assert client.recommend("a", k=1).items[0].item_id != "i05"
    assert client.hide([]) == []
    first = client.model()
    second = client.switch(str(models[1]))
    assert second.previous == first.digest != second.digest
    assert client.roll_back().digest == first.digest
    assert client.erase("a") == 5
    with pytest.raises(ServiceError, match="no such user") as missing:
        client.user("a")
    assert missing.value.status == 404


def test_many_events_go_in_calls_and_keep_their_order(url: str) -> None:
    with between(url) as (near, server), Client(near, key=SECRET) as client:
        receipts = client.send(event("m", n) for n in range(2_500))
        assert len(server.asked) == 3
        assert len(receipts) == 2_500
        history = client.user("m").history
        assert [one.timestamp - 1_700_000_000 for one in history[:3]] == [2_499, 2_498, 2_497]
        assert client.send([]) == []


@given(st.lists(st.integers(1, 60_000), max_size=60))
def test_calls_are_small_and_whole(sizes: list[int]) -> None:
    events = [
        EventIn(user_id="u", item_id="i", timestamp=n, fields={"x" * 128: n, "y": size})
        for n, size in enumerate(sizes)
        for _ in range(size // 500)
    ]
    bodies = list(_bodies(events))
    assert all(len(body) < MAX_BYTES + 100 for body in bodies)
    parts = [json.loads(body)["events"] for body in bodies]
    assert all(0 < len(part) <= MAX_EVENTS for part in parts)
    assert [msgspec.convert(one, EventIn) for part in parts for one in part] == events


@pytest.mark.parametrize("act", ["drop", "lose", (429, {"Retry-After": "0"}), (503, {})])
def test_what_fails_on_the_way_is_done_once(url: str, act: Any) -> None:
    user = f"once {act}"
    with between(url, act, act) as (near, server), Client(near, key=SECRET) as client:
        client.send([event(user, 1, event_id=user), event(user, 2, event_id=f"{user} 2")])
        assert len(server.asked) == 3
        assert client.user(user).events == 2


def test_the_service_says_when_to_come_back(url: str) -> None:
    with between(url, (429, {"Retry-After": "0.4"})) as (near, server), Client(near) as client:
        with pytest.raises(ServiceError) as refused:
            client.model()
        assert refused.value.status == 401
        (first, _), (second, _) = server.asked
        assert second - first >= 0.4


def test_patience_ends(url: str) -> None:
    wait = (503, {"Retry-After": "9"})
    with between(url, wait, wait) as (near, server), Client(near, patience=2.0) as client:
        with pytest.raises(ServiceError) as refused:
            client.model()
        # it would have to wait for too long, and does not
        assert len(server.asked) == 1
        assert (refused.value.status, refused.value.detail) == (503, "wait")
        assert not client.ready()
    with Client("http://127.0.0.1:9", patience=0.3) as client:
        with pytest.raises(UnreachableError, match="is the service running there") as lost:
            client.send([event("a", 1)])
        assert "0 events before these" in lost.value.__notes__[0]
        assert not client.ready()


def test_a_slow_service_is_left_in_time(url: str) -> None:
    # no process accepts, so no answer comes
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with (
            Client(near, timeout=0.2, patience=0.0) as client,
            pytest.raises(UnreachableError, match="ReadTimeout"),
        ):
            client.model()


def test_a_rollback_is_not_done_twice(url: str, models: list[Path]) -> None:
    with Client(url, key=SECRET) as client:
        client.switch(str(models[1]))
        client.switch(str(models[0]))
        live = client.model()
        with between(url, "lose") as (near, server), Client(near, key=SECRET) as other:
            with pytest.raises(UnreachableError, match="may have been done"):
                other.roll_back()
            assert len(server.asked) == 1
        assert client.model().digest == live.previous


def test_what_is_wrong_is_named(client: Client, url: str) -> None:
    with pytest.raises(ValueError, match="timestamp"):
        client.send([event("a", 1), {"user_id": "a", "item_id": "i"}])
    with pytest.raises(ValueError, match="k"):
        client.recommend("a", k=0)
    with pytest.raises(ServiceError, match=r"POST /v1/recommend: 422, user_id: expected str"):
        client.recommend(7)
    with pytest.raises(ServiceError, match=r"GET /v1/items/i01/similar: 422, .*k") as refused:
        client.similar("i01", k=0)
    assert refused.value.status == 422
    with (
        between(url, (200, {})) as (near, _),
        Client(near) as other,
        pytest.raises(ServiceError, match="expected ModelOut, received something else"),
    ):
        other.model()


def test_the_key_is_sent_and_never_shown(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, SECRET)
    with Client(url) as client:
        assert client.model().items == ITEMS
        assert SECRET not in repr(client) + repr(vars(client))
    with Client(url, key="another") as client, pytest.raises(ServiceError, match="401") as refused:
        client.model()
    assert "another" not in str(refused.value)
    for wrong in ("a\nb", "ключ"):
        with pytest.raises(ValueError, match="printable ASCII") as bad:
            Client(url, key=wrong)
        assert wrong not in str(bad.value)


@pytest.mark.parametrize("name", ["a b", "a?b=1", "%2e", "...", "é#", "\x00", "a/b", "/", "{}"])
def test_any_id_can_be_read_and_erased(client: Client, name: str) -> None:
    client.send([event(name, 1), event("another", 1)])
    assert client.user(name).user_id == name
    assert client.erase(name) == 1
    assert client.user("another").events == 1


def test_a_date_says_when_to_come_back() -> None:
    def said(value: str) -> float:
        return _retry_after(httpx.Response(503, headers={"Retry-After": value}))

    assert 50 < said(formatdate(time.time() + 60, usegmt=True)) <= 60
    assert said(formatdate(time.time() - 60)) == 0
    assert [said(value) for value in ("", "soon", "-3", "2")] == [0, 0, 0, 2]
    assert _part(-5) == "-5"


def test_the_client_is_light() -> None:
    run = "import sys; import everlong.client.client; print(*sys.modules)"
    command = [sys.executable, "-c", run]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "polars", "numba", "starlette", "sqlite3"} & set(loaded)
    assert "httpx" in loaded
