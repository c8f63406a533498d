"""Streaming shows whole characters and nothing of a stop string, however tokens fall."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt4.model.text import TextStream


def by_bytes(ids: list[int]) -> str:
    """The hardest tokenizer there is: a token a byte."""
    return bytes(ids).decode("utf-8", "replace")


def stream(text: str, stop: tuple[str, ...]) -> tuple[list[str], str]:
    """(pieces pushed out, what finish gave) for a text that comes a byte at a time."""
    reader = TextStream(by_bytes, stop)
    pieces = []
    for byte in text.encode():
        pieces.append(reader.push(byte))
        if reader.ended:
            return pieces, ""
    return pieces, reader.finish()


def until_stop(text: str, stop: tuple[str, ...]) -> str:
    """What must be shown: the text before the stop string whose end comes first."""
    ends = [(text.index(s) + len(s), text.index(s)) for s in stop if s in text]
    return text[: min(ends)[1]] if ends else text


@given(st.text().filter(lambda t: "\ufffd" not in t))
def test_everything_is_shown_once(text):
    pieces, rest = stream(text, ())
    assert "".join(pieces) + rest == text


@given(st.text(alphabet="#aé猫😀 \n", max_size=40))
@pytest.mark.trust("Isolation", "stop strings and UTF-8 at the borders of tokens")
def test_nothing_of_a_stop_string(text):
    pieces, rest = stream(text, ("###",))
    assert "".join(pieces) + rest == until_stop(text, ("###",))


@given(st.text(alphabet="#</s>猫", max_size=40))
def test_several_stop_strings(text):
    stop = ("###", "</s>")
    pieces, rest = stream(text, stop)
    assert "".join(pieces) + rest == until_stop(text, stop)


@given(st.text(alphabet="né猫😀", min_size=1, max_size=12))
@pytest.mark.trust("Isolation", "stop strings and UTF-8 at the borders of tokens")
def test_never_half_a_character(text):
    pieces, _ = stream(text, ())
    assert not any("\ufffd" in piece for piece in pieces)


def test_half_a_character_at_the_end_is_dropped():
    reader = TextStream(by_bytes)
    pieces = [reader.push(byte) for byte in "ok 猫".encode()[:-1]]
    assert "".join(pieces) + reader.finish() == "ok "
