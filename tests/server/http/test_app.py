"""The service over HTTP: requests, answers, access and refusals."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
import httpx
import msgspec
from starlette.testclient import TestClient
from tests.server_models import ITEMS, event

from everlong.server.engine.served_model import ServedModel
from everlong.server.engine.service import Service
from everlong.server.http.app import make_app
from everlong.server.http.keys import Key, Keys
from everlong.server.http.limits import MAX_BODY
from everlong.server.http.run import is_loopback, run_service


@pytest.fixture
def service(tmp_path: Path, models: list[Path]) -> Service:
    return Service(tmp_path / "data", ServedModel.read(models[0]), shards=2)


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(make_app(service), base_url="http://localhost") as found:
        yield found


def test_events_and_recommendations(client: TestClient) -> None:
    events = [event(user, n) for n in range(5) for user in ("a", "b")]
    receipts = client.post("/v1/events", json={"events": events}).json()["receipts"]
    assert all(r["new"] for r in receipts)
    assert len({(r["shard"], r["offset"]) for r in receipts}) == 10
    again = client.post("/v1/events", json={"events": events[3:5]}).json()["receipts"]
    assert again == [{**r, "new": False} for r in receipts[3:5]]
    newest = max(r["offset"] for r, e in zip(receipts, events, strict=True) if e["user_id"] == "a")
    wanted = {"user_id": "a", "k": 3, "min_offset": newest}
    found = client.post("/v1/recommend", json=wanted).json()
    assert found["items"][0]["item_id"] == "i05"
    assert (found["known"], found["stale"]) == (True, False)
    scores = [item["score"] for item in found["items"]]
    assert scores == sorted(scores, reverse=True)
    assert client.post("/v1/recommend", json={**wanted, "min_offset": 10**6}).json()["stale"]
    assert not client.post("/v1/recommend", json={"user_id": "stranger"}).json()["known"]
    about = client.get("/v1/users/a").json()
    assert (about["events"], about["last_offset"]) == (5, newest)
    assert [e["item_id"] for e in about["history"]] == [f"i{n:02d}" for n in range(4, -1, -1)]
    ranked = client.post("/v1/rank", json={"user_id": "a", "candidates": ["i09", "i05", "x"]})
    assert [item["item_id"] for item in ranked.json()["items"]] == ["i05", "i09"]
    assert ranked.json()["unknown"] == {"count": 1, "item_ids": ["x"]}
    near = client.get("/v1/items/i03/similar", params={"k": 2}).json()["items"]
    assert len(near) == 2
    assert client.delete("/v1/users/a").json() == {"events": 5}
    assert client.get("/v1/users/a").status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/events", {"events": []}, 422),
        ("/v1/events", {"events": [event("a", n) for n in range(1_001)]}, 422),
        ("/v1/events", {"events": [event("a", 1, extra=1)]}, 422),
        ("/v1/events", {"events": [event("a" * 129, 1)]}, 422),
        ("/v1/events", {"events": [{**event("a", 1), "timestamp": -1}]}, 422),
        ("/v1/events", {"events": [{**event("a", 1), "timestamp": 1 << 41}]}, 422),
        ("/v1/events", {"events": [{**event("a", 1), "user_id": 7}]}, 422),
        ("/v1/events", {"events": [{**event("a", 1), "user_id": True}]}, 422),
        ("/v1/recommend", {"user_id": "a", "k": 0}, 422),
        ("/v1/recommend", {"user_id": "a", "k": 1_001}, 422),
        ("/v1/recommend", {"user_id": 5}, 422),
        ("/v1/recommend", {"user_id": "a", "among": ["x"] * 5_001}, 422),
        ("/v1/rank", {"user_id": "a", "candidates": []}, 422),
        ("/v1/model", {"folder": "/nowhere"}, 422),
        ("/v1/model/rollback", {}, 404),
    ],
)
def test_what_is_refused(client: TestClient, path: str, body: Any, status: int) -> None:
    assert client.post(path, json=body).status_code == status


def test_bodies_are_bounded_whatever_they_say(client: TestClient) -> None:
    big = b'{"events": "' + b"x" * MAX_BODY + b'"}'
    client.headers["content-type"] = "application/json"
    assert client.post("/v1/events", content=big).status_code == 413

    def parts() -> Iterator[bytes]:
        for start in range(0, len(big), 1 << 16):
            yield big[start : start + (1 << 16)]

    assert client.post("/v1/events", content=parts()).status_code == 413
    assert client.post("/v1/events", content=b"[" * 100_000).status_code == 422
    assert client.post("/v1/events", content=b'{"events": NaN}').status_code == 422
    # what a form of a foreign page would send
    plain = {"content-type": "text/plain"}
    body = json.dumps({"events": [event("a", 1)]}).encode()
    assert client.post("/v1/events", content=body, headers=plain).status_code == 422
    assert client.post("/v1/events", content=body).status_code == 200
    # a refusal is small, whatever came in
    wrong = {"events": [{f"x{n}": n for n in range(100)}] * 500}
    refused = client.post("/v1/events", json=wrong)
    assert refused.status_code == 422
    assert len(refused.content) < 4_000


def test_pages_from_elsewhere_are_refused(client: TestClient) -> None:
    body = json.dumps({"events": [event("a", 1)]}).encode()
    elsewhere = {"origin": "https://elsewhere.example"}
    for path, kind in (
        ("/v1/events", "text/plain; x=json"),
        ("/v1/events", "application/json"),
        ("/v1/model/rollback", ""),
    ):
        headers = {**elsewhere, "content-type": kind}
        assert client.post(path, content=body, headers=headers).status_code == 403
    plain = {"content-type": "text/plain; x=json"}
    assert client.post("/v1/events", content=body, headers=plain).status_code == 422
    named = {"host": "elsewhere.example"}
    assert client.get("/v1/model", headers=named).status_code == 400
    own = {"origin": "http://localhost", "content-type": "application/json"}
    assert client.post("/v1/events", content=body, headers=own).status_code == 200


def test_a_key_is_asked_for_before_a_body_is_read(service: Service) -> None:
    keys = Keys([Key(name="x", sha256="0" * 64, scopes=frozenset({"read"}))])

    with TestClient(make_app(service, keys), base_url="http://localhost") as client:
        for path in ("/v1/rank", "/v1/model", "/v1/events"):
            assert client.post(path, content=b"[" * 1_000_000).status_code == 401


def test_requests_beyond_the_bound_are_refused_at_once(service: Service) -> None:
    go = threading.Event()
    service.shards[0].erase = lambda user: held  # type: ignore[method-assign]
    service.shards[1].erase = service.shards[0].erase  # type: ignore[method-assign]
    held: Future[int] = Future()
    app = make_app(service, max_at_once=4)
    with TestClient(app, base_url="http://localhost") as client:
        statuses: list[int] = []

        def ask() -> None:
            answer = client.delete("/v1/users/a")
            statuses.append(answer.status_code)
            if answer.status_code == 503:
                assert answer.headers["retry-after"] == "1"
                go.set()

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        assert go.wait(10)
        # probes are answered all the same
        assert client.get("/livez").status_code == 200
        held.set_result(0)
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [200] * 4 + [503]
        assert client.get("/v1/model").status_code == 200


def test_keys_and_scopes(service: Service, tmp_path: Path) -> None:
    def key(name: str, *scopes: str) -> dict[str, Any]:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return {"name": name, "sha256": digest, "scopes": list(scopes)}

    path = tmp_path / "keys.json"
    path.write_text(json.dumps([key("writer", "ingest"), key("reader", "read")]))
    with TestClient(make_app(service, Keys.read(path)), base_url="http://localhost") as client:
        asked = {"user_id": "a"}
        for secret, expected in ((None, 401), ("wrong", 401), ("writer", 403), ("reader", 200)):
            headers = {"Authorization": f"Bearer {secret}"} if secret else {}
            found = client.post("/v1/recommend", json=asked, headers=headers)
            assert found.status_code == expected
        assert client.get("/livez").status_code == 200
        assert client.get("/metrics").status_code == 401
    path.write_text('[{"name": "x", "secret": "keep quiet"}]')
    with pytest.raises(ValueError, match="expected a JSON list of keys") as refused:
        Keys.read(path)
    assert "keep quiet" not in str(refused.value)
    assert Keys([msgspec.convert(key("a", "admin"), Key)]).allow("a", "admin")


def test_models_change_places(client: TestClient, models: list[Path]) -> None:
    first = client.get("/v1/model").json()
    assert first["items"] == ITEMS
    second = client.post("/v1/model", json={"folder": str(models[1])}).json()
    assert second["previous"] == first["digest"] != second["digest"]
    assert client.post("/v1/model/rollback").json()["digest"] == first["digest"]


def test_health_and_metrics(client: TestClient, service: Service) -> None:
    assert client.get("/readyz").json() == {"status": "ready"}
    client.post("/v1/events", json={"events": [event("a", 1), event("a", 1)]})
    text = client.get("/metrics").text
    assert "everlong_applied_events_total 1.0" in text
    assert "everlong_repeated_events_total 1.0" in text
    assert 'route="/v1/events",status="200"' in text
    service.shards[0].writer.writable = False
    assert client.get("/readyz").status_code == 503
    schema = client.get("/openapi.json").json()
    assert {"/v1/events", "/v1/recommend", "/v1/rank"} <= set(schema["paths"])


def test_the_command_serves_and_ends_without_losing_anything(
    models: list[Path], tmp_path: Path
) -> None:
    run = "from everlong.cli.app import app; app()"
    command = [sys.executable, "-c", run, "serve", str(models[0])]
    command += ["--data-dir", str(tmp_path / "data"), "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    users = []
    for turn in range(2):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert process.stdout is not None
        address = process.stdout.readline().split()[-1]
        users.append(process.stdout.readline().split()[0])
        with httpx.Client(base_url=address) as client:
            events = [event(f"u{turn}", n) for n in range(5)]
            assert client.post("/v1/events", json={"events": events}).status_code == 200
            found = client.post("/v1/recommend", json={"user_id": f"u{turn}", "k": 1}).json()
            assert found["items"][0]["item_id"] == "i05"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)
        process.stdout.close()
    assert users == ["0", "1"]


def test_an_address_that_others_reach_needs_keys(models: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected --keys"):
        run_service(models[0], tmp_path, host="0.0.0.0", port=0, keys=None, shards=1, say=print)
    assert is_loopback("::1")
    assert not is_loopback("example.org")
