"""Code and addresses in the model's text, errors and downloads: no browser runs or fetches them."""

import html
import json
import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from minigpt4.web.page import render
from minigpt4.web.page.transcript import FORMAT, VERSION
from tests.fake_engine import ATTACKS
from tests.page_case import WIDE, answers, ask, box, done, download_as, questions, say
from tests.running import wait_for

NAME = "<img src=x onerror=window.stolen=1>"
# What was written must never become one of these.
MADE = "script, iframe, object, embed, form, style, svg, video, audio, base, meta, link"
TELL = "top.postMessage(typeof RTCPeerConnection, '*')"
INNER = html.escape(f"<script>{TELL}</script>")
FRAME = f'<iframe srcdoc="{INNER}"></iframe>'
HIDDEN = f'<div><template shadowrootmode="closed">{FRAME}</template></div>'
SPLIT = json.dumps(HIDDEN).replace("rootmode", 'root" + "mode')  # put together by a script
# Websites with a frame inside, which would have whatever was taken from the website.
NESTING = [
    FRAME,
    f'<iframe src="javascript:{TELL}"></iframe>',
    HIDDEN.replace("shadowroot", "ShadowRoot"),
    "<script>document.write('<div><template shadowroot')</script>mode=closed>" + HIDDEN,
    f"<script>document.write({SPLIT})</script>",
    f"<body><script>document.body.setHTMLUnsafe({SPLIT})</script>",
    f"<body><script>document.body.append(Document.parseHTMLUnsafe({SPLIT}).body)</script>",
    "<body><script>document.body.attachShadow({mode: 'closed'})"
    f".innerHTML = {json.dumps(FRAME)}</script>",
    f"""<body><script>document.body.innerHTML = {json.dumps(FRAME)};
    for (const start = Date.now(); Date.now() - start < 500; );</script>""",
    f"""<body><script>document.body.append(new DOMParser().parseFromString(
    '<x:iframe xmlns:x="http://www.w3.org/1999/xhtml" srcdoc="{INNER}"/>',
    'text/xml').documentElement)</script>""",
    f"""<body><script>document.querySelector = Document.prototype.querySelector = () => null;
    Element.prototype.remove = Function.prototype.call = Function.prototype.bind = () => {{}};
    document.body.innerHTML = {json.dumps(FRAME)}</script>""",
]


def harmless(page: Page, place: str) -> None:
    """Nothing ran, nothing that runs or fetches was made of text, no link leads into a script."""
    assert page.evaluate("window.stolen") is None
    shown = page.locator(place)
    # Backticks that are none for Markdown let a picture through, empty: it may not be asked for.
    assert not shown.locator("img").evaluate_all("all => all.some(image => image.naturalWidth)")
    for written in shown.all():
        made = written.evaluate(
            f"""shown => [...shown.querySelectorAll("*")].filter(e => e.matches({json.dumps(MADE)})
                || [...e.attributes].some(a => a.name.startsWith("on")
                    || /^\\s*(javascript|data|vbscript):/i.test(a.value))
            ).filter(e => !e.closest("button")).map(e => e.outerHTML.slice(0, 200))"""
        )
        assert not made, made
        for link in written.locator("a").all():
            assert re.match("https?://|#", link.get_attribute("href") or "#")


@pytest.mark.trust(
    "What the model writes", "scripts, links and remote pictures in errors and downloads"
)
def test_what_the_model_writes_is_text(visit, tmp_path):
    page = visit(**WIDE)
    ask(page, "hostile 3")
    harmless(page, "#chat .message .prose, #chat .message .md")
    said = [("user", "Attack!"), ("assistant", "")] * len(ATTACKS)
    said = [(role, text or ATTACKS[place // 2]) for place, (role, text) in enumerate(said)]
    messages = [{"role": r, "parts": [{"type": "text", "text": t}]} for r, t in said]
    kept = {"format": FORMAT, "version": VERSION, "messages": messages, "pictures": {}}
    (tmp_path / "kept.json").write_text(json.dumps(kept))
    page.locator("#rail input[type=file]").set_input_files(tmp_path / "kept.json")
    expect(answers(page)).to_have_count(len(ATTACKS))
    harmless(page, "#chat .message .prose, #chat .message .md")
    assert len(page.locator("#chat .message .prose").all()) >= len(ATTACKS)
    visit.expected("192.0.2.1/spy.* violates the following Content Security Policy")


@pytest.mark.trust(
    "What the model writes", "scripts, links and remote pictures in errors and downloads"
)
def test_downloads_and_kept_conversations_are_text(visit, tmp_path):
    """A download is a file with a name of ours, never opened in the page; it comes back whole."""
    page = visit(**WIDE)
    title = f"{NAME} ![x](http://192.0.2.1/title.png) hostile 0"
    ask(page, title)
    expect(page.locator("#conversations li")).to_contain_text(NAME)
    harmless(page, "#conversations")
    kept = tmp_path / f"{NAME}.json"
    for kind, suffix in (("Markdown", "md"), ("JSON", "json")):
        before = page.url
        with page.expect_download() as download:
            download_as(page, kind)
        assert re.fullmatch(rf"minigpt4-[\d-]+\.{suffix}", download.value.suggested_filename)
        assert page.url == before
        text = Path(download.value.path()).read_text()
        download.value.save_as(kept)
    data = json.loads(text)
    assert data["messages"][1]["parts"][0]["text"] == ATTACKS[0].strip()
    data["system"] = data["model"] = NAME
    kept.write_text(json.dumps(data))
    page.get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)
    page.locator("#rail input[type=file]").set_input_files(kept)
    expect(answers(page)).to_have_count(1)
    expect(questions(page)).to_contain_text(NAME)
    harmless(page, "#chat .message .prose, #chat .message .md, #conversations")
    assert len(page.context.pages) == 1


@pytest.mark.trust("What the model writes", "WebRTC in the preview")
def test_no_frame_in_a_previewed_website_has_webrtc(visit):
    page = visit()
    page.evaluate("() => { window.told = []; onmessage = ({ data }) => told.push(data); }")
    end = f"<script>setTimeout(() => {{ {TELL}; top.postMessage('end', '*') }}, 1500)</script>"
    year = "<p>&copy; <script>document.write(2026, ' <b>me</b>')</script></p>"  # still works
    page.evaluate(
        "(frames) => document.body.insertAdjacentHTML('beforeend', frames)",
        "".join(render.frame(end + site, "A website") for site in [*NESTING, year]),
    )
    count = len(NESTING) + 1
    wait_for(lambda: page.evaluate("told.filter((word) => word === 'end').length") == count)
    assert sorted(page.evaluate("told")) == ["end"] * count + ["undefined"] * count
    expect(page.frame_locator("iframe.website").last.locator("b")).to_have_text("me")
    visit.expected("is not a function")  # what the frame has no more


@pytest.mark.trust(
    "What the model writes", "scripts, links and remote pictures in errors and downloads"
)
def test_error_messages_are_text(visit, engine, tmp_path):
    """Gradio shows them as HTML: names of files, and what an engine says."""
    page = visit(**WIDE)
    wrong = tmp_path / f"{NAME}.png"
    wrong.write_text("This is no picture.")
    page.locator("#box input[type=file]").set_input_files(wrong)
    toast = page.get_by_test_id("toast-body")
    expect(toast.first).to_contain_text("not a picture")
    assert page.evaluate("window.stolen") is None and not toast.locator("img").count()
    wrong = tmp_path / f"{NAME}.json"
    wrong.write_text(json.dumps({"format": NAME}))
    page.locator("#rail input[type=file]").set_input_files(wrong)
    expect(page.get_by_text("This file holds no conversation")).to_be_visible()
    assert not toast.locator("img").count()
    engine.failure = (
        f"It failed at {NAME} ![x](http://192.0.2.1/error.png) [x](javascript:stolen=1)"
    )
    say(page, "Please fail.")
    expect(answers(page)).to_contain_text("It failed at <img")
    harmless(page, "#chat .message .prose, #chat .message .md")
    engine.failure = ""
    say(page, "Hello?")
    done(page)
    expect(box(page)).to_have_value("")
