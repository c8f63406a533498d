"""Likes and dislikes, as JSON lines in a folder that the operator names."""

import hashlib
import json
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import gradio as gr

from minigpt4.errors import UserError
from minigpt4.model.prompt import ImageRef
from minigpt4.web.page import render
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.session import Session
from minigpt4.web.page.texts import label, translate

HIDE_JS = "() => [{ __type__: 'update', visible: false }, '']"


@dataclass
class Rating:
    """A visitor's rating of an answer. A reason given later, or a changed rating, is written as
    another line with the same id, which replaces the first. liked: None withdraws the rating."""

    liked: bool | None
    model: str
    messages: list[dict]  # up to the answer; pictures only by the hash of their content
    id: str
    reason: str = ""
    time: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


def rate(session: Session, place: int, liked: bool | None, model: str) -> Rating:
    """The rating of the answer at `place` of the conversation."""
    messages = [
        {
            "role": m.role,
            "text": "\n".join(p for p in m.parts if isinstance(p, str)),
            "pictures": [p.key for p in m.parts if isinstance(p, ImageRef)],
        }
        for m in session.conversation.messages[: place + 1]
    ]
    said = json.dumps([session.name, messages])  # the name is random: no two visitors share an id
    return Rating(liked, model, messages, hashlib.sha256(said.encode()).hexdigest()[:16])


class Feedback:
    """Appends ratings to `feedback.jsonl` in a folder."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder, "feedback.jsonl")
        self._lock = threading.Lock()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.open("a").close()
        except OSError:
            raise UserError(
                f"Cannot write feedback to {folder}: choose a folder that is writable."
            ) from None

    def store(self, rating: Rating) -> None:
        """Append one line."""
        line = json.dumps(asdict(rating), ensure_ascii=False)
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


class Ratings:
    """The row that asks for a reason, created in the current gr.Blocks, and its handlers."""

    def __init__(self, loading: Loading, feedback: Feedback) -> None:
        self._loading = loading
        self._feedback = feedback
        self._rating = gr.State(None)
        with gr.Row(visible=False, elem_id="why") as self._row:
            self._reason = gr.Textbox(
                label=label("reason"),
                info=label("feedback_info"),
                placeholder=label("reason_placeholder"),
                max_length=2000,
                submit_btn=True,
                elem_id="reason",
            )
            self._close = gr.Button(label("close"), elem_id="no-reason")

    def wire(self, chatbot: gr.Chatbot, session: gr.State, left: list, event: dict) -> None:
        """Connect the parts to their handlers. left: the events that hide the row."""
        outputs = [self._rating, self._row, self._reason]
        chatbot.like(self.like, session, outputs, trigger_mode="multiple", **event)
        self._reason.submit(self.explain, [self._rating, self._reason], outputs, **event)
        gr.on([self._close.click, *left], None, None, [self._row, self._reason], js=HIDE_JS)

    def like(self, session: Session, liked: gr.LikeData) -> tuple:
        """Store a like or a dislike and ask for a reason, or store that it was withdrawn."""
        _, places = render.show(session)
        index = liked.index
        place = places[index] if isinstance(index, int) and 0 <= index < len(places) else -1
        model = self._loading.name(session.model)
        if not session.answer_at(place) or not model:
            return None, gr.update(visible=False), ""
        opinion = liked.liked if isinstance(liked.liked, bool) else None
        rating = rate(session, place, opinion, model)
        self._feedback.store(rating)
        return rating, gr.update(visible=opinion is not None), ""

    def explain(self, rating: Rating | None, reason: str, request: gr.Request) -> tuple:
        """Store the reason."""
        if rating is not None and reason.strip():
            self._feedback.store(replace(rating, reason=reason.strip()))
            gr.Info(translate("thanks", request), title="", duration=4)
        return None, gr.update(visible=False), ""
