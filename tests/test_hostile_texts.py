"""Texts that break programs: asked over the real API, whole and streamed; the next one works."""

import json
import re

import httpx
import pytest

from minigpt4.web.page.render import verbatim
from minigpt4.web.page.transcript import FORMAT, VERSION
from tests.api_case import (
    SETTINGS,
    address_fixture,
    at_rest,
    box,
    engine_fixture,
    join,
    page_events,
    page_messages,
    web,
)

ODD = {
    "emoji": "👩‍👩‍👧‍👦" * 40,
    "right to left": "שלום עולם، مرحبا بالعالم \u202e\u2067abc\u2069 ?",
    "marks": "Z" + "\u0341\u0353\u0489" * 60,
    "lone surrogates": "\ud800 half \udfff",
    "NUL": "a\0b\0",
    "controls": "".join(map(chr, range(1, 32))) + "x\x7f\x85\u2028\u2029\ufeff\uffff",
    "private use": "\ue000\U000f0000\U0010ffff",
    "one long word": "a" * 500,
}


engine, address = engine_fixture(), address_fixture()


@pytest.fixture(autouse=True)
def works_afterwards(address, engine):
    yield
    assert at_rest(engine, 20)
    assert post(address, "Hello?", max_tokens=2).status_code == 200


def post(address: str, text: str, **settings) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, **settings}
    content = json.dumps(body).encode()  # ASCII: halves of characters stay what they are
    return web.post(address + "/v1/chat/completions", content=content)


def said(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.trust("Text", "emoji, right-to-left text, lone surrogates, NUL, control characters")
def test_odd_texts(address, name):
    """Answered, and in a stream the same."""
    whole = said(post(address, ODD[name], max_tokens=6))
    stream = post(address, ODD[name], max_tokens=6, stream=True)
    chunks = [json.loads(found) for found in re.findall(r"(?m)^data: (\{.*\})$", stream.text)]
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == whole and stream.text.endswith("data: [DONE]\n\n")


AS_JSON = {"index": 0, "value": "json"}


@pytest.fixture(scope="module")
def on_page(address):
    """Has the page do something in a session; all that is said of it."""
    events = page_events(address)

    def do(session: str, name: str, *data, event_data=None) -> str:
        assert join(address, events[name], [*data], session, event_data).status_code == 200
        messages = [*page_messages(address, session, 20)]
        assert [m["success"] for m in messages if m["msg"] == "process_completed"] == [True]
        return json.dumps(messages, ensure_ascii=False)

    return do


@pytest.mark.parametrize("name", ODD)
@pytest.mark.trust("Text", "emoji, right-to-left text, lone surrogates, NUL, control characters")
def test_odd_texts_on_the_page(on_page, name):
    """Asked, as system prompt, edited; what was said can be kept and gone on with."""
    text = ODD[name]
    settings = [*SETTINGS[:6], text, None]
    on_page(name, "ask", box(text), None, *settings)
    edited = {"index": 0, "value": text + "!", "previous_value": text}
    on_page(name, "edit", None, *settings, event_data=edited)
    on_page(name, "ask", box("And?"), None, *settings)
    assert "And?" in on_page(name, "save", None, event_data=AS_JSON)


@pytest.mark.trust("Text", "emoji, right-to-left text, lone surrogates, NUL, control characters")
def test_a_conversation_with_halves_of_characters_is_opened(address, on_page):
    said = {"role": "user", "parts": [{"type": "text", "text": "half \ud800"}]}
    kept = {"format": FORMAT, "version": VERSION, "system": "\udfff", "pictures": {}}
    file = {"files": ("kept.json", json.dumps(kept | {"messages": [said]}).encode())}
    [path] = web.post(address + "/gradio_api/upload", files=file).json()
    on_page("opened", "open", {"path": path, "meta": {"_type": "gradio.FileData"}}, None)
    assert "half ?" in on_page("opened", "save", None, event_data=AS_JSON)
    again = {"value": {"name": "\ud800", "data": kept | {"messages": [said]}}, "index": 0}
    on_page("again", "reopen", None, event_data=again)
    assert verbatim("half ?") in on_page("again", "retry", None, *SETTINGS)


@pytest.mark.parametrize("text", ["😀" * 10_000, "ש" * 20_000, "a\0" * 20_000, "\ud83d" * 20_000])
@pytest.mark.trust("Text", "emoji, right-to-left text, lone surrogates, NUL, control characters")
def test_more_than_the_context_holds(address, text):
    """Counted and refused in a sentence, which does not repeat the text."""
    error = post(address, text).json()["error"]
    assert error["code"] == "context_length_exceeded" and len(error["message"]) < 300


@pytest.mark.parametrize(
    "text", ["ha " * 100, "Repeat the word yes for ever.", "1, 2, 1, 2, 1, 2,"]
)
@pytest.mark.trust("Text", "prompts that make the model loop")
def test_no_answer_is_longer_than_it_may_be(address, text):
    """A real model that repeats itself: test_hostile_life."""
    reasons = []
    for length, asked in ((5, {"max_tokens": 5}), (300, {"max_tokens": 300})):
        response = post(address, text, repetition_penalty=1.0, **asked)
        assert said(response)
        reasons.append(response.json()["choices"][0]["finish_reason"])
        count = response.json()["usage"]["completion_tokens"]
        assert count == length if reasons[-1] == "length" else count <= length
    assert reasons[0] == "length"
