"""The gateway's page before a swarm that a test invents: hundreds of machines, and a gateway that wants a key."""

from __future__ import annotations

import json
import queue
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from shoal.gateway.app import PAGE, PAGE_HEADERS

from .browser import chromium, clean_page

TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
NUM_BLOCKS = 80
COUNT_CHANGES = """() => {
  window.changes = 0;
  new MutationObserver((found) => { window.changes += found.length; }).observe(
    document.body, { subtree: true, childList: true, attributes: true, characterData: true });
}"""


class Feed:
    """Serves the page, and tells it what the test says."""

    def __init__(self) -> None:
        self.key: str | None = None
        self.told: queue.Queue[dict[str, Any] | None] = queue.Queue()
        feed = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if feed.key and "/v1/" in path and self.headers["Authorization"] != f"Bearer {feed.key}":
                    self.answer(401, "application/json", b"{}")
                elif path == "/v1/models":
                    models = [{"id": "large"}, {"id": "large:adapter"}]
                    self.answer(200, "application/json", json.dumps({"data": models}).encode())
                elif path == "/api/swarm":
                    self.send_response(200)
                    self.send_header("Content-Type", "text/event-stream")
                    self.end_headers()
                    while (event := feed.told.get()) is not None:
                        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                else:
                    file = PAGE / (path.strip("/") or "index.html")
                    self.answer(200, TYPES[file.suffix], file.read_bytes())

            def answer(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                for name, value in {**PAGE_HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def swarm(self, servers: list[dict[str, Any]], **changes: Any) -> None:
        event = {"type": "swarm", "model": "large", "num_blocks": NUM_BLOCKS, "missing": [], "way": None, "gone": []}
        self.told.put({**event, "join": "shoal serve large", "servers": servers, **changes})


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def feed() -> Iterator[Feed]:
    feed = Feed()
    thread = threading.Thread(target=feed.server.serve_forever)
    thread.start()
    try:
        yield feed
    finally:
        feed.told.put(None)
        feed.server.shutdown()
        thread.join()
        feed.server.server_close()


def machine(index: int, **changes: Any) -> dict[str, Any]:
    """One of a swarm's machines: 16 blocks from one of 17 places."""
    start = index * 4 % 68
    described = {"peer": f"peer-{index:03d}", "name": f"machine-{index}", "start": start, "end": start + 12}
    state = {"state": "online", "ready_in": None, "speed": 20.0, "room": 1000, "queue": 0, "sessions": 0, "lost": False}
    more = {"round_trip": None, "links": [], "dtype": "bfloat16", "quantization": "none", "reason": "", "usable": True}
    return {**described, **state, **more, **changes}


def rows(page: Page) -> int:
    return page.locator("#servers > li").count()


def test_five_hundred_machines_are_few_rows_and_a_change_touches_one(browser: Browser, feed: Feed):
    with clean_page(browser, feed.url) as page:
        hops = [{"peer": "peer-000", "name": "machine-0", "start": 0, "end": 12, "network": 0.01, "compute": 0.02}]
        way = {"hops": [{**hops[0], "queue": 0}], "back": 0.01}
        feed.swarm([machine(index, sessions=int(index == 0)) for index in range(500)], way=way)
        expect(page.locator("#health")).to_have_text("500 machines, all 80 blocks served")
        assert rows(page) == 1 + 17  # the one in use, and one for each span
        expect(page.locator("#servers > li").first).to_contain_text("machine-0")
        assert page.evaluate("() => document.querySelectorAll('*').length") < 1000

        page.evaluate(COUNT_CHANGES)
        feed.swarm([machine(18, queue=7)], way=way)
        group = page.locator("#servers > li.group", has_text="4:16")
        expect(group.locator(".queue")).to_have_text("7")
        assert 0 < page.evaluate("() => window.changes") <= 3  # the number, and what is read aloud

        group.locator("summary").click()
        members = page.locator("#servers > li.member")
        expect(members).to_have_count(30)
        members.nth(1).locator("summary").click()
        expect(members.nth(1).locator("dl")).to_contain_text("peer-")
        group.locator("summary").click()
        expect(members).to_have_count(0)

        feed.swarm([machine(0, lost=True)], way=way)
        feed.told.put(
            {"type": "event", "text": "it is lost", "loud": True, "replaced": "peer-000", "by": ["machine-17"]}
        )
        lost = page.locator("#servers > li").first
        expect(lost.locator(".state")).to_have_text("lost → machine-17")
        expect(page.locator("#announced")).to_have_text("it is lost")
        feed.told.put(
            {"type": "event", "text": "a better way", "loud": True, "replaced": "peer-001", "by": ["machine-18"]}
        )
        feed.swarm([machine(1, lost=True)], way=way)
        expect(page.locator("#servers > li.lost .state")).to_have_text(["lost → machine-17", "lost"])
        feed.swarm([machine(index, state="joining", ready_in=30) for index in range(100, 500)], way=way)
        expect(page.locator("#servers > li.joining.group")).to_have_count(17)
        expect(page.locator("#held")).to_have_attribute("aria-label", re.compile("held by . to .. machines"))


def test_machines_of_hundreds_of_spans_are_shown_by_where_they_start(browser: Browser, feed: Feed):
    with clean_page(browser, feed.url, viewport={"width": 390, "height": 844}) as page:
        machines = [machine(index, start=index % 70, end=index % 70 + 3 + index % 8) for index in range(500)]
        feed.swarm(machines)
        expect(page.locator("#health")).to_have_text("500 machines, all 80 blocks served")
        assert rows(page) == 14  # of 16 slices of five blocks; none starts in the last two
        first = page.locator("#servers > li.group").first
        expect(first.locator(".blocks")).to_have_text("0:13")
        expect(first.locator("summary")).to_have_attribute("aria-label", re.compile("within blocks 0 to 13"))
        first.locator("summary").click()
        members = page.locator("#servers > li.member")
        expect(members).to_have_count(sum(each["start"] < 5 for each in machines))
        expect(members.first.locator(".blocks")).to_have_text("0:3")
        assert page.evaluate("() => document.scrollingElement.scrollWidth") == 390


def test_a_machine_that_leaves_is_not_called_lost_and_one_that_vanishes_is_gone(browser: Browser, feed: Feed):
    with clean_page(browser, feed.url) as page:
        feed.swarm([machine(0), machine(1, state="leaving"), machine(2), machine(3), machine(4)])
        expect(page.locator("#servers > li")).to_have_count(5)
        feed.swarm([], gone=("peer-001", "peer-002"))
        expect(page.locator("#servers > li")).to_have_count(4)
        expect(page.locator("#servers > li.gone .called")).to_have_text("machine-2")
        expect(page.locator("#health")).to_contain_text("3 machines")
        assert page.locator("#model option").all_text_contents() == ["large", "large:adapter"]


def test_blocks_that_no_machine_has_are_seen_and_a_gateway_that_comes_back_is_followed(browser: Browser, feed: Feed):
    with clean_page(browser, feed.url, bypass_csp=True) as page:
        missing = [6, 7, 9]
        machines = [machine(0, start=0, end=6), machine(1, start=6, end=8, usable=False), machine(2, start=8, end=9)]
        feed.swarm([*machines, machine(3, start=10, end=12)], num_blocks=12, missing=missing)
        expect(page.locator("#health")).to_have_text("no machine has blocks 6:8, 9:10")
        expect(page.locator("#holders .none")).to_have_text(["0"] * len(missing))
        expect(page.locator("#servers > li.unused .state")).to_have_text("has other weights, or is excluded")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert Axe().run(page).response["violations"] == []

        feed.told.put(None)
        expect(page.locator("#health")).to_have_text("the gateway does not answer")
        feed.swarm([machine(0)])
        expect(page.locator("#health")).to_have_text("1 machine, all 80 blocks served")
        expect(page.locator("#servers > li.gone")).to_have_count(3)


def test_a_gateway_with_keys_asks_for_one_until_it_is_right(browser: Browser, feed: Feed):
    feed.key = "right"
    context = browser.new_context(bypass_csp=True)
    try:
        page = context.new_page()
        page.goto(feed.url)
        dialog = page.get_by_role("dialog")
        expect(dialog.get_by_label("Key")).to_be_focused()
        assert Axe().run(page).response["violations"] == []
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(dialog.locator("#key-told")).to_have_text("This gateway does not know that key.")
        dialog.get_by_label("Key").fill("right")
        page.keyboard.press("Enter")
        expect(dialog).to_be_hidden()
        feed.swarm([machine(0)])
        expect(page.locator("#servers > li")).to_have_count(1)
    finally:
        context.close()


def test_the_page_is_small():
    assert sum(file.stat().st_size for file in PAGE.iterdir()) < 150_000
