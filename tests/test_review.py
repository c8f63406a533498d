"""The review page in a browser: keys, what is on disk and when, coming back."""

import json
from argparse import Namespace

import pytest
from playwright.sync_api import Page, expect

from minigpt4.__main__ import main
from minigpt4.curation.records import Records, read_records, write_records
from minigpt4.curation.review import Review
from minigpt4.curation.review_page import ReviewPage, serve
from minigpt4.errors import UserError
from tests.api_case import free_port
from tests.page_case import SECONDS
from tests.running import wait_for
from tests.training_case import picture, room_for


@pytest.fixture
def items(tmp_path):
    """Four descriptions to review, the last one's picture gone."""
    records = []
    for i in range(4):
        path = tmp_path / f"p{i}.jpg"
        if i < 3:
            picture(i).save(path)
        records.append({"image_id": f"p{i}", "picture": str(path), "text": f"Pattern {i}."})
    return records


@pytest.fixture
def out(tmp_path):
    return tmp_path / "review-ann.jsonl"


@pytest.fixture
def address(items, out):
    with Records(out) as records:
        page = ReviewPage(Review(items, records, "ann")).build()
        yield serve(page, Namespace(host="127.0.0.1", port=free_port()))
        page.close(verbose=False)


@pytest.fixture
def visit(browser, address):
    """Opens the page; nothing may go wrong in the browser, and nothing is fetched elsewhere."""
    wrong, contexts = [], []

    def visit() -> Page:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 800}))
        page = contexts[-1].new_page()
        page.set_default_timeout(SECONDS)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: wrong.append(r.url) if is_elsewhere(r.url) else None)
        page.goto(address)
        expect(head(page)).to_contain_text("decided")
        return page

    def is_elsewhere(url: str) -> bool:
        return not url.startswith((address, "data:", "blob:"))

    yield visit
    for context in contexts:
        context.close()
    assert not wrong, wrong


def head(page: Page):
    return page.locator("#head")


def text(page: Page):
    return page.locator("#text textarea")


def shown(page: Page):
    return page.locator("#shown textarea, #shown input")


def at(page: Page, image_id: str) -> None:
    expect(head(page)).to_contain_text(image_id)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_key_for_each_decision(visit, out):
    page = visit()
    at(page, "p0")
    expect(text(page)).to_have_value("Pattern 0.")
    image = page.locator("#picture img")
    wait_for(lambda: image.evaluate("i => i.complete && i.naturalWidth") == 60)
    page.keyboard.press("k")
    at(page, "p1")  # shown after it was written
    assert [(r["image_id"], r["decision"]) for r in lines(out)] == [("p0", "keep")]
    page.keyboard.press("d")
    at(page, "p2")
    assert lines(out)[-1]["decision"] == "drop" and lines(out)[-1]["reviewer"] == "ann"
    page.keyboard.press("e")
    expect(text(page)).to_be_focused()
    text(page).fill("A darker pattern, drawn by keys d and k.")  # no decisions while typing
    page.keyboard.press("Control+Enter")
    at(page, "p3")
    record = read_records(out)["p2"]
    assert record["decision"] == "edit" and record["before"] == "Pattern 2."
    assert record["text"] == "A darker pattern, drawn by keys d and k."
    expect(head(page)).to_contain_text("3 of 4 decided: 1 kept, 1 edited, 1 dropped")
    expect(head(page)).to_contain_text("is missing")  # its picture
    page.keyboard.press("d")
    expect(head(page)).to_contain_text("All decided")
    before = shown(page).input_value()
    page.keyboard.press("k")  # of nothing
    wait_for(lambda: shown(page).input_value() != before)
    page.keyboard.press("ArrowLeft")
    at(page, "p3")
    page.keyboard.press("ArrowLeft")
    at(page, "p2")
    expect(head(page)).to_contain_text("decided: edit")
    expect(text(page)).to_have_value("A darker pattern, drawn by keys d and k.")
    page.keyboard.press("d")  # thought better of
    expect(head(page)).to_contain_text("All decided")
    assert read_records(out)["p2"]["decision"] == "drop"
    assert len(read_records(out)) == 4 and len(lines(out)) == 5


def test_nothing_is_lost_when_the_browser_closes(visit, out):
    page = visit()
    at(page, "p0")
    page.get_by_role("button", name="Keep (K)").click()
    expect(text(page)).to_have_value("Pattern 1.")
    text(page).fill("Half a sent")
    wait_for(lambda: "Half a sent" in draft(out))
    page.context.close()
    page = visit()
    at(page, "p1")
    expect(text(page)).to_have_value("Half a sent")
    text(page).press_sequentially("ence.")
    wait_for(lambda: "sentence." in draft(out))
    page.keyboard.press("Escape")
    page.keyboard.press("k")
    at(page, "p2")
    assert read_records(out)["p1"]["text"] == "Half a sentence."
    assert read_records(out)["p1"]["decision"] == "edit"


def draft(out) -> str:
    path = out.with_name(out.name + ".draft")
    return path.read_text() if path.exists() else ""


def test_an_empty_description_is_not_kept(visit, out):
    page = visit()
    before = shown(page).input_value()
    text(page).fill(" ")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_text("The description is empty")).to_be_visible()
    wait_for(lambda: shown(page).input_value() != before)
    at(page, "p0")
    page.keyboard.press("d")  # the key works again
    at(page, "p1")
    assert lines(out)[-1]["decision"] == "drop" and lines(out)[-1]["text"] == "Pattern 0."


@pytest.mark.trust("Faults", "a full disk")
def test_a_full_disk_is_said_and_the_keys_go_on(visit, out):
    page = visit()
    at(page, "p0")
    page.keyboard.press("k")
    at(page, "p1")
    before = shown(page).input_value()
    with room_for(out.stat().st_size + 10):
        page.keyboard.press("k")
        expect(page.get_by_text("make room")).to_be_visible()
        wait_for(lambda: shown(page).input_value() != before)
    at(page, "p1")
    page.keyboard.press("k")
    at(page, "p2")
    assert [(r["image_id"], r["decision"]) for r in lines(out)] == [("p0", "keep"), ("p1", "keep")]


def test_keys_pressed_twice_decide_once(visit, out):
    """The second of two quick presses is about a picture that nobody has seen."""
    page = visit()
    at(page, "p0")
    page.evaluate(
        """() => { for (const key of ["k", "d", "d"])
        document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true})) }"""
    )
    at(page, "p1")
    assert [(r["image_id"], r["decision"]) for r in lines(out)] == [("p0", "keep")]
    page.keyboard.press("d")
    at(page, "p2")


def test_a_review_goes_on_where_it_stopped(items, out):
    with Records(out) as records:
        review = Review(items, records, "ann")
        review.decide("p1", drop=False, text="Pattern 1. ")
        review.note("p2", "half")
    with Records(out) as records:
        review = Review(items, records, "ann")
        assert review.decision("p1") == "keep" and review.text("p2") == "half"
        assert review.next() == "p0" and review.next("p0") == "p2" and review.next("p3") == "p0"
        assert review.previous("p0") == "p0" and review.previous("") == "p3"
        with pytest.raises(UserError, match="empty"):
            review.decide("p0", drop=False, text="\n")
        for image_id in ("p0", "p2", "p3"):
            review.decide(image_id, drop=True, text="")
        assert review.next() == "" and not draft(out)
    with Records(out) as records, pytest.raises(UserError, match="nothing to review"):
        Review([], records, "ann")


def test_a_description_that_changed_is_decided_again(items, out):
    with Records(out) as records:
        review = Review(items, records, "ann")
        for item in items:
            review.decide(item["image_id"], drop=False, text=item["text"])
    items[1] = items[1] | {"text": "A better pattern.", "before": "Pattern 1."}  # refined anew
    with Records(out) as records:
        review = Review(items, records, "ann")
        assert review.next() == "p1" and review.counts() == {"keep": 3, "": 1}
        assert review.text("p1") == "A better pattern."
        review.decide("p1", drop=False, text="A better pattern.")
        assert review.next() == "" and review.decision("p1") == "keep"
    assert read_records(out)["p1"]["text"] == "A better pattern."


def test_going_back_to_what_was_dropped_shows_what_was_typed(items, out):
    with Records(out) as records:
        review = Review(items, records, "ann")
        review.note("p0", "A long edit")
        review.decide("p0", drop=True, text="A long edit")  # D, by mistake
    with Records(out) as records:
        review = Review(items, records, "ann")
        assert review.decision("p0") == "drop" and review.text("p0") == "A long edit"
        assert review.decide("p0", drop=False, text=review.text("p0")) == "edit"
    assert read_records(out)["p0"]["before"] == "Pattern 0."


def test_a_busy_port_is_said(items, out, address, tmp_path, capsys):
    given = tmp_path / "filtered.jsonl"
    write_records(given, items)
    port = address.rsplit(":", 1)[1]
    other = str(tmp_path / "other.jsonl")
    assert main(["curate", "review", str(given), "--out", other, "--port", port]) == 2
    assert "is in use" in capsys.readouterr().err
