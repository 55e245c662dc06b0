"""The console and the page of routes: in a real browser, from a real server, by keyboard."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

pytest.importorskip("starlette")
pytest.importorskip("selenium")
import httpx
from selenium import webdriver
from selenium.webdriver.chrome.service import Service as Driver
from selenium.webdriver.common.keys import Keys as Press
from selenium.webdriver.support.ui import WebDriverWait
from tests.server_models import walk
from tests.server_running import running

import everlong
from everlong.data.split import PAPER
from everlong.server.engine.served_model import ServedModel
from everlong.server.engine.service import Service
from everlong.server.http.console import FILES, HEADERS, PAGES
from everlong.server.http.keys import Keys

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM.exists() and DRIVER.exists()),
    reason=f"needs {CHROMIUM} and {DRIVER} (Debian: chromium, chromium-driver)",
)
FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-component-update
    --disable-background-networking --disable-sync --disable-dev-shm-usage
"""
IMG = "<img src=x onerror=\"document.title='broken'\">"


@pytest.fixture(scope="module")
def folder(models: list[Path]) -> Path:
    return models[0]


@pytest.fixture(scope="module")
def address(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    data = tmp_path_factory.mktemp("data")
    with running(Service(data, ServedModel.read(folder), shards=2)) as found:
        yield found


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Driver(str(DRIVER)))
    yield driver
    driver.quit()


class Page:
    """A reader at the page."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)

    def text(self, css: str) -> str:
        return next(iter(self.texts(css)), "")

    def texts(self, css: str) -> list[str]:
        # all at one moment: the page may change between two looks
        found: list[str] = self.run(
            f"[...document.querySelectorAll({css!r})].map((one) => one.innerText.trim())"
        )
        return found

    def run(self, script: str) -> Any:
        return self.driver.execute_script(f"return {script}")

    def until(self, true: Callable[[], bool]) -> None:
        WebDriverWait(self.driver, 15, 0.05).until(lambda _: true())

    def said(self, part: str) -> None:
        self.until(lambda: part in self.text("#said"))

    def error(self, *parts: str) -> None:
        self.until(lambda: all(part in self.text("#error") for part in parts))

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def tab_to(self, name: str) -> None:
        """Goes on by Tab, never by mouse."""
        for _ in range(40):
            if self.run("document.activeElement.id") == name:
                return
            self.press(Press.TAB)
        raise AssertionError(f"Tab never came to {name}")

    def ranked(self) -> list[str]:
        return self.texts("#list .id")

    def console(self) -> list[str]:
        """What the browser complained of since the last look."""
        return [f"{one['level']} {one['message']}" for one in self.driver.get_log("browser")]

    def asked(self) -> list[str]:
        """Every address that the browser asked for since the last look."""
        told = (json.loads(one["message"])["message"] for one in self.driver.get_log("performance"))
        return [
            one["params"]["request"]["url"]
            for one in told
            if one["method"] == "Network.requestWillBeSent"
        ]


@pytest.fixture
def page(chromium: webdriver.Chrome) -> Iterator[Page]:
    chromium.get("about:blank")
    found = Page(chromium)
    found.console(), found.asked()
    yield found
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def sent(address: str, user: str, items: list[str], times: list[int]) -> None:
    events = [
        {"user_id": user, "item_id": item, "timestamp": 1_700_000_000 + time}
        for item, time in zip(items, times, strict=True)
    ]
    httpx.post(f"{address}/v1/events", json={"events": events}).raise_for_status()


def recommended(address: str, user: str, **more: Any) -> list[str]:
    wanted = {"user_id": user, **more}
    answer = httpx.post(f"{address}/v1/recommend", json=wanted).raise_for_status()
    return [item["item_id"] for item in answer.json()["items"]]


@pytest.mark.parametrize("path", PAGES)
def test_pages_come_with_strict_headers(address: str, path: str) -> None:
    answer = httpx.get(address + path)
    assert answer.status_code == 200
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert "unsafe" not in answer.headers["Content-Security-Policy"]
    assert httpx.head(address + path).headers["Content-Type"] == answer.headers["Content-Type"]
    assert path not in httpx.get(f"{address}/openapi.json").json()["paths"]


def test_files_hold_no_markup_from_text_and_nothing_from_elsewhere() -> None:
    own = {name for name in PAGES.values() if "/" not in name}
    assert {file.name for file in FILES.iterdir() if file.is_file()} == own
    for name in own:
        text = (FILES / name).read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|\burl\(|@import", text), name
        assert not re.search(r"(inner|outer)HTML|insertAdjacent|document\.write|eval\(", text)
        assert not re.search(
            r"<script(?! (type=\"module\"|defer) src=)|<style|\son\w+=|\sstyle=", text
        )


def test_the_viewer_is_the_published_one_with_its_licence() -> None:
    files = {file.name: file.read_bytes() for file in (FILES / "swagger-ui").iterdir()}
    digests = {name: hashlib.sha256(content).hexdigest()[:16] for name, content in files.items()}
    assert digests["swagger-ui-bundle.js"] == "e6a898692f2d768e"
    assert digests["swagger-ui.css"] == "5ed08757e53da3e0"
    assert b"Apache License" in files["LICENSE"]
    assert {"NOTICE", "swagger-ui-bundle.js.LICENSE.txt"} <= set(files)


@pytest.mark.browser
@needs_browser
def test_a_user_by_keyboard_and_what_an_event_changes(page: Page, address: str) -> None:
    sent(address, "ada", ["i00", "i01", "i02", "i03", "i01"], [0, 60, 7260, 7320, 7000])
    page.open(address)
    page.press(Press.TAB)
    assert page.text(":focus") == "Skip to the user"
    page.press(Press.ENTER)
    page.tab_to("user")
    page.press("ada", Press.ENTER)
    page.said("ada: 5 events.")
    assert page.driver.current_url == f"{address}/?user=ada"
    before = page.ranked()
    assert before == recommended(address, "ada", filter_seen=True)
    assert page.texts("#history .id") == ["i01", "i03", "i02", "i01", "i00"]
    assert page.texts("#history .gap") == ["2 hours between"]
    assert page.texts("#history .late") == ["late by 5 minutes"]
    assert page.text("#history time") == "2023-11-15 00:10:00"
    widths = page.run("[...document.querySelectorAll('.bar')].map((bar) => bar.offsetWidth)")
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > 2 * widths[-1] > 0

    page.tab_to("item")
    page.press("i04", Press.ENTER)
    page.said("The event is on disk and in the state: offset")
    after = recommended(address, "ada", filter_seen=True)
    assert page.ranked() == after
    assert "i04" not in after
    assert page.text("#gone") == f"Gone: {', '.join(i for i in before if i not in after)}"
    marks = []
    for rank, item in enumerate(after):
        by = before.index(item) - rank if item in before else None
        marks.append("new" if by is None else f"↑ {by}" if by > 0 else f"↓ {-by}" if by else "")
    assert page.texts("#list .mark") == marks
    assert any(marks)
    assert page.text("#history .fresh .id") == "i04"
    about = httpx.get(f"{address}/v1/users/ada").json()
    assert abs(about["newest"] - time.time()) < 60
    facts = dict(zip(page.texts("#user-facts dt"), page.texts("#user-facts dd"), strict=True))
    assert facts["Events applied"] == str(about["events"]) == "6"
    assert facts["Last offset"] == str(about["last_offset"])
    assert facts["Shard"] == str(about["shard"])
    assert facts["State size"] == f"{about['state_bytes']} bytes"
    model = httpx.get(f"{address}/v1/model").json()
    assert model["digest"] in page.text("#model-facts")
    assert page.texts("#calls th") == ["GET model", "GET users", "POST recommend", "POST events"]
    assert all(float(value) > 0 for value in page.texts("#calls td"))
    page.until(lambda: page.texts(".lamp") == ["live", "ready"])

    page.tab_to("send")
    page.press(Press.TAB)
    choice = page.text(":focus")
    assert choice == after[0]
    page.press(Press.SPACE)
    assert page.run("document.activeElement.id") == "send"
    page.press(Press.ENTER)
    page.until(lambda: page.texts("#history .id")[0] == choice)

    assert page.console() == []
    asked = page.asked()
    assert f"{address}/v1/recommend" in asked
    assert all(url.startswith((f"{address}/", "data:image/svg")) for url in asked)


@pytest.mark.browser
@needs_browser
def test_a_second_delivery_a_time_and_the_switches(page: Page, address: str) -> None:
    sent(address, "bob", ["i00", "i01", "i02"], [0, 60, 120])
    page.open(f"{address}/?user=bob")
    page.said("bob: 3 events.")
    page.run("document.getElementById('now').click()")
    for new in (True, False):
        page.run("document.getElementById('time').value = '2023-11-14T23:00:00'")
        page.tab_to("item")
        page.press("i03", Press.ENTER)
        page.said("on disk" if new else "delivered before")
        assert page.text("#history time") == "2023-11-14 23:00:00"
    assert page.text("#said").endswith("The list is as before.")
    page.run("document.getElementById('seen').click()")
    page.until(lambda: page.ranked() == recommended(address, "bob", filter_seen=False))
    assert page.texts("#list .mark") == []
    page.tab_to("k")
    page.press(Press.CONTROL + "a", "3", Press.TAB)
    page.until(lambda: len(page.ranked()) == 3)
    page.run("(document.getElementById('fields').value = '{no', 1)")
    page.tab_to("item")
    page.press("i05", Press.ENTER)
    page.error("Fields of the event", "expected JSON")
    assert page.console() == []


@pytest.mark.browser
@needs_browser
def test_a_user_is_unknown_until_an_event(page: Page, address: str) -> None:
    page.open(f"{address}/?user=eve/a%3F%23 b")
    page.said("is not known")
    assert page.text("#user-facts") == "Id\neve/a?# b\nState\nnone: not known"
    assert page.ranked() == recommended(address, "eve/a?# b")
    page.open(f"{address}/?user=carol")
    page.said("carol is not known")
    page.tab_to("item")
    page.press("no such item", Press.ENTER)
    page.said("on disk")
    assert page.texts("#history .id") == ["no such item"]
    assert all("404" in line for line in page.console())
    page.driver.back()
    page.said("eve")


@pytest.mark.browser
@needs_browser
def test_back_and_again(page: Page, address: str) -> None:
    sent(address, "dan", ["i00"], [0])
    page.open(address)
    assert page.text("#hello h2")
    page.tab_to("user")
    page.press("dan", Press.ENTER)
    page.said("dan: 1 event.")
    assert not page.run("document.getElementById('hello').offsetHeight")
    page.press(Press.ENTER)
    page.said("The list is as before.")
    page.driver.back()
    page.until(lambda: bool(page.run("document.getElementById('hello').offsetHeight")))
    assert not page.run("document.getElementById('board').offsetHeight")
    assert page.text("#said") == ""
    assert page.console() == []


@pytest.mark.browser
@needs_browser
def test_ids_are_text(page: Page, address: str) -> None:
    sent(address, IMG, [IMG, "<script>document.title='broken'</script>"], [0, 1])
    page.open(address)
    page.tab_to("user")
    page.press(IMG, Press.ENTER)
    page.said(f"{IMG}: 2 events.")
    assert IMG in page.texts("#history .id")
    assert page.text("#event-user") == IMG
    assert page.driver.title.startswith(IMG)
    assert page.run("document.querySelectorAll('main img, main script').length") == 0
    assert page.console() == []


@pytest.mark.browser
@needs_browser
def test_keys(page: Page, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    scopes = {"all": ["ingest", "read"], "reader": ["read"]}
    path.write_text(
        json.dumps(
            [
                {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "scopes": some}
                for name, some in scopes.items()
            ]
        )
    )

    def give(key: str) -> None:
        if not page.run("document.getElementById('key-box').open"):
            page.run("document.querySelector('#key-box summary').focus()")
            page.press(Press.ENTER)
        page.run("document.getElementById('key').focus()")
        page.press(key, Press.ENTER)

    service = Service(tmp_path / "data", ServedModel.read(folder))
    with running(service, Keys.read(path)) as address:
        page.open(f"{address}/?user=ann")
        page.error("401 · GET /v1/users", "expected a key")
        page.until(lambda: page.texts(".lamp") == ["live", "ready"])
        give("wrong")
        page.until(lambda: page.text("#key-state") == "set")
        page.error("401 · GET /v1/users", "expected a key")
        give("reader")
        page.said("ann is not known")
        assert page.run("JSON.stringify(sessionStorage)") == '{"everlong-key":"reader"}'
        assert page.run("localStorage.length + document.cookie.length") == 0
        page.tab_to("item")
        page.press("i01", Press.ENTER)
        page.error("403 · POST /v1/events", "expected a key with scope ingest")
        give("all")
        page.until(lambda: page.text("#error") == "")
        page.tab_to("item")
        page.press(Press.CONTROL + "a", "i01", Press.ENTER)
        page.said("on disk")
        service.shards[0].writer.writable = False
        page.driver.refresh()
        page.until(lambda: page.texts(".lamp") == ["live", "not ready: events cannot be written"])
        assert "all" not in page.driver.current_url
    page.tab_to("user")
    page.press(Press.ENTER)
    page.error("GET /v1/users", "no answer")
    page.console()


@pytest.mark.browser
@needs_browser
def test_numbers_stay_whole(page: Page, tmp_path: Path) -> None:
    number = pl.col("user_id", "item_id").str.slice(1).cast(pl.Int64)
    small = {"dim": 4, "channels": 4}
    found = everlong.fit(
        walk().with_columns(number),
        "lru",
        architecture=small,
        training={"epochs": 1},
        protocol=PAPER,
    )
    found.save(tmp_path / "model")
    service = Service(tmp_path / "data", ServedModel.read(tmp_path / "model"))
    user = 2**60 + 1
    with running(service) as address:
        page.open(f"{address}/?user={user}")
        page.said("is not known")
        for turn in range(2):
            page.tab_to("item")
            page.press("7", Press.ENTER)
            page.until(lambda turn=turn: len(page.texts("#history .id")) == turn + 1)
            time.sleep(1.1)  # another second, another event
        assert service.info(user).watermark.events == 2  # type: ignore[union-attr]
        assert page.text("#user-facts dd") == str(user)


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_narrow_screen_needs_no_sideways_scrolling(page: Page, address: str, path: str) -> None:
    user = "x" * 128
    sent(address, user, ["y" * 128, "i01"], [0, 60])
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    page.open(f"{address}{path}?user={user}")
    page.until(lambda: bool(page.ranked() or page.texts(".opblock")))
    assert page.run("document.scrollingElement.scrollWidth") == 360


def example(schema: dict[str, Any], schemas: dict[str, Any]) -> Any:
    """A value that a schema describes: its example, its default, or the least that it allows."""
    if "$ref" in schema:
        return example(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    if "examples" in schema:
        return schema["examples"][0]
    if "default" in schema:
        return schema["default"]
    if schema["type"] == "array":
        return [example(schema["items"], schemas)]
    assert schema["type"] == "object", schema
    required = schema.get("required", [])
    return {name: example(schema["properties"][name], schemas) for name in required}


def test_examples_of_the_description_work(address: str) -> None:
    described = httpx.get(f"{address}/openapi.json").json()
    schemas, statuses = described["components"]["schemas"], {}
    values = {"user_id": "ann", "item_id": "tea"}
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json")
            content = None if body is None else example(body["schema"], schemas)
            url = address + path.format_map(values)
            answer = httpx.request(method.upper(), url, json=content)
            statuses[f"{method} {path}"] = answer.status_code
    # neither the item nor the folder nor a model before it exists here
    missing = {
        "get /v1/items/{item_id}/similar": 404,
        "post /v1/model": 422,
        "post /v1/model/rollback": 404,
    }
    refused = {route: status for route, status in statuses.items() if status != 200}
    erased = refused.pop("get /v1/users/{user_id}", 200)
    assert refused == missing
    assert erased in (200, 404)


@pytest.mark.browser
@needs_browser
def test_the_page_of_routes_shows_and_calls_them(page: Page, address: str) -> None:
    page.open(f"{address}/docs")
    paths = httpx.get(f"{address}/openapi.json").json()["paths"]
    routes = {f"{method.upper()} {path}" for path, some in paths.items() for method in some}

    def shown() -> set[str]:
        methods, paths = page.texts(".opblock-summary-method"), page.texts(".opblock-summary-path")
        # the page allows a line to break within a path
        return {
            f"{method} {re.sub('[^!-~]', '', path)}"
            for method, path in zip(methods, paths, strict=True)
        }

    page.until(lambda: shown() == routes)
    card = "document.querySelector('#operations-recommend-recommend')"
    page.run(f"{card}.querySelector('.opblock-summary-control').click()")
    page.until(lambda: page.run(f"{card}.querySelector('.try-out__btn') !== null"))
    page.run(f"{card}.querySelector('.try-out__btn').click()")
    page.until(lambda: page.run(f"{card}.querySelector('.execute') !== null"))
    page.run(f"{card}.querySelector('.execute').click()")
    page.until(lambda: "200" in page.text(".live-responses-table .response .response-col_status"))
    assert '"known"' in page.text(".live-responses-table .response .response-col_description")
    assert page.console() == []
    asked = page.asked()
    assert f"{address}/v1/recommend" in asked
    assert all(url.startswith((f"{address}/", "data:image/svg")) for url in asked)
