"""The chat page in a browser, with a tiny random model: it answers in gibberish, but it answers."""

import os
import re
import shutil
import socket
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import gradio as gr
import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Page, expect, sync_playwright

import app
from minigpt4.engine import Engine, Sampling
from minigpt4.web.page import SORRY, build_page, respond, serve
from minigpt4.web.session import Session, literal
from tests.parity_case import ParityCase

SECONDS = 60_000  # how long the browser waits for anything, in ms: machines may be busy
TOKEN_SECONDS = 0.02  # slow enough to watch
expect.set_options(timeout=SECONDS)


@pytest.fixture(scope="module")
def engine():
    """An engine that takes its time; `engine.model.steps` and `.pictures` count what it did."""
    model = ParityCase(Path(__file__).parent / "parity" / "vicuna_qformer_a").load()
    model.steps = model.pictures = 0

    def step(*_):
        model.steps += 1
        time.sleep(TOKEN_SECONDS)

    def picture(*_):
        model.pictures += 1

    model.llm.register_forward_pre_hook(step)
    model.encoder.register_forward_pre_hook(picture)
    engine = Engine(model)
    engine.eos_ids = frozenset()  # its answers never end before their time
    return engine


def options(**changes) -> Namespace:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"host": "127.0.0.1", "port": port, "share": False}
    return Namespace(**{**values, "max_upload_mb": 20, "max_queue": 32, **changes})


@pytest.fixture(scope="module")
def address(engine):
    page = build_page(engine)
    yield serve(page, options())
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if not chromium:
        (pytest.fail if "CI" in os.environ else pytest.skip)(
            "install chromium: apt-get install chromium"
        )
    quiet = ["background-networking", "component-update", "sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--no-first-run"]
            + [f"--disable-{name}" for name in quiet],
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """Opens the page as a new visitor; afterwards nothing may have gone wrong in the browser."""
    contexts, wrong = [], []

    def seen(request):
        if not request.url.startswith((address, "data:", "blob:")):
            wrong.append(f"request to {request.url}")

    def visit(**settings) -> Page:
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(SECONDS)
        page.on("request", seen)
        page.on("console", lambda m: wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address)
        expect(page.get_by_role("textbox").first).to_be_visible()
        return page

    yield visit
    for context in contexts:
        wrong += [SORRY] * context.pages[0].get_by_text(SORRY).count()
        context.close()
    assert not wrong


@pytest.fixture
def photo(tmp_path):
    picture = Image.new("RGB", (320, 240), "skyblue")
    ImageDraw.Draw(picture).rectangle((0, 160, 320, 240), fill="seagreen")
    ImageDraw.Draw(picture).ellipse((230, 20, 290, 80), fill="gold")
    picture.save(tmp_path / "meadow.png")
    return tmp_path / "meadow.png"


def attach(page: Page, path: Path) -> None:
    page.locator("#box input[type=file]").set_input_files(path)


def say(page: Page, text: str) -> None:
    page.get_by_test_id("textbox").fill(text)
    page.get_by_test_id("textbox").press("Enter")


def answers(page: Page):
    return page.get_by_test_id("bot")


def wait_for(condition) -> None:
    end = time.monotonic() + SECONDS / 1000
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_conversation(visit, engine, photo, tmp_path):
    page = visit(viewport={"width": 1280, "height": 800})
    page.screenshot(path=tmp_path / "empty.png")
    before = engine.model.pictures
    attach(page, photo)
    wait_for(lambda: engine.model.pictures == before + 1)  # while the question is still to come
    page.get_by_text("Describe this image in detail.").click()
    expect(page.get_by_test_id("textbox")).to_have_value("Describe this image in detail.")
    expect(page.get_by_label("File thumbnail")).to_have_count(1)
    page.get_by_test_id("textbox").press("Enter")
    expect(answers(page).first).to_contain_text(re.compile(r"\w"))
    short = answers(page).first.inner_text()
    wait_for(lambda: len(answers(page).first.inner_text()) > len(short))
    expect(page.get_by_label("Stop")).to_be_visible()
    page.screenshot(path=tmp_path / "answering.png")
    expect(page.get_by_label("Submit")).to_be_visible()
    assert answers(page).first.inner_text().startswith(short[:20])
    thumbnail = page.get_by_test_id("user").locator("img")
    wait_for(lambda: thumbnail.evaluate("image => image.naturalWidth") == 320)

    say(page, "And <b>what</b> is above it?")
    expect(page.get_by_text("And <b>what</b> is above it?")).to_be_visible()
    expect(answers(page)).to_have_count(2)
    expect(page.get_by_label("Submit")).to_be_visible()
    assert engine.model.pictures == before + 1
    for unwanted in ("Share", "Clear"):
        expect(page.get_by_label(unwanted).filter(visible=True)).to_have_count(0)
    page.screenshot(path=tmp_path / "desktop.png")

    page.get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)
    expect(page.get_by_text("Chat about a picture")).to_be_visible()


def test_stop(visit, engine):
    page = visit()
    say(page, "")  # nothing to send
    expect(page.get_by_text("The message is empty")).to_be_visible()
    say(page, "Hello?")  # a chat without a picture is a chat
    expect(answers(page).first).to_contain_text(re.compile(r"\w"))
    page.get_by_label("Stop").click()
    expect(page.get_by_label("Submit")).to_be_visible()
    time.sleep(10 * TOKEN_SECONDS)
    steps, text = engine.model.steps, answers(page).first.inner_text()
    time.sleep(10 * TOKEN_SECONDS)
    assert engine.model.steps == steps
    say(page, "Go on.")
    expect(answers(page)).to_have_count(2)
    assert answers(page).first.inner_text().startswith(text.strip()[:10])


def test_no_picture(visit, photo, tmp_path):
    page = visit()
    wrong = tmp_path / "holiday.png"
    wrong.write_text("This is no picture.")
    attach(page, wrong)
    expect(page.get_by_text("holiday.png is damaged, or not a picture")).to_be_visible()
    expect(page.get_by_label("File thumbnail")).to_have_count(0)
    time.sleep(0.5)  # the warning fades in
    page.screenshot(path=tmp_path / "unreadable.png")
    attach(page, photo)
    expect(page.get_by_label("File thumbnail")).to_have_count(1)
    say(page, "What is this?")
    expect(answers(page).first).to_contain_text(re.compile(r"\w"))


def test_two_visitors(visit):
    ann, bob = visit(), visit()
    say(ann, "I am Ann.")
    say(bob, "I am Bob.")
    for page, name in ((ann, "Ann"), (bob, "Bob")):
        expect(answers(page)).to_have_count(1)
        expect(page.get_by_test_id("user")).to_have_count(1)
        expect(page.get_by_test_id("user")).to_contain_text(name)


def test_nothing_is_fetched_from_elsewhere(browser, address):
    page = browser.new_page()
    page.goto(address)
    expect(page.get_by_test_id("textbox")).to_be_visible()
    page.evaluate("document.addEventListener('securitypolicyviolation', () => window.stopped = 1)")
    page.evaluate("new Image().src = 'http://192.0.2.1/picture.png'")
    page.wait_for_function("window.stopped")
    page.close()


def test_phone(visit, photo, tmp_path):
    page = visit(viewport={"width": 390, "height": 844}, color_scheme="dark", device_scale_factor=2)
    attach(page, photo)
    expect(page.get_by_label("File thumbnail")).to_have_count(1)
    page.screenshot(path=tmp_path / "phone-empty.png")
    say(page, "Describe this image in detail.")
    expect(answers(page).first).to_contain_text(re.compile(r"\w"))
    expect(page.get_by_label("Submit")).to_be_visible()
    page.screenshot(path=tmp_path / "phone.png")
    page.get_by_text("Settings").click()
    expect(page.get_by_label("Seed")).to_have_value("")  # by default a new one each time
    page.get_by_label("Seed").fill("7")
    page.screenshot(path=tmp_path / "phone-settings.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def ask(engine, session: Session, text: str):
    return respond(engine, ["max_new_tokens"], {"text": text, "files": []}, session, 20)


def test_an_error_while_answering_is_one_sentence(engine, monkeypatch, caplog):
    def fail(*_):
        raise RuntimeError("CUDA out of cheese")

    session = Session()
    list(ask(engine, session, "Hello?"))
    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "forward", fail)
        list(ask(engine, session, "Still there?"))
    assert SORRY in session.shown[-1]["content"]
    assert "cheese" not in str(session.shown) and "cheese" in caplog.text
    list(ask(engine, session, "Now?"))
    roles = [m.role for m in session.conversation.messages]
    assert roles == ["user", "assistant"] * 3
    assert SORRY not in str(session.conversation.messages)


def test_a_closed_answer_keeps_what_was_said(engine):
    session = Session()
    stream = ask(engine, session, "Hello?")
    for _ in range(4):
        next(stream)
    stream.close()
    steps = engine.model.steps
    (said,) = session.conversation.messages[-1].parts
    assert said and literal(said).startswith(session.shown[-1]["content"])
    assert engine.model.steps == steps


def test_a_question_that_cannot_be_asked_changes_nothing(engine, monkeypatch):
    warnings = []
    monkeypatch.setattr(gr, "Warning", lambda text, **_: warnings.append(text))
    session = Session()
    list(ask(engine, session, "word " * 5000))
    assert session == Session() and "too long" in warnings[0]


def test_a_notice_is_shown_but_not_sent(engine, monkeypatch):
    answer = SimpleNamespace(notice="The oldest turn was left out.")
    monkeypatch.setattr("minigpt4.web.session.ask", lambda *_: answer)
    session = Session()
    assert session.ask(engine, "Hello?", [], Sampling()) is answer
    assert "left out" in session.shown[-1]["content"]
    assert "left out" not in str(session.conversation)


def test_text_is_shown_as_it_was_written():
    assert literal("a <b> ![x](http://y)") == "a &lt;b> !&#91;x](http://y)"
    assert literal("`<b>` <b>\n```html\n<b>") == "`<b>` &lt;b>\n```html\n<b>"


def test_a_seed_that_is_no_number(engine, monkeypatch):
    warnings = []
    monkeypatch.setattr(gr, "Warning", lambda text, **_: warnings.append(text))
    list(respond(engine, ["seed"], {"text": "Hello?", "files": []}, Session(), "lucky"))
    assert "whole number" in warnings[0]


def test_a_port_in_use(engine, monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("MINIGPT4_PORT", str(taken.getsockname()[1]))
        monkeypatch.setattr("minigpt4.start.open_model", lambda _: engine.model)
        assert app.main([]) == 2
    error = capsys.readouterr().err
    assert "is used already" in error and error.count("\n") == 1


def test_options_from_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("MINIGPT4_HOST", "0.0.0.0")
    monkeypatch.setenv("MINIGPT4_SHARE", "no")
    monkeypatch.setenv("MINIGPT4_MAX_QUEUE", "8")
    chosen = app.options(["--max-queue", "4"])
    assert (chosen.host, chosen.share, chosen.max_queue) == ("0.0.0.0", False, 4)
    monkeypatch.setenv("MINIGPT4_QUANTIZE", "int3")
    with pytest.raises(SystemExit):
        app.options([])
    assert "int3" in capsys.readouterr().err
