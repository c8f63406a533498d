"""docs/trust.md is up to date; and what is quick to prove."""

import json
import re
import time
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt4.errors import UserError
from minigpt4.web.api.body import parse_body, read_chat
from minigpt4.web.api.schemas import ChatRequest
from minigpt4.web.page import render, transcript
from tools import trust_table

ROOT = Path(__file__).parent.parent
# package -> the least version that may be used, and why: raised by hand, after reading what was
# found in it. pip-audit asks a service on the network, which no test here does.
FLOORS = {
    "pillow": ("12.3.0", "writes outside the heap and bombs in what is older"),
    "starlette": ("1.3.1", "CVE-2025-62727 (Range), CVE-2026-48710 (Host), -54282, -54283 (forms)"),
    "python-multipart": ("0.0.27", "CVE-2026-24486 (paths), CVE-2026-42561 (headers of parts)"),
    "gradio": ("6.0", "current when it was chosen; no list was read"),
    "httpx": ("0.28", "current when it was chosen; no list was read"),
    "torch": ("2.8", "current when it was chosen; no list was read"),
}


def test_the_table_is_that_of_the_tests():
    """Otherwise: python -m tools.trust_table"""
    page = trust_table.PAGE.read_text(encoding="utf-8")
    assert trust_table.updated(page) == page
    marks = [*trust_table.marks()]
    assert len({test for _, _, test in marks}) > 100
    assert {section for section, _, _ in marks} == {*trust_table.SECTIONS}


def test_a_conversation_file_is_checked_without_asserts():
    """As under `python -O`, which removes them; ruff's S101 keeps them out of the package."""
    source = Path(transcript.__file__)
    optimised = ModuleType(transcript.__name__)
    exec(compile(source.read_text(encoding="utf-8"), source, "exec", optimize=1), vars(optimised))
    sound = {"format": transcript.FORMAT, "version": transcript.VERSION}
    asked = [{"role": "user", "parts": [{"type": "text", "text": "x"}]}]
    sound |= {"pictures": {}, "messages": asked}
    optimised.from_data(sound)
    said = [{"role": "assistant", "parts": [{"type": "text", "text": "x"}]}]
    for wrong in (
        {"system": 3},
        {"messages": said},
        {"messages": [{"role": "user"}]},
        {"version": 0},
    ):
        with pytest.raises(UserError):
            optimised.from_data(sound | wrong)


@pytest.mark.parametrize("name", FLOORS)
@pytest.mark.trust("Dependencies", "versions with known holes")
def test_dependencies_do_not_go_below_their_floors(name):
    """By what is installed, and by the pins, from which it is installed elsewhere."""
    least, why = FLOORS[name]
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    for found in (version(name), pins[name]):
        assert numbers(found) >= numbers(least), f"{name} {found} is below {least}: {why}"


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.match(r"\d+(\.\d+)*", text)[0].split(".")))


@pytest.mark.parametrize(
    "answer",
    ["```" + "a" * 50_000, "```\n" + "<!---->" * 5000 + "x", "```" * 20_000, "<html" * 20_000]
    + ["<!doctype " + " " * 50_000, "<body></body" + " " * 50_000],
    ids=lambda answer: answer[:12].strip(),
)
@pytest.mark.trust("What the model writes", "HTML and scripts, in the chat and in the preview")
def test_no_answer_keeps_the_preview_busy(answer):
    """Looking for a website takes linear time, whatever a model or a file holds."""
    start = time.process_time()
    render.website(answer)
    render.fenced(answer)
    assert time.process_time() - start < 5


CORPUS = [p.read_text() for p in sorted((Path(__file__).parent / "corpus/requests").iterdir())]
FIELDS = sorted({name for text in CORPUS for name in json.loads(text)})
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*FIELDS, "role", "content", "type", "text"]), inner)
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(CORPUS), st.dictionaries(st.sampled_from(FIELDS), anything, max_size=4))
@pytest.mark.trust("Protocol", "unknown fields, wrong types, numbers beyond any float")
def test_any_request_is_understood_or_refused_in_a_sentence(sound, changes):
    try:
        asked, _ = read_chat(json.loads(sound) | changes)
    except UserError as error:
        assert "\n" not in str(error) and "Traceback" not in str(error)
    else:
        assert isinstance(asked, ChatRequest) and asked.messages[-1].role == "user"


@given(st.binary(max_size=60) | st.sampled_from([text.encode() for text in CORPUS]))
def test_any_bytes_are_an_object_or_refused(body):
    try:
        assert isinstance(parse_body(body), dict)
    except UserError as error:
        assert "JSON" in str(error)
