"""What the page says about an answer: while it is awaited, when it ends, and behind its ⓘ."""

import secrets
from typing import TYPE_CHECKING

import gradio as gr

from minigpt4.web.page import render
from minigpt4.web.page.session import Session
from minigpt4.web.page.texts import translate

if TYPE_CHECKING:
    from minigpt4.engine import Stats


def waiting(session: Session, beams: int, request: gr.Request | None) -> str:
    """What the visitor waits for: the queue, or the answer."""
    if session.answer and (place := session.answer.position):
        if place == 1:
            return translate("next", request)
        return translate("queued", request, place=place)
    return translate("weighing" if beams > 1 else "answering", request)


def ending(session: Session, request: gr.Request | None) -> str:
    """Why the last answer ended before its own end; "" where it did not."""
    if session.answer is None or not session.answer.stats.tokens:
        return ""
    if session.stop_reason == "length":
        return translate("cut_length", request)
    return translate("cut_closed", request) if session.can_continue else ""


def facts(session: Session, request: gr.Request | None) -> dict:
    """Place among the shown messages -> what is known of that answer; and where the objects of each
    picture are. For assets/facts.js.

    The mark is new each time: the script is to be called whenever a turn has ended.
    """
    _, places = render.show(session)
    known = {
        str(index): _facts(session.statistics[place], request)
        for index, place in enumerate(places)
        if place in session.statistics and session.statistics[place].tokens
    }
    objects = [[spot._asdict() for spot in spots] for spots in render.objects(session)]
    return {"mark": secrets.token_hex(4), "answers": known, "objects": objects}


def _facts(stats: "Stats", request: gr.Request | None) -> dict:
    """A sentence, and pairs of a name and a figure."""
    figures = [
        ("tokens", f"{stats.tokens}"),
        ("speed", f"{stats.tokens_per_s:.3g}"),
        ("first", f"{stats.seconds_to_first:.2f} s"),
        ("prompt", f"{stats.prompt_tokens}"),
        ("reused", f"{stats.reused_tokens}"),
    ]
    return {
        "line": translate("took", request, seconds=f"{stats.seconds:.1f}"),
        "figures": [(translate(f"figure_{name}", request), value) for name, value in figures],
    }
