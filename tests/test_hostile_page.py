"""What a browser might execute or fetch: in the model's text, in error messages, in downloads."""

import html
import json
import re
from pathlib import Path

from playwright.sync_api import Page, expect

from minigpt4.web.preview import frame
from minigpt4.web.transcript import FORMAT, VERSION
from tests.fake_engine import ATTACKS
from tests.page_case import WIDE, answers, ask, box, done, questions, say

NAME = "<img src=x onerror=window.stolen=1>"
# What was written must never become one of these.
MADE = "script, iframe, object, embed, form, style, svg, video, audio, base, meta, link"


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


def test_what_the_model_writes_is_text(visit, tmp_path):
    page = visit(**WIDE)
    ask(page, "hostile 3")
    harmless(page, "#chat .message .prose, #chat .message .md")
    said = [("user", "Attack!"), ("assistant", "")] * len(ATTACKS)
    said = [(role, text or ATTACKS[place // 2]) for place, (role, text) in enumerate(said)]
    messages = [{"role": r, "parts": [{"type": "text", "text": t}]} for r, t in said]
    kept = {"format": FORMAT, "version": VERSION, "messages": messages, "pictures": {}}
    (tmp_path / "kept.json").write_text(json.dumps(kept))
    page.get_by_role("tab", name="Conversations", exact=True).click()
    page.locator("#panel input[type=file]").set_input_files(tmp_path / "kept.json")
    expect(answers(page)).to_have_count(len(ATTACKS))
    harmless(page, "#chat .message .prose, #chat .message .md")
    assert len(page.locator("#chat .message .prose").all()) >= len(ATTACKS)
    visit.expected("192.0.2.1/spy.* violates the following Content Security Policy")


def test_downloads_and_kept_conversations_are_text(visit, tmp_path):
    """A download is a file with a name of ours, never opened in the page; it comes back whole."""
    page = visit(**WIDE)
    title = f"{NAME} ![x](http://192.0.2.1/title.png) hostile 0"
    ask(page, title)
    page.get_by_role("tab", name="Conversations", exact=True).click()
    expect(page.locator("#recent li")).to_contain_text(NAME)
    harmless(page, "#recent")
    kept = tmp_path / f"{NAME}.json"
    for button, suffix in (("Download as Markdown", "md"), ("Download as JSON", "json")):
        before = page.url
        with page.expect_download() as download:
            page.get_by_role("button", name=button).click()
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
    page.locator("#panel input[type=file]").set_input_files(kept)
    expect(answers(page)).to_have_count(1)
    expect(questions(page)).to_contain_text(NAME)
    harmless(page, "#chat .message .prose, #chat .message .md, #recent")
    assert len(page.context.pages) == 1


def test_error_messages_are_text(visit, engine, tmp_path):
    """Gradio shows them as HTML: names of files, and what an engine says."""
    page = visit(**WIDE)
    wrong = tmp_path / f"{NAME}.png"
    wrong.write_text("This is no picture.")
    page.locator("#box input[type=file]").set_input_files(wrong)
    toast = page.get_by_test_id("toast-body")
    expect(toast.first).to_contain_text("not a picture")
    assert page.evaluate("window.stolen") is None and not toast.locator("img").count()
    page.get_by_role("tab", name="Conversations", exact=True).click()
    wrong = tmp_path / f"{NAME}.json"
    wrong.write_text(json.dumps({"format": NAME}))
    page.locator("#panel input[type=file]").set_input_files(wrong)
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


INNER = "<script>new RTCPeerConnection(); parent.postMessage('made', '*')</script>"
WAYS = {  # to a frame within the frame: scripts that have `inner`, `quoted`, `div` and `frame`
    "property": "frame['src' + 'doc'] = inner",
    "attribute": "frame.setAttribute('src' + 'doc', inner)",
    "attribute's node": "const a = document.createAttribute('src' + 'doc'); a.value = inner;"
    "frame.setAttributeNode(a)",
    "HTML": "div.innerHTML = '<iframe src' + 'doc=\"' + quoted + '\"></iframe>'",
    "pieces": "document.write('<iframe src'); document.write('doc=\"' + quoted + '\"></iframe>')",
    "parser": "div.append(new DOMParser().parseFromString('<iframe src' + 'doc=\"' + quoted + "
    "'\"></iframe>', 'text/html').body.firstChild)",
    "a file": "frame.src = URL.createObjectURL(new Blob([inner], {type: 'text/html'}))",
}


def test_a_previewed_website_has_no_frames_with_webrtc(browser):
    """No policy closes WebRTC, so neither the frame nor what it holds may have it."""

    inner = json.dumps(INNER).replace("</", r"<\/")

    def attempt(way: str) -> str:
        return f"""<!doctype html><body><div></div><p></p><script>
            addEventListener("message", (event) => window.said = event.data);
            const inner = {inner};
            const quoted = inner.replaceAll('"', "&quot;"), div = document.querySelector("div");
            const frame = document.createElement("iframe"); div.append(frame);
            try {{ {way} }} catch (error) {{ window.error = String(error) }}
            </script><script>document.querySelector("p").innerHTML = "<b>an ordinary page</b>"
            </script>"""

    def said(frame: str) -> str | None:
        page.set_content(frame)
        page.wait_for_timeout(300)
        return page.frames[1].evaluate("window.said")

    listens = "<script>addEventListener('message', (event) => window.said = event.data)</script>"
    static = f'<!doctype html><body>{listens}<iframe SrcDoc="{html.escape(INNER)}"></iframe>'
    page = browser.new_page()
    for name, way in {"static": static, **{n: attempt(w) for n, w in WAYS.items()}}.items():
        assert said(f'<iframe sandbox="allow-scripts" srcdoc="{html.escape(way)}"></iframe>'), name
        assert said(frame(way, "Website")) is None, name
        if name not in ("static", "pieces"):
            expect(page.frame_locator("iframe").get_by_text("ordinary")).to_be_visible()
    page.close()
