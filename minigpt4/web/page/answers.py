"""An answer's status lines, while it is awaited and at its end, and its statistics (button ⓘ)."""

import secrets
from typing import TYPE_CHECKING

import gradio as gr

from minigpt4.web.page import render
from minigpt4.web.page.session import Session
from minigpt4.web.page.texts import translate

if TYPE_CHECKING:
    from minigpt4.engine import Stats


def waiting(session: Session, beams: int, request: gr.Request | None) -> str:
    """The status line of a running answer: its place in the queue, or that it is being written."""
    if session.answer and (place := session.answer.position):
        if place == 1:
            return translate("next", request)
        return translate("queued", request, place=place)
    return translate("weighing" if beams > 1 else "answering", request)


ENDINGS = {
    "length": "cut_length",
    "time": "cut_closed",
    "closed": "cut_closed",
    "interrupted": "interrupted",
}


def ending(session: Session, request: gr.Request | None) -> str:
    """Why the last answer was cut off; "" if it was not. After a first question without a picture,
    a hint to add one: models answer as if they saw one."""
    messages = session.conversation.messages
    if not session.last_answer:
        return ""
    if session.stop_reason in ENDINGS:
        return translate(ENDINGS[session.stop_reason], request)
    if len(messages) == 2 and not messages[0].images:
        return translate("no_picture", request)
    return ""


def facts(session: Session, request: gr.Request | None, detects: bool) -> dict:
    """For the page's scripts: place among the shown messages -> the answer's statistics
    (assets/facts.js) and its versions (versions.js); the objects in each picture (where.js).

    detects: whether the model has a detector; if not, no objects: another model's may have found
    some.

    The mark is new each time, so that the scripts are called after every turn.
    """
    _, places = render.show(session)
    known = {
        str(index): _facts(session.statistics[place], request)
        for index, place in enumerate(places)
        if place in session.statistics and session.statistics[place].tokens
    }
    versions = {}
    for place, fork in session.forks.items():
        if len(fork.tails) > 1 and fork.shown >= 0:
            rows = [i for i, p in enumerate(places) if p == place]
            # A failed answer is not shown: its versions go to the page's remark at the end.
            row = rows[-1] if rows else len(render.messages(session, request)) - 1
            versions[str(row)] = {"place": place, "number": fork.shown, "count": len(fork.tails)}
    seen = render.objects(session) if detects else []
    objects = [[one._asdict() for one in found] for found in seen]
    mark = secrets.token_hex(4)
    return {"mark": mark, "answers": known, "versions": versions, "objects": objects}


def _facts(stats: "Stats", request: gr.Request | None) -> dict:
    """A sentence, and pairs of a name and a figure."""

    def number(value: float, digits: int) -> str:
        return f"{value:.{digits}f}".replace(".", translate("decimal_sign", request))

    speed = stats.tokens_per_s
    figures = [
        ("tokens", f"{stats.tokens}"),
        ("speed", number(speed, 1 if speed >= 10 else 2)),
        ("first", f"{number(stats.seconds_to_first, 2)} s"),
        ("prompt", f"{stats.prompt_tokens}"),
        ("reused", f"{stats.reused_tokens}"),
    ]
    return {
        "line": translate("took", request, seconds=number(stats.seconds, 1)),
        "figures": [(translate(f"figure_{name}", request), value) for name, value in figures],
    }
