"""Nothing is lost: conversations in the browser's store, their addresses, reloads, versions."""

import base64
import json
import re
import socket
import threading
from contextlib import suppress
from functools import partial

import psutil
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from minigpt4.model.image import jpeg
from minigpt4.web.page.page import build_page, serve
from tests import api_case
from tests.fake_engine import FakeAnswer
from tests.page_case import (
    PHONE,
    WIDE,
    Visitors,
    answers,
    ask,
    attach,
    box,
    done,
    figures,
    open_settings,
    picture,
    questions,
    say,
    starting,
    status,
)
from tests.running import wait_for

# What a reloaded page still listened to, and what Gradio's client makes of its last parts.
LEFT = "AbortError|Connection errored out|reading 'content'"
KEPT = "(async (t) => JSON.stringify(await (await minigpt4.store).all('talks')).includes(t))"
MANY = """async (count) => {
    const base = await minigpt4.store, thumb = "data:image/jpeg;base64," + "A".repeat(4000);
    await base.write(["chats", "talks"], (chats, talks) => {
        for (let i = 0; i < count; i += 1) {
            chats.put({ id: `c${i}`, title: `Chat ${i}`, time: 1e12 + i, thumb });
            talks.put({ id: `c${i}`, messages: [], keys: [] });
        }
    });
    window.done = [];
    new BroadcastChannel("minigpt4").postMessage("changed");
    const plain = base.base.transaction.bind(base.base);
    base.base.transaction = (names, mode) => { done.push(mode); return plain(names, mode); };
    addEventListener("minigpt4:chats", () => done.push("drawn"));
}"""
TWO_DAYS_AGO = "Date.now() - 2 * 864e5"
TALK = "async (place) => (await (await minigpt4.store).all('talks'))[place]"


def titles(page: Page):
    return page.locator("#conversations .title")


def go_on(page: Page) -> None:
    page.wait_for_function("!document.documentElement.hasAttribute('data-opening')")
    page.get_by_role("button", name=re.compile("Continue|Answer now")).click()


def new_chat(page: Page) -> None:
    page.get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)


@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_a_reload_in_mid_answer_brings_everything_back(visit, engine, photo, size):
    engine.word_seconds = 0.05
    page = visit(**size)
    attach(page, photo)
    say(page, "A long one, please.")
    expect(answers(page)).to_contain_text("word12")
    page.wait_for_function("location.hash.startsWith('#/c/')")
    address = page.url
    page.reload()
    expect(answers(page)).to_contain_text("word5")
    expect(status(page)).to_contain_text("The answer was interrupted")
    assert page.url == address
    picture = page.locator("#chat .image-frame img")
    page.wait_for_function("document.querySelector('#chat .image-frame img')?.naturalWidth === 320")
    expect(picture).to_have_count(1)
    expect(questions(page).last).to_have_text("A long one, please.")
    engine.word_seconds = 0.0
    go_on(page)
    expect(answers(page)).to_contain_text("word299")
    done(page)
    whole = [f"word{i}" for i in range(1, 200)]
    assert answers(page).inner_text().split()[:199] == whole
    wait_for(lambda: page.evaluate(KEPT, "word299"))
    page.reload()  # its end has been kept as well
    expect(answers(page)).to_contain_text("word299")
    assert page.evaluate("minigpt4.chats.all().length") == 1
    expect(figures(page)).to_contain_text("Answered in")
    visit.expected(LEFT)


def test_a_crash_in_mid_answer_brings_everything_back(browser, address, engine, photo, tmp_path):
    engine.word_seconds, engine.ahead = 0.05, 0
    start = partial(browser.browser_type.launch_persistent_context, tmp_path / "me", **starting())
    page = start().pages[0]
    page.goto(address)
    attach(page, photo)
    say(page, "A long one, please.")
    expect(answers(page)).to_contain_text("word12")
    page.wait_for_function("location.hash.startsWith('#/c/')")
    shown, there = answers(page).inner_text().split(), page.url
    wait_for(lambda: page.evaluate(KEPT, shown[-1]))  # within half a second
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # those of other tests may end meanwhile
            if any(str(tmp_path / "me") in argument for argument in process.cmdline()):
                process.kill()
    (page,) = start().pages
    page.goto(there)
    expect(answers(page)).to_contain_text(" ".join(shown))
    expect(questions(page).last).to_have_text("A long one, please.")
    page.wait_for_function("document.querySelector('#chat .image-frame img')?.naturalWidth === 320")
    expect(status(page)).to_contain_text("The answer was interrupted")
    page.context.close()


def test_a_reload_before_the_picture_was_kept(visit, engine, photo):
    engine.ahead = 1
    page = visit(**WIDE)
    attach(page, photo)
    fetching = re.compile("/file=")

    def hold(route):  # what the page itself fetches, not what an element shows
        route.abort() if route.request.resource_type == "fetch" else route.continue_()

    page.route(fetching, hold)
    say(page, "What is this?")
    page.wait_for_function("location.hash.startsWith('#/c/')")
    page.unroute(fetching)
    page.reload()
    page.wait_for_function("document.querySelector('#chat .image-frame img')?.naturalWidth === 320")
    expect(questions(page).last).to_have_text("What is this?")
    engine.ahead = 0
    visit.expected(LEFT + "|ERR_FAILED")


def test_a_reload_before_the_first_word(visit, engine):
    engine.ahead = 1
    page = visit(**WIDE)
    say(page, "Tell me a story.")
    expect(status(page)).to_contain_text("You are next")
    page.wait_for_function("location.hash.startsWith('#/c/')")
    page.reload()
    expect(page.get_by_text("This question has not been answered.")).to_be_visible()
    engine.ahead = 0
    go_on(page)
    expect(answers(page)).to_contain_text("red house")
    expect(page.get_by_text("This question has not been answered.")).to_have_count(0)
    visit.expected(LEFT)


def test_what_was_not_answered_is_opened_again(visit, engine):
    """With a question that was stopped before the first word, and one that failed."""
    engine.ahead = 1
    page = visit(**WIDE)
    say(page, "Tell me a story.")
    expect(status(page)).to_contain_text("You are next")
    page.get_by_label("Stop").click()
    expect(page.get_by_role("button", name="Answer now")).to_be_visible()
    engine.ahead = 0
    say(page, "Please fail.")
    expect(answers(page)).to_have_text("The model ran out of memory: ask something shorter.")
    done(page)
    wait_for(lambda: page.evaluate(f"async () => (await ({TALK})(0)).remarks.length"))
    page.reload()
    expect(answers(page)).to_have_text("The model ran out of memory: ask something shorter.")
    expect(questions(page)).to_have_text(["Tell me a story.", "Please fail."])
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    visit.expected(LEFT)


def test_a_reload_before_the_question_was_kept(visit):
    page = visit(**WIDE)
    page.evaluate("async () => { (await minigpt4.store).change = () => new Promise(() => {}) }")
    say(page, "Tell me a story.")
    expect(answers(page)).to_contain_text("red house")
    expect(box(page)).to_have_value("")
    page.reload()
    expect(box(page)).to_have_value("Tell me a story.")
    ask(page, "Hello?")
    wait_for(lambda: page.evaluate(KEPT, "red house"))
    page.reload()
    expect(answers(page)).to_contain_text("red house")
    expect(box(page)).to_have_value("")
    visit.expected(LEFT)


def test_each_conversation_has_an_address(visit, photo):
    page = visit(**WIDE)
    attach(page, photo)
    ask(page, "Where is the boat?")
    first = page.url
    new_chat(page)
    assert "#" not in page.url
    ask(page, "Count them.")
    new_chat(page)
    page.go_back()
    expect(answers(page)).to_contain_text("I see 0 pictures")
    page.go_back()
    expect(answers(page)).to_contain_text("red house")
    assert page.url == first
    expect(titles(page).and_(page.locator("[aria-current=page]"))).to_contain_text(
        "Where is the boat?"
    )
    page.go_forward()
    expect(answers(page)).to_contain_text("I see 0 pictures")
    page.go_forward()
    expect(answers(page)).to_have_count(0)
    titles(page).filter(has_text="Where is the boat?").click()
    expect(answers(page)).to_contain_text("red house")
    other = page.context.new_page()
    other.goto(page.url)
    expect(answers(other)).to_contain_text("red house")
    picture = other.locator("#chat .image-frame img")
    expect(picture).to_have_count(1)
    other.goto(first.split("#")[0] + "#/c/none")
    expect(
        other.get_by_text("This conversation is not, or no longer, in this browser")
    ).to_be_visible()


def test_the_list_is_searched_and_pinned_and_deletions_are_undone(visit, photo):
    page = visit(**WIDE)
    attach(page, photo)
    for question in ("Where is the boat?", "Count them.", "Say it again."):
        ask(page, question)
        new_chat(page)
    expect(titles(page)).to_contain_text(["Say it again.", "Count them.", "Where is the boat?"])
    page.get_by_label("Pin: Where is the boat?").click()
    expect(titles(page)).to_contain_text(["Where is the boat?", "Say it again.", "Count them."])
    page.evaluate(f"minigpt4.chats.edit([minigpt4.chats.all()[2].id], {{ time: {TWO_DAYS_AGO} }})")
    heads = page.locator("#conversations h2")
    expect(heads).to_have_text(["Pinned", "Today", "Last 7 days"])
    field = page.get_by_label("Search")
    field.fill("BOAT small")  # words of the answer, in any order
    expect(titles(page)).to_have_count(1)
    expect(titles(page)).to_contain_text("and a small boat waits")
    field.fill("count")
    expect(titles(page)).to_contain_text(["Count them."])
    field.fill("nowhere")
    expect(page.get_by_text("Nothing found.")).to_be_visible()
    field.fill("")
    expect(titles(page)).to_have_count(3)
    box(page).hover()  # a pin is seen also while the pointer is elsewhere, and no other button
    for button, opacity in (("Unpin", "1"), ("Rename", "0"), ("Delete", "0")):
        named = page.get_by_label(f"{button}: Where is the boat?")
        expect(named).to_have_css("opacity", opacity)
    pin = page.get_by_label("Unpin: Where is the boat?")
    place = pin.bounding_box()
    titles(page).first.hover()  # the others come, and it stays
    expect(page.get_by_label("Rename: Where is the boat?")).to_have_css("opacity", "1")
    assert pin.bounding_box() == place

    titles(page).filter(has_text="Count them.").click()
    expect(answers(page)).to_contain_text("I see 0 pictures.")
    page.get_by_label("Delete: Count them.").click()
    expect(titles(page)).to_have_count(2)
    expect(answers(page)).to_have_count(0)
    page.get_by_role("status").get_by_role("button", name="Undo").click()
    expect(titles(page)).to_have_count(3)
    expect(answers(page)).to_contain_text("I see 0 pictures.")

    for question in ("Count them.", "Where is the boat?"):
        page.get_by_label(f"Delete: {question}").click()
    page.evaluate("minigpt4.notice('Something else.')")  # it does not take the button away
    expect(page.locator(".notice")).to_have_count(2)
    expect(page.get_by_text("2 conversations deleted.")).to_be_visible()
    page.get_by_role("status").get_by_role("button", name="Undo").click()
    expect(titles(page)).to_have_count(3)
    expect(answers(page)).to_contain_text("I see 0 pictures.")


def test_a_double_click_in_the_list_is_one(visit, engine):
    page = visit(**WIDE)
    for question in ("First?", "Second?", "Third?"):
        ask(page, question)
        new_chat(page)
    page.get_by_label("Pin: First?").dblclick()
    expect(titles(page)).to_contain_text(["First?", "Third?", "Second?"])
    page.get_by_label("Rename: Third?").dblclick()
    page.keyboard.type("Fourth")
    page.keyboard.press("Enter")
    expect(titles(page)).to_have_text([re.compile(f"^{t}") for t in ("First", "Fourth", "Second")])
    page.get_by_label("Search").fill("fourth")  # a title that stands in no text
    expect(titles(page)).to_have_text([re.compile("^Fourth")])
    page.get_by_label("Search").fill("")
    expect(titles(page)).to_have_count(3)
    page.get_by_label("Delete: Fourth").dblclick()
    page.wait_for_timeout(400)
    expect(titles(page)).to_have_text([re.compile("^First"), re.compile("^Second")])
    expect(page.get_by_label("Unpin: First?")).to_have_count(1)

    engine.word_seconds = 0.03  # deleted while it is being answered, and brought back at once
    say(page, "A long one, please.")
    expect(answers(page)).to_contain_text("word3")
    page.get_by_label("Delete: A long one, please.").click()
    page.get_by_role("status").get_by_role("button", name="Undo").click()
    expect(titles(page)).to_have_count(4)  # with the one that was deleted just before
    page.wait_for_function("!document.documentElement.hasAttribute('data-opening')")
    expect(questions(page)).to_have_text("A long one, please.")


def test_many_conversations_are_deleted_and_brought_back_in_one_go(visit):
    page = visit(**WIDE)
    page.evaluate(MANY, 300)
    expect(titles(page)).to_have_count(300)
    page.locator("#conversations li").first.evaluate("row => { row.mine = true; window.done = [] }")
    page.evaluate("minigpt4.chats.edit(['c7'], { pinned: true })")
    expect(titles(page).first).to_contain_text("Chat 7")
    # A row that shows the same as before is the same element.
    assert page.locator("#conversations li").nth(1).evaluate("row => row.mine")
    assert page.evaluate("done") == ["readwrite", "drawn"]
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete all").click()
    expect(titles(page)).to_have_count(0)
    page.get_by_role("status").get_by_role("button", name="Undo").click()
    expect(titles(page)).to_have_count(300)
    assert page.evaluate("done") == ["readwrite", "drawn"] * 3


def test_what_localstorage_kept_is_taken_over_once(visit, photo):
    page = visit(**WIDE)
    url = "data:image/jpeg;base64," + base64.b64encode(jpeg(Image.open(photo))).decode()
    said = [("user", "What is it?"), ("assistant", "A meadow.")]
    messages = [{"role": r, "parts": [{"type": "text", "text": t}]} for r, t in said]
    messages[0]["parts"].insert(0, {"type": "image", "key": "k1"})
    data = {"model": "nano", "system": None, "messages": messages, "pictures": {"k1": url}}
    old = {"title": "My meadow", "named": True, "time": 1_000_000_000_000, "data": data}
    page.evaluate("(old) => localStorage.setItem('minigpt4:chat:old1', old)", json.dumps(old))
    page.evaluate("localStorage.setItem('minigpt4:chat:old2', '{damaged')")
    page.reload()
    expect(titles(page)).to_contain_text(["My meadow"])
    page.wait_for_function("!Object.keys(localStorage).some((key) => key.includes('old'))")
    expect(page.locator("#conversations li img")).to_have_count(1)
    titles(page).click()
    expect(answers(page)).to_contain_text("A meadow.")
    expect(page.locator("#chat .image-frame img")).to_have_count(1)
    visit.expected(LEFT)


def test_without_indexeddb_the_page_works_for_the_visit(visit, photo):
    page = visit(**WIDE)
    page.add_init_script("Object.defineProperty(window, 'indexedDB', { value: undefined })")
    page.reload()
    sentence = page.get_by_text("This browser keeps no conversations")
    expect(sentence).to_be_visible()
    attach(page, photo)
    ask(page, "Where is the boat?")
    new_chat(page)
    titles(page).click()
    expect(answers(page)).to_contain_text("red house")
    expect(page.locator("#chat .image-frame img")).to_have_count(1)
    page.get_by_label("Delete: Where is the boat?").click()
    expect(titles(page)).to_have_count(0)
    visit.expected(LEFT)


def test_a_full_disk_takes_no_conversation_away(visit):
    page = visit(**WIDE)
    ask(page, "Hello?")
    wait_for(lambda: page.evaluate(KEPT, "red house"))
    page.add_init_script(
        "IDBObjectStore.prototype.put = () => { throw new DOMException('', 'QuotaExceededError') }"
    )
    page.reload()
    expect(titles(page)).to_contain_text(["Hello?"])
    expect(answers(page)).to_contain_text("red house")
    expect(page.get_by_text("This browser keeps no conversations")).to_be_hidden()
    visit.expected(LEFT)


def test_a_chat_that_is_opened_on_a_phone_is_in_view(visit):
    page = visit(**PHONE)
    ask(page, "Hello?")
    page.get_by_role("button", name="Conversations").click()
    new_chat(page)
    page.get_by_role("button", name="Conversations").click()
    titles(page).click()
    expect(titles(page)).to_be_hidden()
    expect(answers(page)).to_contain_text("red house")
    expect(answers(page)).to_be_in_viewport()
    expect(box(page)).to_be_enabled()


def test_an_opened_file_keeps_its_title_and_place(visit, tmp_path):
    page = visit(**WIDE)
    open_settings(page)
    length = page.get_by_label("Maximum length, number")
    length.fill("20")
    length.press("Tab")
    ask(page, "A long one, please.")
    page.get_by_label("Rename: A long one, please.").click()
    page.get_by_label("Rename", exact=True).fill("Words")
    page.keyboard.press("Enter")
    expect(titles(page)).to_contain_text(["Words"])
    page.get_by_role("button", name="Download the conversation").click()
    with page.expect_download() as download:
        page.get_by_role("menuitem", name="Download as JSON").click()
    kept = tmp_path / "kept.json"
    download.value.save_as(kept)
    new_chat(page)
    ask(page, "Hello?")
    page.get_by_label("Delete: Words").click()
    expect(titles(page)).to_contain_text(["Hello?"])
    page.locator("#rail input[type=file]").set_input_files(kept)
    expect(answers(page)).to_contain_text("word20")
    expect(status(page)).to_contain_text("Stopped at the maximum length")
    expect(titles(page)).to_contain_text(["Hello?", "Words"])  # in the place of its date
    go_on(page)
    expect(answers(page)).to_contain_text("word40")
    expect(titles(page)).to_contain_text(["Words", "Hello?"])


class Line:
    """A connection to a server that can be cut and mended; `address` is this end's."""

    def __init__(self, address: str) -> None:
        self._server = address.split("//")[1].split(":")
        self._ends: list[socket.socket] = []
        self._port = 0
        self.mend()

    def mend(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listening.getsockname()[1]
        self.address = f"http://127.0.0.1:{self._port}"
        threading.Thread(target=self._accept, args=[self._listening], daemon=True).start()

    def cut(self) -> None:
        for end in [self._listening, *self._ends]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends.clear()

    def _accept(self, listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                near, _ = listening.accept()
                far = socket.create_connection(self._server)
                self._ends += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=pair, daemon=True).start()

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


def test_a_connection_that_breaks_in_mid_answer(browser, address, engine):
    line = Line(address)
    visitors = Visitors(browser, line.address)
    engine.word_seconds, engine.ahead = 0.05, 0
    page = visitors(**WIDE)
    say(page, "A long one, please.")
    expect(answers(page)).to_contain_text("word12")
    page.wait_for_function("location.hash.startsWith('#/c/')")
    box(page).fill("What I was writing")
    line.cut()
    expect(page.get_by_text("The connection to the server was lost.")).to_be_visible()
    expect(answers(page)).to_contain_text("word12")  # what had come stays
    line.mend()
    expect(status(page)).to_contain_text("The answer was interrupted")  # the page comes back
    expect(answers(page)).to_contain_text("word5")
    expect(box(page)).to_have_value("What I was writing")
    engine.word_seconds = 0.0
    go_on(page)
    expect(answers(page)).to_contain_text("word299")
    done(page)
    visitors.expected(f"{LEFT}|network|Failed to (load|fetch)|ERR_|TypeError")
    visitors.check()
    line.cut()


def test_settings_are_remembered(visit):
    page = visit(**WIDE)
    open_settings(page)
    page.get_by_label("creative").click()
    temperature = page.get_by_label("Temperature, number")
    expect(temperature).to_have_value("0.8")
    length = page.get_by_label("Maximum length, number")
    length.fill("20")
    length.press("Tab")
    temperature.fill("1.5")
    temperature.press("Tab")
    expect(page.get_by_label("custom")).to_be_checked()
    page.get_by_label("System prompt").fill("Answer in rhymes.")
    page.reload()
    open_settings(page)
    expect(length).to_have_value("20")
    expect(page.get_by_label("System prompt")).to_have_value("Answer in rhymes.")
    expect(page.get_by_label("custom")).to_be_checked()
    expect(page.get_by_label("Top-p, number")).to_have_value("0.95")  # of the preset
    expect(temperature).to_have_value("1.5")
    page.get_by_label("creative").click()  # a preset sets all of them
    expect(length).to_have_value("300")
    page.reload()
    open_settings(page)
    expect(page.get_by_label("creative")).to_be_checked()
    expect(temperature).to_have_value("0.8")
    visit.expected(LEFT)


def test_retry_and_edit_keep_what_was_there(visit):
    page = visit(**WIDE)
    versions = page.locator("#chat .version")
    previous = page.get_by_role("button", name="Previous version")
    ask(page, "Say it again.")
    first = answers(page).inner_text()
    page.get_by_role("button", name="Retry").click()
    expect(answers(page)).not_to_have_text(first)
    expect(versions).to_have_text("2/2")
    previous.press("Enter")
    expect(answers(page)).to_have_text(first)
    expect(versions).to_have_text("1/2")
    expect(previous).to_be_disabled()
    expect(page.get_by_role("button", name="Next version")).to_be_focused()
    ask(page, "Count them.")

    page.get_by_role("button", name="Edit").first.click()
    page.locator("#chat textarea").fill("Hello?")
    page.locator("#chat").get_by_label("Send", exact=True).click()
    expect(answers(page)).to_contain_text(["red house"])
    expect(versions).to_have_text("2/2")
    box(page).hover()
    page.wait_for_timeout(300)
    seen = "e => e.checkVisibility({ opacityProperty: true })"
    assert versions.evaluate(seen)  # also while the pointer is elsewhere
    done(page)
    page.reload()  # kept as well
    expect(answers(page)).to_contain_text(["red house"])
    previous.click()  # what followed belongs to its version
    expect(questions(page)).to_have_text(["Say it again.", "Count them."])
    expect(answers(page)).to_have_text([first, re.compile("I see 0 pictures")])
    expect(versions).to_have_text(["1/2", "1/2"])

    page.get_by_role("button", name="Undo").click()  # what is taken back stays a version, too
    expect(questions(page)).to_have_text(["Say it again."])
    box(page).fill("How many?")
    box(page).press("Enter")
    expect(versions).to_have_text(["1/2", "1/2", "2/2"])
    visit.expected(LEFT)


DROP = """([place, event, files]) => {
    const transfer = new DataTransfer();
    for (const [name, bytes] of files) {
        if (name.includes("/")) transfer.setData(name, bytes);
        else transfer.items.add(new File([new Uint8Array(bytes)], name, { type: "image/png" }));
    }
    const field = event === "paste" ? "clipboardData" : "dataTransfer";
    const made = new (event === "paste" ? ClipboardEvent : DragEvent)(event,
        { [field]: transfer, bubbles: true, cancelable: true });
    document.querySelector(place).dispatchEvent(made);
    return made.defaultPrevented;
}"""


def test_pictures_are_dropped_and_pasted_anywhere(visit, photo):
    page = visit(**WIDE)
    thumbnails = page.locator("#box .thumbnail-wrapper")
    files = [["a.png", list(photo.read_bytes())]]
    page.evaluate(DROP, ["#rail", "dragenter", files])
    expect(page.get_by_text("Drop photos here")).to_be_visible()
    page.evaluate(DROP, ["#rail", "drop", files])
    expect(page.get_by_text("Drop photos here")).to_have_count(0)
    expect(thumbnails).to_have_count(1)
    page.evaluate(DROP, ["body", "paste", files])
    expect(thumbnails).to_have_count(2)
    page.evaluate("minigpt4.shortcuts()")  # a window: the browser does not open the file instead
    assert page.evaluate(DROP, ["#shortcuts", "dragover", files])
    assert page.evaluate(DROP, ["#shortcuts", "drop", files])
    page.keyboard.press("Escape")
    ask(page, "Count them.")
    expect(answers(page)).to_contain_text("I see 2 pictures.")
    page.evaluate(DROP, ["#chat", "drop", [[f"{i}.png", [1, 2, 3]] for i in range(18)]])
    expect(page.get_by_text(re.compile(r"These would be \d+ pictures: a conv"))).to_be_visible()
    expect(thumbnails).to_have_count(0)

    address = ["text/uri-list", "https://example.org/dog.jpg"]
    assert not page.evaluate(DROP, ["#rail input[type=search]", "drop", [address]])
    for place in ("#chat", "#box textarea"):
        assert page.evaluate(DROP, [place, "dragover", [address]])
        assert page.evaluate(DROP, [place, "drop", [address]])
        expect(page.get_by_text("Only the picture's address has arrived")).to_be_visible()
        page.evaluate("document.querySelector('.notice').remove()")

    # What comes before the message box is there is added to it later.
    input = page.locator("#box input[type=file]")
    input.evaluate("input => { window.gone = [input, input.parentNode]; input.remove() }")
    page.evaluate(DROP, ["body", "paste", files])
    page.evaluate("gone[1].append(gone[0])")
    expect(thumbnails).to_have_count(1)


def test_a_question_waits_for_its_pictures(visit, tmp_path, engine):
    """Over a slow line: how far the upload is, in per cent; what is sent meanwhile waits."""
    page = visit(**WIDE)
    files = [picture(tmp_path / f"{i}.bmp", f"#0000{i:02x}") for i in range(3)]  # 230 KB each
    network = page.context.new_cdp_session(page)
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 200_000}
    network.send("Network.emulateNetworkConditions", slow)
    page.locator("#box input[type=file]").set_input_files(files)
    expect(page.get_by_text(re.compile(r"Uploading [23] of 3 · \d\d %"))).to_be_visible()
    line, frame = (page.locator(s).bounding_box() for s in (".uploading", "#composer"))
    assert line["y"] >= frame["y"] + frame["height"]  # it covers no message
    assert line["height"] < 40
    say(page, "Count them.")
    expect(page.get_by_text("then it is sent")).to_be_visible()
    expect(questions(page)).to_have_count(0)
    expect(answers(page)).to_contain_text("I see 3 pictures.")
    expect(page.get_by_text("Uploading")).to_have_count(0)


def test_a_question_is_not_sent_without_the_picture_it_waits_for(visit, photo):
    page = visit()

    uploads = []
    page.route("**/gradio_api/upload*", lambda route: uploads.append(route))
    page.locator("#box input[type=file]").set_input_files(photo)
    expect(page.locator(".uploading")).to_be_visible()
    say(page, "What is this?")
    expect(page.get_by_text("then it is sent")).to_be_visible()
    assert page.evaluate("minigpt4.draft.load()") == {"files": [], "text": "What is this?"}
    uploads[0].fulfill(status=413, body="<h1>413 Request Entity Too Large</h1>")  # a proxy's
    expect(
        page.get_by_text("This file is too large to upload: choose a smaller one.")
    ).to_be_visible()
    expect(page.locator(".uploading")).to_have_count(0)
    with page.expect_file_chooser() as chooser:  # the same file once more
        page.get_by_role("button", name="Choose a photo").click()
    chooser.value.set_files(photo)
    expect(page.locator(".uploading")).to_be_visible()
    box(page).press("Enter")
    uploads[1].fulfill(body="<h1>Log in</h1>", content_type="text/html")
    expect(page.get_by_text("The file could not be uploaded: try again")).to_be_visible()
    expect(page.locator(".uploading")).to_have_count(0)
    page.wait_for_timeout(500)
    expect(box(page)).to_have_value("What is this?")
    expect(questions(page)).to_have_count(0)
    visit.expected("413|upload")


def test_new_chat_keeps_what_was_not_sent(visit, photo):
    page = visit(**WIDE)
    ask(page, "Hello?")
    attach(page, photo)
    box(page).fill("Count them.")
    new_chat(page)
    page.wait_for_timeout(500)
    expect(box(page)).to_have_value("Count them.")
    box(page).press("Enter")
    expect(answers(page)).to_contain_text("I see 1 pictures")
    done(page)


def test_the_keyboard_stays_in_the_list(visit):
    page = visit(**WIDE)
    for text in ("First?", "Second?"):
        ask(page, text)
        new_chat(page)
    expect(titles(page)).to_have_count(2)
    page.get_by_role("button", name="Pin: First?").press("Enter")
    expect(page.get_by_role("button", name="Unpin: First?")).to_be_focused()
    expect(titles(page).first).to_contain_text("First?")


def test_a_browser_that_keeps_nothing(visit):
    page = visit()
    page.context.add_init_script(
        "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('no') } })"
    )
    page.goto(page.url + "#/c/%")  # and a damaged address
    page.reload()
    ask(page, "Hello?")
    dark = page.evaluate("document.documentElement.classList.contains('dark')")
    page.evaluate("minigpt4.theme()")
    assert page.evaluate("document.documentElement.classList.contains('dark')") != dark
    expect(answers(page)).to_have_count(1)
    visit.expected("AbortError|Connection errored out")  # what the left page listened to


def test_a_conversation_that_the_server_forgot_is_opened_again(browser, engine, photo, monkeypatch):
    """As after a day, or once the connection of a sleeping computer was closed for an hour."""
    monkeypatch.setattr("minigpt4.web.page.session.ask", FakeAnswer)
    page_of_all = build_page(engine)
    visit = Visitors(browser, serve(page_of_all, api_case.options()))
    page = visit(**WIDE)
    attach(page, photo)
    ask(page, "Count them.")
    page.wait_for_function("minigpt4.chats.current")
    wait_for(lambda: page.evaluate(KEPT, "I see 1 pictures"))
    page_of_all.app.state_holder.session_data.clear()
    asked = len(engine.asked)
    say(page, "Count them again.")
    expect(page.get_by_text("The server no longer had this conversation.")).to_be_visible()
    page.wait_for_function("!document.documentElement.hasAttribute('data-opening')")
    expect(box(page)).to_have_value("Count them again.")
    assert len(engine.asked) == asked
    expect(answers(page)).to_have_count(1)
    box(page).press("Enter")
    expect(answers(page)).to_have_count(2)
    done(page)
    assert len(engine.asked[-1].pictures) == 1
    page_of_all.app.state_holder.session_data.clear()
    page.get_by_role("button", name="Edit").first.click()
    page.locator("#chat textarea").fill("Count the *legs*.")
    page.locator("#chat textarea").press("Control+Enter")
    expect(box(page)).to_have_value("Count the *legs*.")
    page.wait_for_function("!document.documentElement.hasAttribute('data-opening')")
    expect(answers(page)).to_have_count(2)
    assert len(engine.asked) == asked + 1
    page_of_all.app.state_holder.session_data.clear()
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_text("The server no longer had this conversation.").last).to_be_visible()
    page.wait_for_function("!document.documentElement.hasAttribute('data-opening')")
    expect(answers(page)).to_have_count(2)
    assert len(engine.asked) == asked + 1
    visit.expected("AbortError|Connection errored out")
    visit.check()
    page_of_all.close(verbose=False)
