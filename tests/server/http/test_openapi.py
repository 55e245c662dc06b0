"""The service against requests made from its own description, and against its limits."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

pytest.importorskip("starlette")
pytest.importorskip("schemathesis")
import httpx
from tests.forms import forms
from tests.server_models import walk
from tests.server_running import running

import everlong
from everlong.data.split import PAPER
from everlong.server.engine.served_model import ServedModel
from everlong.server.engine.service import Service
from everlong.server.http.keys import Key, Keys
from everlong.server.http.limits import MAX_BODY

SECRET = "open sesame"
AUTHORIZED = {"Authorization": f"Bearer {SECRET}"}
JSON = {"Content-Type": "application/json"}

# of what kind the ids of the log are, and which folders hold models, no description can say; and
# where two routes share a path, a 405 names the methods of one of them
EXCLUDED = "positive_data_acceptance,allow_header_conformance"


@pytest.fixture(scope="module", params=["text", "integer"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The service of a log with ids of each kind, on a real port."""
    folder, log = tmp_path_factory.mktemp(request.param), walk()
    if request.param == "integer":
        log = log.with_columns(pl.col("user_id", "item_id").str.slice(1).cast(pl.Int64))
    everlong.fit(
        log,
        "lru",
        architecture={"dim": 8, "channels": 8},
        training={"epochs": 1, "batch_events": 64},
        protocol=PAPER.replace({"seen": "keep"}),
    ).save(folder / "model")
    service = Service(folder / "data", ServedModel.read(folder / "model"), shards=2)
    digest = hashlib.sha256(SECRET.encode()).hexdigest()
    key = Key(name="all", sha256=digest, scopes=frozenset({"ingest", "read", "admin"}))
    with running(service, Keys([key])) as found:
        yield found


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, headers=AUTHORIZED, timeout=30) as found:
        yield found


@pytest.mark.parametrize("examples", forms("EXAMPLES", "1", "200"))
def test_the_service_keeps_to_its_description(url: str, tmp_path: Path, examples: str) -> None:
    """Requests at the edges of the schemas, made up ones, and chains of them; wrong keys too.

    So many are made up for each operation.
    """
    command = [Path(sys.executable).with_name("schemathesis"), "run", f"{url}/openapi.json"]
    command += ["--header", f"Authorization: Bearer {SECRET}", "--exclude-checks", EXCLUDED]
    command += ["--max-examples", examples, "--seed", "1", "--continue-on-failure", "--no-color"]
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=3_600
    )
    assert run.returncode == 0, run.stdout + run.stderr
    # and there were some
    assert re.search(r"Tested: 1\d", run.stdout), run.stdout
    assert httpx.get(f"{url}/readyz").json() == {"status": "ready"}


def event(**more: Any) -> dict[str, Any]:
    return {"user_id": "a", "item_id": "b", "timestamp": 1, **more}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/recommend", b'{"user_id": NaN}'),
        ("/v1/recommend", b'{"user_id": "a", "at": Infinity}'),
        ("/v1/recommend", b'{"user_id": "\\ud800"}'),
        ("/v1/recommend", b'{"user_id": ' + b"1" * 5_000 + b"}"),
        ("/v1/recommend", b'{"user_id": "\xff"}'),
        ("/v1/recommend", b'{"user_id": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        ("/v1/recommend", b'{"user_id":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}"),
        ("/v1/rank", b'{"user_id": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        ("/v1/rank", b'{"user_id": NaN, "candidates": ["\\udc00"]}'),
        ("/v1/model", b'{"folder": "\\ud800"}'),
        ("/v1/model", b'{"folder": "\\u0000"}'),
        ("/v1/model", b'{"folder": "/dev/zero"}'),
        ("/v1/events", b'{"events": [' + b"{}," * 100_000 + b"{}]}"),
        ("/v1/events", json.dumps({"events": [event(fields={"\ud800": 1})]}).encode()),
        ("/v1/events", json.dumps({"events": [event(fields={"x": float("nan")})]}).encode()),
        ("/v1/events", json.dumps({"events": [event(fields={"x": 10**400})]}).encode()),
        ("/v1/events", json.dumps({"events": [event()] * 1_001}).encode()),
        ("/v1/events", json.dumps({"events": [dict.fromkeys(map(str, range(70_000)))]}).encode()),
        ("/v1/events", b""),
    ],
)
def test_what_is_wrong_is_refused_shortly(client: httpx.Client, path: str, body: bytes) -> None:
    found = client.post(path, content=body, headers=JSON)
    assert found.status_code in (400, 422)
    # neither repeated at length nor answered at length
    assert len(found.content) < 4_000
    assert isinstance(found.json()["detail"], str)


@pytest.mark.parametrize(
    "name", [str(10**30), "-0", "+1", "1_0", "%D9%A1", "%00", "%FF", "a%2Fb", "x" * 4_000, "%20"]
)
def test_odd_ids_in_paths(client: httpx.Client, name: str) -> None:
    for method, path in (
        ("GET", f"/v1/users/{name}"),
        ("DELETE", f"/v1/users/{name}"),
        ("GET", f"/v1/items/{name}/similar"),
    ):
        assert client.request(method, path).status_code in (200, 404, 422)


def test_a_body_of_one_byte_too_many(client: httpx.Client) -> None:
    def body(size: int) -> bytes:
        return b'{"user_id": "' + b"x" * (size - 15) + b'"}'

    def parts(size: int) -> Iterator[bytes]:
        whole = body(size)
        for start in range(0, size, 1 << 16):
            yield whole[start : start + (1 << 16)]

    for size, status in ((MAX_BODY, 422), (MAX_BODY + 1, 413)):
        assert len(body(size)) == size
        for content in (body(size), parts(size)):
            found = client.post("/v1/recommend", content=content, headers=JSON)
            assert found.status_code == status
            assert isinstance(found.json()["detail"], str)


def resident() -> int:
    """Bytes of memory that this process, and so the service in it, takes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux")
@pytest.mark.parametrize("count", forms("WRONG_KEYS", "300", "10000"))
def test_wrong_keys_cost_nothing(url: str, count: str) -> None:
    with httpx.Client(base_url=url) as client:
        client.get("/v1/model")
        before = resident()
        for number in range(int(count)):
            found = client.get("/v1/model", headers={"Authorization": f"Bearer {number}"})
            assert found.status_code == 401
        assert resident() - before < 50_000_000
        assert client.get("/v1/model", headers=AUTHORIZED).status_code == 200


def test_slow_clients_do_not_delay_other_requests(url: str) -> None:
    """Connections stay open, each for little memory; a proxy in front ends them in time."""
    place = httpx.URL(url)
    slow = [socket.create_connection((place.host, place.port or 80)) for _ in range(100)]
    try:
        for one in slow:
            one.sendall(b"POST /v1/recommend HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\nX: ")
        for letter in b"slow":
            for one in slow:
                one.sendall(bytes([letter]))
            # answered while all of them are still open
            found = httpx.get(f"{url}/v1/model", headers=AUTHORIZED, timeout=30)
            assert found.status_code == 200
    finally:
        for one in slow:
            one.close()
