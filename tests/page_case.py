"""Helpers of the page's tests: a server, a browser, visitors."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from tests import api_case

WIDE = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2}
SECONDS = 30_000  # how long the browser waits for anything, in ms: machines may be busy
expect.set_options(timeout=SECONDS)


@contextmanager
def served(source, feedback=None) -> Iterator[str]:
    """The address of a page, with all that stands before it in app.py."""
    find_engine = partial(getattr, source, "engine", source)  # of a Loading, or the engine itself
    with api_case.served(find_engine, source, feedback=feedback) as address:
        yield address


def starting() -> dict:
    """Playwright's arguments for starting Chromium."""
    # Debian's headless shell takes a seventh less of the processor.
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if not path:
        (pytest.fail if "CI" in os.environ else pytest.skip)(
            "install chromium: apt-get install chromium"
        )
    quiet = ["background-networking", "component-update", "sync"]
    args = ["--no-sandbox", "--disable-gpu", "--no-first-run"]
    args += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    return {"executable_path": path, "args": args + [f"--disable-{name}" for name in quiet]}


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(**starting())
        yield browser
        browser.close()


# What a test may do to a page or its context that emptying them does not undo.
LASTING = ("add_init_script", "route", "on", "once", "emulate_media", "set_viewport_size")
LASTING_IN_CONTEXT = ("add_init_script", "route", "set_offline", "new_cdp_session", "new_page")


class Visitors:
    """Opens the page as new visitors; `check`: nothing went wrong in their browsers.

    A browser that has compiled the page's scripts once opens it in less than half the time, so a
    context is emptied and used for the next visitor with the same settings.
    """

    _emptied: WeakKeyDictionary[Browser, dict[str, Page]] = WeakKeyDictionary()

    def __init__(self, browser: Browser, address: str) -> None:
        self._browser, self._address = browser, address
        self._pages: list[tuple[str, Page]] = []
        self._changed: set[BrowserContext] = set()
        self._wrong: list[str] = []
        self._listeners = {
            "requestfinished": self._seen,
            "requestfailed": self._seen,
            "console": self._said,
            "pageerror": self._failed,
        }

    def __call__(self, **settings) -> Page:
        page = self._emptied.setdefault(self._browser, {}).pop(repr(settings), None)
        page = page or self._browser.new_context(**settings).new_page()
        page.set_default_timeout(SECONDS)
        for event, heard in self._listeners.items():
            page.on(event, heard)
        for target, names in ((page, LASTING), (page.context, LASTING_IN_CONTEXT)):
            for name in names:
                method = partial(getattr(type(target), name), target)
                setattr(target, name, self._noticed(page.context, method))
        self._pages.append((repr(settings), page))
        page.goto(self._address)
        expect(box(page)).to_be_visible()
        return page

    def _noticed(self, context: BrowserContext, method: Callable) -> Callable:
        def changed(*args, **settings):
            self._changed.add(context)
            return method(*args, **settings)

        return changed

    def _seen(self, request) -> None:
        if request.failure and "csp" in request.failure:  # the page's policy kept it in
            return
        if not request.url.startswith((self._address, "data:", "blob:", "about:")):
            self._wrong.append(f"request to {request.url}")

    def _failed(self, error) -> None:
        self._wrong.append(str(error))

    def _said(self, message) -> None:
        if message.type == "error" and "about:srcdoc" not in message.location.get("url", ""):
            self._wrong.append(f"{message.text} {message.location.get('url', '')}")

    def expected(self, text: str) -> None:
        """What may have gone wrong, because a test is about it."""
        self._wrong = [line for line in self._wrong if not re.search(text, line)]

    def check(self) -> None:
        for settings, page in self._pages:
            known = self._emptied[self._browser]
            if page.context in self._changed or settings in known or page.is_closed():
                page.context.close()
            else:
                known[settings] = self._empty(page)
        assert not self._wrong, self._wrong

    def _empty(self, page: Page) -> Page:
        # What is aborted when a page is left is no fault.
        for event, heard in self._listeners.items():
            page.remove_listener(event, heard)
        page.goto(f"{self._address}/manifest.json")  # of the same origin, without scripts
        page.evaluate("sessionStorage.clear()")
        tools = page.context.new_cdp_session(page)
        tools.send("Storage.clearDataForOrigin", {"origin": self._address, "storageTypes": "all"})
        page.goto("about:blank")
        tools.send("Page.resetNavigationHistory")
        tools.detach()
        return page


def picture(path: Path, sky: str = "skyblue") -> Path:
    image = Image.new("RGB", (320, 240), sky)
    ImageDraw.Draw(image).rectangle((0, 160, 320, 240), fill="seagreen")
    ImageDraw.Draw(image).ellipse((230, 20, 290, 80), fill="gold")
    image.save(path)
    return path


def box(page: Page) -> Locator:
    return page.locator("#box textarea")


def attach(page: Page, *paths: Path) -> None:
    thumbnails = page.locator("#box .thumbnail-wrapper")
    before = thumbnails.count()
    page.locator("#box input[type=file]").set_input_files(paths)
    expect(thumbnails).to_have_count(before + len(paths))


def say(page: Page, text: str) -> None:
    box(page).fill(text)
    box(page).press("Enter")


def done(page: Page) -> None:
    """Wait for the answer's end."""
    expect(page.locator("html:not([data-sending])")).to_have_count(1)
    expect(page.locator("#box .submit-button")).to_be_visible()


def figures(page: Page) -> Locator:
    """What is behind the last answer's button."""
    page.locator("#chat .about").last.click()
    page.locator("#chat .facts summary").last.click()
    return page.locator("#chat .facts").last


def open_settings(page: Page) -> None:
    """The settings, with those under "Advanced"."""
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Advanced").click()
    expect(page.get_by_label("Seed")).to_be_visible()


def ask(page: Page, text: str) -> None:
    count = answers(page).count()
    say(page, text)
    expect(answers(page)).to_have_count(count + 1)
    done(page)


def download_as(page: Page, kind: str) -> None:
    """kind: "Markdown" or "JSON"."""
    page.get_by_role("button", name="Download the conversation").click()
    page.get_by_role("menuitem", name=f"Download as {kind}").click()


def answers(page: Page) -> Locator:
    return page.locator("#chat").get_by_test_id("bot")


def questions(page: Page) -> Locator:
    return page.locator("#chat").get_by_test_id("user")


def status(page: Page) -> Locator:
    return page.locator("#status")


def inside(part: Locator, whole: Locator) -> bool:
    """Is the part shown within the other element's edges?"""
    (x, y, width, height), outer = (
        [found.bounding_box()[side] for side in ("x", "y", "width", "height")]
        for found in (part, whole)
    )
    right, bottom = outer[0] + outer[2], outer[1] + outer[3]
    return x >= outer[0] and y >= outer[1] and x + width <= right and y + height <= bottom
