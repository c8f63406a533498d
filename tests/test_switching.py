"""Two conversations, two tabs, quick hands: what belongs to one conversation stays in it."""

import json
import re
import threading
import time

import pytest
from playwright.sync_api import Page, expect

from minigpt4.web.page import answers as page_answers
from minigpt4.web.page import transcript
from tests.fake_engine import FakeAnswer
from tests.page_case import WIDE, answers, ask, attach, box, done, picture, questions, say
from tests.running import wait_for
from tests.test_store import LEFT, new_chat, titles


@pytest.fixture
def page(visit) -> Page:
    """Shows Bravo; Alpha is in the list, too."""
    page = visit(**WIDE)
    ask(page, "Alpha?")
    new_chat(page)
    ask(page, "Bravo?")
    expect(titles(page)).to_have_count(2)
    return page


def row(page: Page, name: str):
    return titles(page).filter(has_text=name)


def opened(page: Page, name: str) -> None:
    expect(row(page, name)).to_have_attribute("aria-current", "page")
    expect(questions(page).first).to_contain_text(name)
    page.wait_for_function("!document.documentElement.hasAttribute('data-opening')")
    shown = row(page, name).evaluate("(title) => title.closest('li').dataset.id")
    assert page.evaluate("location.hash") == f"#/c/{shown}"


def edit(page: Page, text: str) -> None:
    """Ask the last question again, with another text."""
    box(page).press("ArrowUp")
    expect(page.locator("#chat textarea")).to_have_value("Bravo?")  # no longer escaped
    page.locator("#chat textarea").fill(text)
    page.locator("#chat textarea").press("Control+Enter")


def test_an_edit_ends_where_something_else_is_shown(page, engine):
    edited = page.locator("#chat textarea")

    def begin() -> None:
        box(page).press("ArrowUp")
        edited.fill("Bravo? more")

    begin()
    row(page, "Alpha").click()
    opened(page, "Alpha")
    expect(edited).to_have_count(0)
    row(page, "Bravo").click()
    opened(page, "Bravo")
    begin()
    ask(page, "And?")
    expect(edited).to_have_count(0)
    begin()
    page.locator("#chat").get_by_role("button", name="Undo").last.click()
    expect(answers(page)).to_have_count(1)
    ask(page, "Once more?")
    expect(edited).to_have_count(0)
    begin()
    new_chat(page)
    ask(page, "Fresh?")
    expect(edited).to_have_count(0)
    assert answers(page).inner_text().strip()


def test_a_question_that_waits_for_its_picture_is_not_asked_elsewhere(page, engine, photo):
    held: list = []
    page.route("**/gradio_api/upload*", lambda route: held.append(route))
    page.locator("#box input[type=file]").set_input_files(photo)
    expect(page.locator(".uploading")).to_be_visible()
    say(page, "What is in MY picture?")
    expect(page.get_by_text("then it is sent")).to_be_visible()
    row(page, "Alpha").click()
    count = len(engine.asked)
    held[0].continue_()  # Gradio opens a conversation when nothing is on its way
    expect(page.locator("#box .thumbnail-wrapper")).to_have_count(1)
    opened(page, "Alpha")
    page.wait_for_timeout(500)
    expect(box(page)).to_have_value("What is in MY picture?")
    assert len(engine.asked) == count


def test_what_is_done_while_another_is_opened_does_not_reach_it(page, engine):
    held, count, join = [], len(engine.asked), "**/gradio_api/queue/join*"

    def hold(route):  # the first event of all
        route.continue_() if held else held.append(route)

    page.route(join, hold)
    row(page, "Alpha").click()
    page.get_by_role("button", name="Retry").click()
    page.wait_for_timeout(300)
    page.unroute(join)  # which lets it go on
    opened(page, "Alpha")
    assert len(engine.asked) == count
    held.clear()
    page.route(join, hold)
    page.get_by_role("button", name="New chat").click()
    say(page, "Fresh?")
    page.wait_for_timeout(300)
    page.unroute(join)
    expect(questions(page)).to_have_text("Fresh?")
    done(page)
    assert [len(asked.messages) for asked in engine.asked[count:]] == [2]


def test_an_edit_that_is_not_accepted_is_kept(page, engine):
    engine.full = True
    edit(page, "Bravo? And more?")
    expect(page.get_by_text("Too many people are waiting")).to_be_visible()
    expect(questions(page)).to_have_text("Bravo? And more?")
    expect(page.locator("#chat .version")).to_have_text("2/2")
    engine.full = False
    done(page)
    page.get_by_role("button", name="Answer now").click()
    expect(answers(page)).to_contain_text("red house")
    done(page)
    assert [len(asked.messages) for asked in engine.asked[-1:]] == [2]


@pytest.mark.parametrize("accepted", [True, False])
def test_an_edit_of_a_conversation_that_was_left(page, monkeypatch, engine, accepted):
    begun, gate = threading.Event(), threading.Event()

    def slow(*arguments):
        begun.set()
        gate.wait(30)
        engine.full = not accepted
        return FakeAnswer(*arguments)

    monkeypatch.setattr("minigpt4.web.page.session.ask", slow)
    edit(page, "Bravo? And more?")
    while not begun.is_set():
        page.wait_for_timeout(20)
    row(page, "Alpha").click()
    opened(page, "Alpha")
    gate.set()
    wait_for(lambda: page.evaluate("minigpt4.chats.search('more').then(({ length }) => length)"))
    row(page, "Bravo").click()
    opened(page, "Bravo")
    expect(questions(page)).to_have_text("Bravo? And more?")
    page.get_by_role("button", name="Previous version").click()
    expect(questions(page)).to_have_text("Bravo?")


def test_what_is_told_late_of_a_conversation_that_was_left(page, engine, monkeypatch):
    begun, gate = threading.Event(), threading.Event()

    def slow(*arguments):
        begun.set()
        gate.wait(30)
        return facts(*arguments)

    facts = page_answers.facts
    monkeypatch.setattr(page_answers, "facts", slow)
    say(page, "Count them.")
    while not begun.is_set():
        page.wait_for_timeout(20)
    monkeypatch.setattr(page_answers, "facts", facts)
    page.get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)
    page.wait_for_function("!minigpt4.chats.opening")
    gate.set()
    page.wait_for_timeout(300)
    assert page.evaluate("location.hash") == ""
    ask(page, "Fresh?")
    assert len(engine.asked[-1].messages) == 2


def test_quick_changes_end_where_the_last_one_led(page):
    page.evaluate(
        """() => {
            const [bravo, alpha] = document.querySelectorAll("#conversations .title");
            alpha.click(); bravo.click(); alpha.click();
        }"""
    )
    opened(page, "Alpha")
    page.evaluate("history.back(), setTimeout(() => history.forward(), 50)")
    opened(page, "Alpha")
    # With another conversation goes what stands over it, and what is read of it.
    page.keyboard.press("Control+Shift+O")
    expect(answers(page)).to_have_count(0)
    assert page.evaluate("location.hash") == ""
    page.go_back()
    opened(page, "Alpha")


def test_back_closes_what_stands_over_the_conversation(page, tmp_path):
    page.evaluate("window.silenced = 0, speechSynthesis.cancel = () => { window.silenced += 1 }")
    attach(page, picture(tmp_path / "one.png"))
    ask(page, "Count it.")
    row(page, "Alpha").click()
    opened(page, "Alpha")
    page.go_back()
    opened(page, "Bravo")
    page.locator("#chat .image-container > button").first.click()
    expect(page.locator("#lightbox")).to_be_visible()
    silenced = page.evaluate("silenced")
    page.go_forward()
    opened(page, "Alpha")
    expect(page.get_by_role("dialog")).to_have_count(0)
    assert page.evaluate("silenced") > silenced


def test_an_opening_that_fails_leaves_what_was_shown(page, photo, visit):
    attach(page, photo)
    ask(page, "Count it.")
    row(page, "Alpha").click()
    opened(page, "Alpha")
    page.route("**/gradio_api/upload*", lambda route: route.abort())
    row(page, "Bravo").click()
    expect(page.locator(".notice")).to_be_visible()
    opened(page, "Alpha")
    visit.expected("ERR_FAILED")


def test_deletions(page):
    """A double click deletes one; the keyboard stays in the list; what comes back does not take the
    place of a conversation that was begun meanwhile."""
    page.get_by_label("Delete: Alpha").dblclick()
    expect(page.get_by_text("Deleted.", exact=True)).to_be_visible()
    page.locator(".notice").get_by_role("button", name="Undo").click()
    expect(titles(page)).to_have_count(2)
    page.get_by_label("Delete: Bravo").focus()
    page.keyboard.press("Enter")
    expect(titles(page)).to_have_count(1)
    expect(page.get_by_label("Delete: Alpha")).to_be_focused()
    expect(answers(page)).to_have_count(0)
    ask(page, "Carol?")
    page.locator(".notice").get_by_role("button", name="Undo").click()
    expect(titles(page)).to_have_count(3)
    opened(page, "Carol")


def test_what_another_tab_deleted_comes_back_with_the_next_question(page):
    other = page.context.new_page()
    other.goto(page.url)
    opened(other, "Bravo")
    other.get_by_label("Delete: Bravo").click()
    expect(titles(page)).to_have_count(1)
    ask(page, "Still there?")
    expect(titles(page)).to_have_count(2)
    expect(titles(other)).to_have_count(2)


def test_an_edited_file_does_not_replace_what_is_kept(page, tmp_path, visit, monkeypatch):
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the conversation").click()
        page.get_by_role("menuitem", name="Download as JSON").click()
    file = tmp_path / "kept.json"
    download.value.save_as(file)
    reopened = json.loads(file.read_text())
    reopened["about"]["time"] -= 1000  # the list's entry was written again since
    file.write_text(json.dumps(reopened))

    def slow(*arguments):
        time.sleep(1)  # so that the next file is there before the first one is recorded
        return record(*arguments)

    record = transcript.record
    monkeypatch.setattr(transcript, "record", slow)
    page.locator("#rail input[type=file]").set_input_files(file)  # adds none: it is kept
    expect(questions(page)).to_contain_text("Bravo?")
    data = json.loads(file.read_text())
    data["messages"][0]["parts"][0]["text"] = "Edited?"
    edited = tmp_path / "edited.json"
    edited.write_text(json.dumps(data))
    page.locator("#rail input[type=file]").set_input_files(edited)
    expect(questions(page)).to_contain_text("Edited?")
    expect(titles(page)).to_have_count(3)
    # The server tells of it again where another file was opened right before it.
    page.evaluate(
        """(data) => {
            const record = { name: "x", about: { id: "x" }, data, pictures: {}, once: "1" };
            const shown = minigpt4.chats.current;
            for (let i = 0; i < 2; i++) minigpt4.chats.told({ records: [record], shown });
        }""",
        {**data, "title": "Told twice"},
    )
    expect(titles(page)).to_have_count(4)
    page.wait_for_timeout(300)
    expect(titles(page)).to_have_count(4)
    page.locator("#conversations li:not(:has([aria-current])) .title", has_text="Bravo").click()
    expect(questions(page)).to_contain_text("Bravo?")
    visit.expected(LEFT)


def test_undo_keeps_what_is_typed(page, photo):
    attach(page, photo)
    box(page).fill("next")
    page.locator("#chat").get_by_role("button", name="Undo").last.click()
    expect(answers(page)).to_have_count(0)
    expect(box(page)).to_have_value("Bravo?\nnext")
    expect(page.locator("#box .thumbnail-wrapper")).to_have_count(1)
    box(page).press("Enter")
    done(page)
    expect(questions(page).last).to_contain_text(re.compile(r"Bravo\?\s*next"))


def test_each_paragraph_has_its_own_direction(visit):
    page = visit()
    ask(page, "مرحبا بالعالم")
    text = questions(page).locator("p").last
    left, right = text.evaluate(
        """(p) => {
            const range = document.createRange(); range.selectNodeContents(p);
            const [written, whole] = [range.getBoundingClientRect(), p.getBoundingClientRect()];
            return [written.left - whole.left, whole.right - written.right];
        }"""
    )
    assert right <= left
