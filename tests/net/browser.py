"""A headless Chromium, and pages of it that notice whatever goes wrong in them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

SECONDS = 120.0
ARGUMENTS = (
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser of the system. `scripts/setup` installs it, or says how; `CHROMIUM` may name another one."""
    path = shutil.which(os.environ.get("CHROMIUM", "chromium"))
    assert path is not None, "there is no Chromium: install the package chromium, or set CHROMIUM=/path/to/it"
    expect.set_options(timeout=SECONDS * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def clean_page(browser: Browser, url: str, *, stops: bool = False, **options: Any) -> Iterator[Page]:
    """A page at this URL, which may load nothing from elsewhere, fail in no request and report no error.

    Chats that the page `stops` are requests that end early, and are no failures.
    """
    problems: list[str] = []
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
    page = context.new_page()
    page.set_default_timeout(SECONDS * 1000)

    def on_console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            problems.append(f"console: {message.text}")

    def on_request(request: Request) -> None:
        if urlsplit(request.url).netloc != urlsplit(url).netloc:
            problems.append(f"loaded from elsewhere: {request.url}")

    def on_failure(request: Request) -> None:
        if not (stops and request.url.endswith("/v1/chat/completions") and request.failure == "net::ERR_ABORTED"):
            problems.append(f"failed: {request.url} {request.failure}")

    page.on("console", on_console)
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    page.on("request", on_request)
    page.on("requestfailed", on_failure)
    page.on("response", lambda found: problems.append(f"{found.status} {found.url}") if found.status >= 400 else None)
    try:
        page.goto(url)
        yield page
        assert problems == []
    finally:
        context.close()
