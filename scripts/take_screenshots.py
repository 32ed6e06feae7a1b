"""Starts a swarm of the bundled model and a gateway, kills a server in the middle of a chat, and takes pictures."""

from __future__ import annotations

import io
import os
import re
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect

from shoal.bundled import STORIES
from shoal.host.processes import Child, Children
from tests.net.browser import SECONDS, chromium, clean_page

SPANS = {"attic": "0:6", "desk": "0:4", "garage": "4:8", "lab": "6:12", "laptop": "8:12", "library": "6:12"}
PROMPT = "Once upon a time, there was a little girl"
NUM_TOKENS = 400
SHOWN_CHARACTERS = 420
MAX_BYTES = 150_000


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with Children() as children, chromium() as browser:
        servers = swarm(children)
        with clean_page(browser, servers["gateway"].facts["page"], viewport={"width": 1280, "height": 860}) as page:
            expect(page.locator("#servers li")).to_have_count(len(SPANS))
            chat(page, servers)
            take(page, folder / "page-light.png")
            page.emulate_media(color_scheme="dark", reduced_motion="reduce")
            take(page, folder / "page-dark.png")
            page.set_viewport_size({"width": 390, "height": 844})
            page.emulate_media(color_scheme="light", reduced_motion="reduce")
            take(page, folder / "page-phone.png")


def swarm(children: Children) -> dict[str, Child]:
    """A swarm in which every block has two or three servers, and a gateway."""
    servers: dict[str, Child] = {}
    peers: tuple[str, ...] = ("--new-swarm",)
    options = ("--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32", "--cache-tokens", "4096")
    for name, span in SPANS.items():
        arguments = ("--name", name, "--blocks", span, *options, *peers)
        servers[name] = children.start(name, "serve", str(STORIES), *arguments)
        if len(servers) == 1:
            ready(children, servers[name])
            peers = ("--initial-peers", servers[name].facts["address"])
    servers["gateway"] = children.start("gateway", "gateway", os.path.relpath(STORIES), *peers, "--port", "0")
    ready(children, *servers.values())
    return servers


def ready(children: Children, *wanted: Child) -> None:
    for _ in children.wait_for(wanted, seconds=SECONDS):
        pass


def chat(page: Page, servers: dict[str, Child]) -> None:
    """Ask for a story, and kill the second server that its tokens visit."""
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Tokens at most").fill(str(NUM_TOKENS))
    page.get_by_label("Message", exact=True).fill(PROMPT)
    page.keyboard.press("Enter")
    expect(page.locator(".assistant .said")).to_contain_text(".")
    second = page.locator("#servers li", has=page.locator(".place", has_text="2"))
    servers[second.locator(".called").text_content() or ""].kill()
    expect(page.locator("#servers li.lost .state")).to_contain_text("→")
    expect(page.locator(".assistant .said")).to_have_text(re.compile(f".{{{SHOWN_CHARACTERS}}}", re.DOTALL))


def take(page: Page, path: Path) -> None:
    """A picture of the whole page, in few colours."""
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    picture.quantize(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < MAX_BYTES
    print(f"{path}  {picture.width} by {picture.height}, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
