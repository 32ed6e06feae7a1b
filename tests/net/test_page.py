"""The gateway's page in a real browser, in front of real servers of which one is killed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoal.bundled import STORIES
from shoal.host.processes import Child, Children
from shoal.testing.preloaded import PreloadedProcess

from .browser import SECONDS, chromium, clean_page

PROMPT = "Once upon a time, there was a little girl"
NUM_TOKENS = 160
STOP_AFTER_SOME_TEXT = """() => new MutationObserver((_, observer) => {
  if (document.querySelector(".assistant .said")?.textContent.length < 12) return;
  observer.disconnect();
  document.getElementById("stop").click();
}).observe(document.getElementById("messages"), { subtree: true, childList: true, characterData: true })"""


@pytest.fixture(scope="module")
def children() -> Iterator[Children]:
    with Children() as children:
        yield children


@pytest.fixture(scope="module")
def servers(children: Children) -> dict[str, Child]:
    """The first half once and the second twice, so that one of these can be killed."""

    def start(name: str, *arguments: str) -> Child:
        options = ("--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32", "--cache-tokens", "4096")
        return children.start(
            name, "serve", str(STORIES), "--name", name, *options, *arguments, launch=PreloadedProcess
        )

    first = start("attic", "--new-swarm", "--blocks", "0:6")
    ready(children, first)
    peers = ("--initial-peers", first.facts["address"])
    found = {"attic": first} | {name: start(name, *peers, "--blocks", "6:12") for name in ("desk", "lab")}
    found["gateway"] = children.start(
        "gateway", "gateway", str(STORIES), *peers, "--port", "0", launch=PreloadedProcess
    )
    ready(children, *found.values())
    return found


def ready(children: Children, *wanted: Child) -> None:
    for _ in children.wait_for(wanted, seconds=SECONDS):
        pass


@pytest.fixture(scope="module")
def url(servers: dict[str, Child]) -> str:
    return servers["gateway"].facts["page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def story() -> Callable[[int], str]:
    """What plain Transformers continues the prompt with."""
    tokenizer: Any = AutoTokenizer.from_pretrained(STORIES)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    whole = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32).eval()
    found = whole.generate(ids, max_new_tokens=NUM_TOKENS, do_sample=False)[0, ids.shape[1] :]
    assert len(found) == NUM_TOKENS
    return lambda num_tokens: str(tokenizer.decode(found[:num_tokens], skip_special_tokens=True))


def ask(page: Page, num_tokens: int) -> None:
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Tokens at most").fill(str(num_tokens))
    page.get_by_label("Message", exact=True).fill(PROMPT)
    page.get_by_role("button", name="Send").click()


def answered(page: Page) -> str:
    """The text of the last answer, once it has ended."""
    expect(page.locator("#stop")).to_be_disabled()
    return page.locator(".assistant .said").last.text_content() or ""


def violations(page: Page) -> list[str]:
    """What axe-core finds that keeps people from using the page."""
    found = Axe().run(page).response
    assert len(found["passes"]) > 20
    return [f"{each['id']}: {node['html']}" for each in found["violations"] for node in each["nodes"]]


def test_a_chat_streams_and_is_stopped_repeated_and_copied(browser: Browser, url: str, story: Callable[[int], str]):
    permissions = ["clipboard-read", "clipboard-write"]
    with clean_page(browser, url, stops=True, permissions=permissions) as page:
        page.evaluate(STOP_AFTER_SOME_TEXT)
        ask(page, NUM_TOKENS)
        begun = answered(page)
        assert 12 <= len(begun) < len(story(NUM_TOKENS))
        assert story(NUM_TOKENS).startswith(begun)
        expect(page.locator("#told")).to_contain_text("stopped")

        page.get_by_label("Tokens at most").fill("24")
        page.get_by_role("button", name="Regenerate").click()
        assert answered(page) == story(24)
        expect(page.locator("#messages li")).to_have_count(2)
        expect(page.locator("#told")).to_have_text(
            re.compile(r"first token after [\d.]+ s, 24 tokens, [\d.]+ tokens/s; cut at its limit")
        )
        expect(page.locator("#spent")).to_have_text(
            re.compile(r"A token took [\d.]+ ms, about: [\d.]+ ms of computing, [\d.]+ ms of network.*")
        )

        page.get_by_role("button", name="Copy this answer").click()
        assert page.evaluate("() => navigator.clipboard.readText()") == story(24)
        page.locator("#copy-join").click()
        command = page.evaluate("() => navigator.clipboard.readText()")
        assert command.startswith(f"shoal serve {STORIES} --initial-peers /ip4/127.0.0.1/tcp/")

        page.get_by_role("button", name="New chat").click()
        expect(page.locator("#messages li")).to_have_count(0)


def test_the_page_works_by_keyboard_alone(browser: Browser, url: str, story: Callable[[int], str]):
    with clean_page(browser, url, reduced_motion="reduce", color_scheme="dark") as page:
        expect(page.locator("#servers li")).to_have_count(3)
        keys = page.keyboard

        def tab_to(wanted: str) -> None:
            """Press Tab until this element has the focus, which has to be seen wherever it goes."""
            for _ in range(40):
                keys.press("Tab")
                focused = page.locator(":focus")
                if not focused.count():
                    continue  # the browser's own part
                assert focused.evaluate("each => getComputedStyle(each).outlineStyle") != "none"
                if page.locator(wanted).first.evaluate("each => each === document.activeElement"):
                    return
            raise AssertionError(f"no Tab leads to {wanted}")

        tab_to("#text")
        keys.type(PROMPT)
        tab_to("#temperature")
        keys.press("Control+A")
        keys.type("0")
        tab_to("#tokens")
        keys.press("Control+A")
        keys.type("12")
        keys.press("Enter")
        assert answered(page) == story(12)
        expect(page.locator("#announced")).to_have_text(re.compile("answer cut at its limit"))
        tab_to("#again")
        keys.press("Space")
        assert answered(page) == story(12)
        expect(page.locator(".assistant")).to_have_count(1)

        tab_to("#servers summary")
        keys.press("Enter")
        expect(page.locator("#servers dl").first).to_contain_text("round trip from here")
        tab_to("#copy-join")
        keys.press("Enter")
        expect(page.locator("#copy-join")).to_have_text("Copied")
        assert page.locator("#servers .span").first.evaluate("e => getComputedStyle(e).transitionDuration") == "0s"


def test_a_phone_shows_all_of_it(browser: Browser, url: str):
    with clean_page(browser, url, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True) as page:
        expect(page.locator("#servers li")).to_have_count(3)
        expect(page.locator("#servers li").first).to_contain_text("attic")
        assert page.evaluate("() => document.scrollingElement.scrollWidth") == 390
        for element in page.locator("button:visible, input:visible, select, textarea, summary").all():
            box = element.bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 390
        assert page.locator("#servers .span").first.evaluate("e => getComputedStyle(e).transitionDuration") != "0s"


def test_a_machine_is_killed_while_it_writes(
    browser: Browser, servers: dict[str, Child], url: str, story: Callable[[int], str]
):
    with clean_page(browser, url, bypass_csp=True) as page:
        expect(page.locator("#servers li")).to_have_count(3)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert violations(page) == []

        ask(page, NUM_TOKENS)
        second = page.locator("#servers li", has=page.locator(".place", has_text="2"))
        killed = second.locator(".called").text_content() or ""
        (other,) = {"desk", "lab"} - {killed}
        expect(page.locator(".assistant .said")).not_to_be_empty()
        servers[killed].kill()

        lost = page.locator("#servers li.lost", has=page.locator(".called", has_text=killed))
        expect(lost.locator(".state")).to_have_text(f"lost → {other}")
        expect(second.locator(".called")).to_have_text(other)
        expect(page.locator("#health")).to_have_text("2 machines, all 12 blocks served")
        expect(page.locator("#events .bad")).to_contain_text([f"{killed} "])
        expect(page.locator("#events")).to_contain_text(f"{other} took over from {killed}")
        assert answered(page) == story(NUM_TOKENS)

        expect(lost).to_be_visible()
        page.locator("#servers summary").first.click()
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            assert violations(page) == []
        page.set_viewport_size({"width": 390, "height": 844})
        assert violations(page) == []
