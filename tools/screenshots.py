"""python -m tools.screenshots ADDRESS [OUT]: the pictures of the page in docs/images.

ADDRESS is that of a running server, such as http://127.0.0.1:7860. Needs Chromium, and playwright
from requirements-dev.txt.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Browser, Page, expect, sync_playwright

from minigpt4.web.page.examples import EXAMPLES, FOLDER

ROOT = Path(__file__).parent.parent
DESKTOP = {"viewport": {"width": 1440, "height": 900}}
TABLET = {"viewport": {"width": 1024, "height": 768}}
SIDEWAYS = {"viewport": {"width": 844, "height": 390}, "is_mobile": True, "has_touch": True}
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True}
SECONDS = 120_000  # for an answer, in ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "docs" / "images")
    options = parser.parse_args()
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        take(browser, options.address, options.out)
        browser.close()


def take(browser: Browser, address: str, out: Path) -> None:
    """Every picture, each by a new visitor."""

    def visit(**settings) -> Page:
        page = browser.new_context(**settings).new_page()
        page.set_default_timeout(SECONDS)
        page.goto(address)
        expect(page.locator("#box textarea")).to_be_visible(timeout=SECONDS)
        page.wait_for_timeout(1500)  # the examples' pictures
        return page

    def shoot(page: Page, name: str) -> None:
        page.mouse.move(0, 0)
        page.wait_for_timeout(600)  # colours fade
        quality = 85 if name.endswith(".jpg") else None
        page.screenshot(path=out / name, quality=quality)

    page = visit(**DESKTOP)
    shoot(page, "empty.png")
    answer_example(page, "advertisement")
    shoot(page, "page.png")
    page.locator("#chat .image-container > button").first.click()
    shoot(page, "lightbox.jpg")
    page.get_by_role("button", name="Crop", exact=True).click()
    shoot(page, "crop.jpg")
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.get_by_label("Retry").last.click()
    answered(page)
    shoot(page, "versions.png")
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Advanced").click()
    shoot(page, "settings.png")

    page = visit(**DESKTOP)
    attach(page, "cat", "coffee", "dahlia")
    page.locator("#box textarea").fill("Suggest a title for these pictures.")
    page.keyboard.press("Enter")
    answered(page)
    attach(page, "tower")
    page.locator("#box textarea").fill("And for this one?")
    shoot(page, "several.jpg")
    page.evaluate("""localStorage.setItem("minigpt4:settings", '{"num_beams": 8}')""")
    page.goto(address)  # with beams, the first word comes at the end; the draft is kept
    expect(page.locator("#box .thumbnail-wrapper")).to_have_count(1, timeout=SECONDS)
    page.locator("#box textarea").fill("Describe this image in detail.")
    page.keyboard.press("Enter")
    expect(page.locator("#box .stop-button")).to_be_visible(timeout=SECONDS)
    shoot(page, "waiting.jpg")

    page = visit(color_scheme="dark", **DESKTOP)
    answer_example(page, "poem")
    shoot(page, "dark.png")
    page = visit(**TABLET)
    answer_example(page, "story")
    shoot(page, "tablet.jpg")
    page = visit(**SIDEWAYS)
    answer_example(page, "entitle")
    shoot(page, "phone-side.jpg")
    page = visit(has_touch=True, **PHONE)
    shoot(page, "phone-empty.jpg")
    answer_example(page, "advertisement")
    shoot(page, "phone.png")
    page.locator("#menu").click()
    shoot(page, "phone-list.png")


def answer_example(page: Page, name: str) -> None:
    """Click on an example's card, and wait for the answer."""
    page.locator("#hello .cards button").nth([*EXAMPLES].index(name)).click()
    answered(page)


def attach(page: Page, *names: str) -> None:
    """Put pictures of the examples into the message box."""
    files = [FOLDER / f"{name}.jpg" for name in names]
    page.locator("#box input[type=file]").set_input_files(files)
    expect(page.locator("#box .thumbnail-wrapper")).to_have_count(len(names), timeout=SECONDS)
    page.locator("#box textarea").focus()


def answered(page: Page) -> None:
    """Wait until the answer has ended."""
    expect(page.locator("#box .stop-button")).to_be_visible(timeout=SECONDS)
    expect(page.locator("#box .submit-button")).to_be_visible(timeout=SECONDS)


if __name__ == "__main__":
    main()
