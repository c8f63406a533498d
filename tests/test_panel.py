"""The page's panel and its looks in a browser: websites, kept conversations, languages, access."""

import json
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from playwright.sync_api import Page, expect

from minigpt4.config import MODELS
from minigpt4.errors import Step
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.page import ChatPage
from minigpt4.web.page.session import Session
from tests.fake_engine import FakeEngine
from tests.page_case import (
    PHONE,
    WIDE,
    Visitors,
    answers,
    ask,
    attach,
    box,
    done,
    download_as,
    figures,
    open_settings,
    picture,
    questions,
    say,
    served,
    status,
)
from tests.running import wait_for

TEXTS = Path(__file__).parent.parent / "minigpt4" / "web" / "page" / "texts"
DRAG = """() => {
    const dataTransfer = new DataTransfer();
    dataTransfer.items.add(new File([""], "a.png"));
    document.body.dispatchEvent(new DragEvent("dragenter", { dataTransfer, bubbles: true }));
}"""
# Until what moves or fades has arrived.
SETTLED = """() => Promise.all(document.getAnimations()
    .filter(({ effect }) => effect.getComputedTiming().endTime < Infinity)
    .map(({ finished }) => finished.catch(() => {})))"""
AXE = Path(__file__).parent.parent / "node_modules" / "axe-core" / "axe.min.js"


@pytest.mark.trust("What the model writes", "HTML and scripts, in the chat and in the preview")
@pytest.mark.trust("What the model writes", "WebRTC in the preview")
def test_a_website_is_previewed_in_a_closed_frame(visit):
    page = visit(**WIDE)
    ask(page, "Make a website of this draft.")
    page.get_by_role("button", name="Preview the website").click()
    frame = page.frame_locator("iframe.website")
    expect(frame.get_by_text("My Joke Website")).to_be_visible()
    assert page.locator("iframe.website").get_attribute("sandbox") == "allow-scripts"
    expect(frame.get_by_text("To get to the other side!")).to_be_hidden()
    frame.get_by_role("button", name="Show the answer").click()  # its own script runs
    expect(frame.get_by_text("To get to the other side!")).to_be_visible()
    # A link or a form does not take it away.
    page.frames[1].evaluate(
        """document.body.insertAdjacentHTML("beforeend", '<a href="/more">More</a>' +
        '<form action="/more"><button>Send</button></form>')"""
    )
    frame.get_by_text("More").click()
    frame.get_by_role("button", name="Send").click()
    expect(frame.get_by_text("To get to the other side!")).to_be_visible()
    # It reaches neither the page, nor the server, nor another host.
    expect(frame.locator("body")).to_have_attribute("data-fetch", "refused")
    expect(page).to_have_title("MiniGPT-4")
    inner = page.frames[1]
    assert inner.evaluate("document.title") == "kept out"
    assert inner.evaluate("typeof RTCPeerConnection") == "undefined"
    assert inner.evaluate("""() => {
      const dataTransfer = new DataTransfer();
      dataTransfer.items.add(new File([""], "a.png"));
      const made = new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true });
      return !document.body.dispatchEvent(made);
    }""")  # a file that is dropped on it does not take the page's place
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the website").click()
    assert download.value.suggested_filename == "website.html"
    saved = Path(download.value.path()).read_text()
    assert saved.startswith("<!doctype html>") and "Content-Security" not in saved
    page.get_by_role("button", name="Code").click()
    expect(page.locator("#code textarea")).to_have_value(re.compile("Why did the chicken"))

    ask(page, "Another website, please.")
    page.get_by_role("button", name="Preview the website").click()
    which = page.get_by_label("Choose an answer")
    expect(which).to_have_value("Answer 2")
    for number in (1, 2):
        which.click()
        page.get_by_role("option", name=f"Answer {number}").click()
        expect(which).to_have_value(f"Answer {number}")

    # What is shown can be saved, though its answer is gone.
    page.get_by_role("button", name="Undo").click()
    expect(answers(page)).to_have_count(1)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the website").click()
    assert Path(download.value.path()).read_text() == saved


@pytest.mark.trust("What the model writes", "no request leaves the page")
def test_a_previewed_website_cannot_lead_elsewhere(visit):
    page = visit(**WIDE)
    ask(page, "Make a website of this draft.")
    left = []
    page.on("requestfinished", lambda request: left.append(request.url))
    for place in ("http://192.0.2.1/?secret", page.url.split("#")[0] + "config"):
        page.get_by_role("button", name="Preview the website").click()
        inside = page.frame_locator("iframe.website")
        expect(inside.get_by_text("My Joke Website")).to_be_visible()
        page.frames[1].evaluate(f"setTimeout(() => {{ location.href = {place!r} }})")
        expect(inside.get_by_text("My Joke Website")).to_have_count(0)  # the browser refused
        page.locator("#website").get_by_role("button", name="Close").click()
        page.get_by_role("button", name="New chat").click()
        expect(answers(page)).to_have_count(0)
        ask(page, "Make a website of this draft.")
    assert not [url for url in left if "192.0.2.1" in url or url.endswith("/config")]
    visit.expected("192.0.2.1|frame-src|/config")


@pytest.mark.trust("What the model writes", "no request leaves the page")
def test_nothing_is_fetched_from_elsewhere(browser, address):
    page = browser.new_page()
    page.goto(address)
    expect(box(page)).to_be_visible()
    page.evaluate("document.addEventListener('securitypolicyviolation', () => window.stopped = 1)")
    page.evaluate("new Image().src = 'http://192.0.2.1/picture.png'")
    page.wait_for_function("window.stopped")
    page.close()


def test_downloaded_conversations_can_be_opened(visit, photo, tmp_path, engine):
    page = visit(**WIDE)
    attach(page, photo)
    ask(page, "Describe <i>this</i>.")
    with page.expect_download() as download:
        download_as(page, "Markdown")
    text = Path(download.value.path()).read_text()
    assert "## Question" in text and "](data:image/jpeg;base64," in text and "red house" in text
    with page.expect_download() as download:
        download_as(page, "JSON")
    kept = tmp_path / "kept.json"
    download.value.save_as(kept)
    assert json.loads(kept.read_text())["format"] == "minigpt4-conversation"

    page.get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"format": "something else"}')
    page.locator("#rail input[type=file]").set_input_files(wrong)
    expect(page.get_by_text("This file holds no conversation")).to_be_visible()
    page.locator("#rail input[type=file]").set_input_files(kept)
    expect(answers(page)).to_have_count(1)
    expect(questions(page).locator("img")).to_have_count(1)
    expect(questions(page).last).to_contain_text("Describe <i>this</i>.")
    ask(page, "Count them.")
    expect(answers(page).last).to_contain_text("I see 1 pictures.")
    assert len(engine.asked[-1].messages) == 4


def test_conversations_stay_in_the_browser(visit, photo):
    page = visit(**WIDE)
    attach(page, photo)
    ask(page, "Describe it <b>well</b>.")
    kept = page.locator("#conversations li")
    expect(kept).to_contain_text("Describe it <b>well</b>.")
    kept.locator("button.title").click()
    page.get_by_label(re.compile("^Rename: ")).click()
    field = page.get_by_label("Rename", exact=True)
    field.fill("My meadow")
    # What is written meanwhile does not take the name from under one's hands.
    page.evaluate("minigpt4.chats.edit([minigpt4.chats.all()[0].id], { title: 'Other' })")
    field.press("Enter")
    expect(kept).to_contain_text("My meadow")
    # The key named the conversation; it sent no message, and the keyboard is still in the list.
    expect(kept.locator("button.title")).to_be_focused()
    assert page.get_by_text("The message is empty").count() == 0
    page.get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)
    ask(page, "Hello?")
    expect(kept).to_have_count(2)
    expect(kept.last).to_contain_text("My meadow")
    page.get_by_role("button", name="New chat").click()
    expect(box(page)).to_be_focused()
    expect(answers(page)).to_have_count(0)
    ask(page, "Bye?")
    expect(kept).to_have_count(3)
    page.get_by_label("Delete: My meadow").click()
    expect(kept).to_have_count(2)
    page.get_by_role("button", name="Undo", exact=True).last.click()
    expect(kept).to_have_count(3)
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete all").click()
    expect(page.get_by_text("No conversations yet.")).to_be_visible()


def test_the_list_while_an_answer_is_given(visit, engine):
    page = visit(**WIDE)
    row = page.locator("#conversations li")
    title = page.locator("#conversations button.title")
    field = page.get_by_label("Rename", exact=True)
    ask(page, "First?")
    page.get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)
    ask(page, "Second?")
    expect(title).to_contain_text(["Second?", "First?"])

    # The click that ends the writing of a name does what it would do anyway.
    page.get_by_label("Rename: Second?").click()
    field.fill("The other")
    title.filter(has_text="First?").click()
    expect(questions(page)).to_contain_text("First?")
    expect(title).to_contain_text(["The other", "First?"])

    engine.word_seconds = 0.03
    say(page, "A long one, please.")
    expect(answers(page).last).to_contain_text("word3")
    expect(title).to_contain_text(["First?", "The other"])  # the question has put it first
    page.get_by_label("Rename: First?").click()
    field.fill("Never mind")
    field.press("Escape")  # ends the writing, not the answer
    expect(title).to_contain_text(["First?", "The other"])
    expect(answers(page).last).to_contain_text("word40")
    box(page).press("Escape")
    done(page)

    # The list does not change under a finger.
    title.filter(has_text="The other").click()
    expect(questions(page)).to_contain_text(["Second?"])
    title.filter(has_text="First?").hover()
    page.mouse.down()
    say(page, "A long one, please.")
    page.wait_for_function("minigpt4.chats.all()[0].title === 'The other'")
    expect(title).to_contain_text(["First?", "The other"])
    page.mouse.up()
    expect(questions(page)).to_contain_text(["First?"])
    expect(title).to_contain_text(["The other", "First?"])

    page.get_by_label("Rename: The other").click()
    page.get_by_label("Delete: First?").click()
    expect(row).to_have_count(1)


def test_two_pages_go_on_with_one_conversation(visit):
    page = visit(**WIDE)
    ask(page, "First?")
    recent = page.locator("#conversations li")
    expect(recent).to_have_count(1)
    other = page.context.new_page()
    other.goto(page.url)  # the conversation's address
    expect(answers(other)).to_have_count(1)
    ask(other, "Second?")
    ask(other, "Third?")
    turns = """async () => (await (await minigpt4.store).all("talks"))
        .map((talk) => talk.messages.length / 2).sort().join()"""
    wait_for(lambda: page.evaluate(turns) == "3")
    ask(page, "Another?")
    wait_for(lambda: page.evaluate(turns) == "2,3")  # both are kept
    ask(page, "More?")
    wait_for(lambda: page.evaluate(turns) == "3,3")
    expect(recent).to_have_count(2)


def test_chinese(visit):
    page = visit(locale="zh-CN", **WIDE)
    for text in ("新对话", "暂无对话。", "您的图片里有什么？", "写一首诗", "把照片拖到这里"):
        expect(page.get_by_text(text, exact=True).first).to_be_visible()
    page.get_by_role("button", name="设置").click()
    page.get_by_role("button", name="高级").click()
    for text in ("设置", "温度", "重复惩罚", "均衡"):
        expect(page.get_by_text(text, exact=True).first).to_be_visible()
    expect(box(page)).to_have_attribute("placeholder", "就图片提问……")
    say(page, "你好")
    done(page)
    expect(figures(page)).to_contain_text("每秒 token 数")
    # What Gradio names in English only, for screen readers.
    for name in ("发送", "添加图片", "温度，数字", "复制消息"):
        expect(page.get_by_label(name, exact=True).first).to_be_attached()
    expect(page.get_by_role("group", name="您", exact=True)).to_contain_text("你好")
    expect(page.get_by_role("log")).to_have_attribute("aria-busy", "false")
    german = visit(locale="de-DE")
    expect(german.get_by_role("button", name="Neuer Chat")).to_be_visible()
    ask(german, "Hallo?")
    expect(figures(german)).to_contain_text(re.compile(r"In \d+,\d s beantwortet.*nach\d+,\d\d s"))
    labels = """[...document.querySelectorAll("#model strong")].map((label) => label.offsetWidth)"""
    german.get_by_role("button", name="Einstellungen").click()
    assert len(set(german.evaluate(labels))) == 1  # the values stand below one another


def test_phone_in_the_dark(visit, photo):
    page = visit(color_scheme="dark", **PHONE)
    expect(page.get_by_label("Seed")).to_be_hidden()
    assert page.evaluate("document.body.classList.contains('dark')")
    frame_colour = page.locator("meta[name=theme-color]")
    expect(frame_colour).to_have_attribute("content", "#191917")
    attach(page, photo)
    ask(page, "Make a website of this.")
    open_settings(page)
    # Light, if one likes it better; it stays so.
    page.get_by_role("button", name="Light or dark").click()
    assert not page.evaluate("document.body.classList.contains('dark')")
    expect(frame_colour).to_have_attribute("content", "#faf9f7")
    page.locator("#settings").get_by_role("button", name="Close").click()
    expect(page.get_by_label("Seed")).to_be_hidden()  # for the keyboard too
    page.get_by_role("button", name="Preview the website").click()
    frame = page.frame_locator("iframe.website")
    expect(frame.get_by_text("My Joke Website")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.reload()
    expect(box(page)).to_be_visible()
    page.wait_for_function("!document.body.classList.contains('dark')")
    visit.expected("AbortError|Connection errored out")  # what the reloaded page still listened to


@pytest.mark.parametrize(
    ("scheme", "language", "size"),
    [("light", "en", WIDE), ("dark", "de", WIDE), ("light", "zh-CN", PHONE), ("dark", "es", PHONE)],
    ids=["English", "dark, German", "Chinese, on a phone", "dark, Spanish, on a phone"],
)
def test_accessibility(visit, photo, scheme, language, size):
    if not AXE.exists():
        (pytest.fail if "CI" in os.environ else pytest.skip)(
            "axe-core is missing: apt-get install npm, then make test"
        )
    said = json.loads((TEXTS / f"{language[:2]}.json").read_text(encoding="utf-8"))
    page = visit(color_scheme=scheme, locale=language, **size)
    _assert_accessible(page, "empty", both=True)
    attach(page, photo)
    ask(page, "Make a website of this.")
    figures(page)
    expect(page.locator("#conversations li")).to_have_count(1)
    _assert_accessible(page, "answered", both=True)
    if language in ("en", "es"):  # the other states differ in their words alone
        return
    page.get_by_role("button", name=said["page_settings"]).click()
    page.get_by_role("button", name=said["page_advanced"]).click()
    expect(page.get_by_label(said["page_seed"])).to_be_visible()
    _assert_accessible(page, "settings")
    page.keyboard.press("Escape")
    if size == PHONE:
        page.locator("#box input[type=file]").set_input_files(TEXTS / "en.json")
        expect(page.get_by_test_id("toast-body")).to_be_visible()
        attach(page, photo)
        page.route("**/gradio_api/upload*", lambda route: None)
        page.locator("#box input[type=file]").set_input_files(picture(photo.with_name("b.png")))
        expect(page.locator(".uploading")).to_be_visible()
        page.evaluate(DRAG)
        _assert_accessible(page, "a picture on its way, a warning, another one over the page")
        page.evaluate("document.querySelector('.dropping').remove()")
        page.get_by_role("button", name=said["page_conversations"]).click()
        page.evaluate("minigpt4.notice('Deleted.', 'Undo', () => {})")
        _assert_accessible(page, "list")
        return
    page.get_by_role("button", name=said["page_preview"]).click()
    expect(page.frame_locator("iframe.website").get_by_text("My Joke")).to_be_visible()
    _assert_accessible(page, "preview")
    page.keyboard.press("Escape")
    page.locator("#chat .image-container > button").click()
    expect(page.locator("#lightbox")).to_be_visible()
    _assert_accessible(page, "lightbox")
    page.get_by_role("button", name=said["page_crop"], exact=True).click()
    expect(page.locator("#crop .region")).to_be_focused()
    _assert_accessible(page, "crop")
    for _ in ("crop", "lightbox"):
        page.keyboard.press("Escape")
    page.keyboard.press("?")
    expect(page.locator("#shortcuts")).to_be_visible()
    _assert_accessible(page, "shortcuts")


def _assert_accessible(page: Page, state: str, both: bool = False) -> None:
    """both: in the light and the dark theme."""
    if both:
        page.evaluate("minigpt4.theme()")
        _assert_accessible(page, f"{state}, in the other theme")
        page.evaluate("minigpt4.theme()")
    page.evaluate(SETTLED)  # colours have faded in
    page.evaluate(AXE.read_text())
    found = page.evaluate("axe.run(document, {iframes: false, resultTypes: ['violations']})")[
        "violations"
    ]
    faults = [
        f"{v['id']} ({v['impact']}): " + " | ".join(n["html"][:160] for n in v["nodes"][:3])
        for v in found
    ]
    assert not faults, f"{state}:\n" + "\n".join(faults)


def test_choices_of_a_model_in_another_order_or_form():
    page = object.__new__(ChatPage)
    page._loading, session = Loading.done(FakeEngine(), FakeEngine(name="mini")), Session()

    def choose(value) -> str:
        page.choose_model(session, SimpleNamespace(value=value))
        return session.model

    assert choose({"model": "mini", "when": 20.5}) == "mini"
    for bad in ({"model": "nano", "when": 20}, {"model": "nano"}, {"when": "x"}, ["nano"], None):
        assert choose(bad) == "mini"
    assert choose({"model": "nano", "when": 21}) == "nano"


def test_visitors_choose_among_the_models_offered(browser, monkeypatch, photo):
    from minigpt4.web.page import session
    from tests.fake_engine import FakeAnswer

    monkeypatch.setattr(session, "ask", FakeAnswer)
    nano, mini = FakeEngine(), FakeEngine(name="mini")
    with served(Loading.done(nano, mini)) as address:
        visitors = Visitors(browser, address)
        page = visitors(**WIDE)
        model, foot = page.get_by_label("Model", exact=True), page.locator("#foot")
        expect(model).to_have_value("nano")
        assert model.locator("option").all_inner_texts() == ["nano", "mini"]
        ask(page, "Hello?")
        assert (len(nano.asked), len(mini.asked)) == (1, 0)
        first = page.url

        page.get_by_role("button", name="New chat").click()
        expect(answers(page)).to_have_count(0)

        model.evaluate(  # an arrow key pressed twice, perhaps while the new chat is being shown
            """(model) => ["nano", "mini"].forEach((value) => {
                model.value = value;
                model.dispatchEvent(new Event("change", { bubbles: true }));
            })"""
        )
        expect(foot).to_contain_text("mini")
        attach(page, photo)
        ask(page, "And you?")
        assert (len(nano.asked), len(mini.asked)) == (1, 1)
        expect(page.locator(".seen")).to_have_text("boat")  # mini has a detector, nano has none
        model.select_option("nano")
        expect(foot).to_contain_text("nano")
        ask(page, "Still the same?")
        expect(page.locator(".seen")).to_have_count(0)
        model.select_option("mini")
        expect(foot).to_contain_text("mini")
        page.get_by_role("button", name="New chat").click()
        expect(answers(page)).to_have_count(0)
        expect(model).to_have_value("mini")

        page.locator("#conversations .title", has_text="Hello?").click()  # it remembers its own
        expect(model).to_have_value("nano")
        expect(foot).to_contain_text("nano")
        ask(page, "Still there?")
        assert (len(nano.asked), len(mini.asked)) == (3, 1)
        page.goto(address)  # a new visit begins with what was chosen last
        expect(model).to_have_value("mini")
        page.goto(first)
        page.reload()
        expect(model).to_have_value("nano")
        expect(answers(page)).to_have_count(2)
        visitors.expected("AbortError|Connection errored out")
        visitors.check()


def test_the_page_is_there_before_the_model(browser, tmp_path, monkeypatch):
    from minigpt4.web.page import session
    from tests.fake_engine import FakeAnswer

    temperatures = []

    def ask(engine, conversation, sampling):
        temperatures.append(sampling.temperature)
        return FakeAnswer(engine, conversation, sampling)

    monkeypatch.setattr(session, "ask", ask)
    go_on = tmp_path / "go-on"

    def load(report):
        report(Step("opening", "Loading {name} …", name="nano"))
        while not go_on.exists():
            time.sleep(0.05)
        return FakeEngine()

    loading = Loading(load)
    with served(loading) as address:
        loading.start()
        visitors = Visitors(browser, address)
        page = visitors(**WIDE)
        expect(status(page)).to_contain_text("Getting ready: Loading nano … (")
        german = visitors(locale="de-DE", **WIDE)
        expect(status(german)).to_contain_text("In Vorbereitung: nano wird geladen … (")
        german.close()
        open_settings(page)
        temperature = page.get_by_label("Temperature, number")
        expect(temperature).to_be_hidden()  # the model's own value is not known yet
        say(page, "Hello?")
        expect(page.get_by_text("still loading: ask again")).to_be_visible()
        expect(box(page)).to_have_value("Hello?")
        go_on.touch()
        expect(status(page)).to_contain_text("The model is ready.")
        expect(page.get_by_label("Model", exact=True)).to_have_count(0)  # there is only one
        expect(page.locator("#model")).to_contain_text(MODELS["nano"].licence[:10])
        download = page.get_by_role("button", name="Download the conversation")
        expect(download).to_be_visible()  # the header was redrawn: its buttons keep their names
        expect(temperature).to_have_value("0.5")
        box(page).press("Enter")
        done(page)
        assert page.get_by_role("button", name="Dislike").count() == 0  # nobody stores them
        # The page was built without the model's own values: what is sent at once waits for them.
        quick = visitors(**WIDE)
        quick.route("**/queue/join*", lambda route: (time.sleep(0.3), route.continue_()))
        quick.reload()
        say(quick, "Hello?")
        expect(quick.locator("#chat .bot-row .md")).to_be_visible()
        done(quick)
        assert temperatures == [0.5, 0.5]
        visitors.expected("AbortError|Connection errored out")  # of the reload
        visitors.check()
