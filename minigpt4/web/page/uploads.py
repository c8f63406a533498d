"""Handlers of uploads: pictures, examples, saved conversations.

All handlers here are plain functions, since opening pictures is slow: Gradio runs them in threads.
"""

import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress

import gradio as gr

from minigpt4.conversation import read_ahead
from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.web.guard.limits import FILES_AT_ONCE
from minigpt4.web.guard.uploads import uploaded
from minigpt4.web.page import answers, looks, render, transcript
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.session import KEPT_SIDE, Session, too_many_pictures
from minigpt4.web.page.texts import explain, translate
from minigpt4.web.page.turns import box
from minigpt4.web.server import warn

log = logging.getLogger(__name__)


class Uploads:
    """The page's handlers that read pictures and conversations."""

    def __init__(self, loading: Loading) -> None:
        self._loading = loading

    def attach(self, value: dict, session: Session, request: gr.Request) -> Iterator[tuple]:
        """Look at pictures as soon as they are in the box.

        Yields (paths to remove from the box, status, small copies of the others, for browsers that
        cannot show the files). The box itself is no output: the visitor may be typing in it.
        """
        yield gr.skip(), translate("looking", request), gr.skip()
        good, status = self._look_at(value["files"], session, request)
        seen = {path: picture for path in good if (picture := session.uploads.get(path))}
        small = {
            "small": {path: looks.find(picture.key).thumbnail for path, picture in seen.items()}
        }
        yield [path for path in value["files"] if path not in good], status, small
        pictures = [*seen.values()]
        if pictures and not session.busy and (engine := self._loading.find(session.model)):
            with suppress(UserError):  # only a head start
                read_ahead(engine, session.conversation, pictures)

    def _look_at(
        self, paths: list[str], session: Session, request: gr.Request
    ) -> tuple[list[str], str | dict]:
        """Encode pictures while the question is being typed: (paths that are pictures, status).

        Pictures are encoded one after another, and then kept with a longest side of at most
        KEPT_SIDE, so that only one is in memory at full size.
        """
        # Pictures that were removed from the box are not kept.
        session.uploads = uploads = {p: u for p, u in session.uploads.items() if p in paths}
        room = max(0, FILES_AT_ONCE - len(session.conversation.pictures))
        if len(paths) > room:
            warn(explain(too_many_pictures(), request))
        good = []
        for path in paths[:room]:
            try:
                picture = session.load_picture(uploaded(path))
            except UserError as error:
                if session.is_news(text := explain(error, request)):
                    warn(text)
                continue
            good.append(path)
            try:
                if engine := self._loading.find(session.model):
                    looks.note_objects(picture, engine.encode(picture))
                    uploads[path] = image.smaller(picture, KEPT_SIDE)
                    render.make_thumbnail(uploads[path])
            except Exception:  # only a head start: the answer reports the error
                log.exception("while encoding a picture")
        if session.busy or session.uploads is not uploads:  # a question has been sent
            return good, gr.skip()
        ready = bool(good) and all(path in uploads for path in good)
        return good, translate("looked", request) if ready else ""

    def new_chat(self, session: Session) -> tuple:
        """An empty conversation: (session, messages, box, status)."""
        return session.leave(Session(model=session.model)), [], box(False), ""

    def open(self, path: str, session: Session, request: gr.Request) -> tuple:
        """The conversation in a file that was downloaded earlier.

        Returns the same as `new_chat`, and the conversation's system prompt.
        """
        return self._show(lambda: transcript.from_file(uploaded(path)), False, session, request)

    def reopen(self, session: Session, chosen: gr.SelectData, request: gr.Request) -> tuple:
        """A conversation that the visitor's browser kept."""
        return self._show(lambda: transcript.from_record(chosen.value), True, session, request)

    def _show(
        self, read: Callable[[], Session], listed: bool, old: Session, request: gr.Request
    ) -> tuple:
        """listed: whether the browser's list has the conversation; if not, it is added."""
        try:
            opened = read()
        except UserError as error:
            warn(explain(error, request))
            return (gr.skip(),) * 5
        opened.name = (opened.entry and opened.entry.id) or secrets.token_hex(8)
        opened.entry = None if listed else opened.entry
        opened.model = opened.model or old.model
        render.make_thumbnails(opened.conversation)
        pictures = opened.conversation.pictures
        for key in pictures:
            opened.files.setdefault(key, looks.find(key).thumbnail)
        opened.conversation.pictures = {k: image.packed(p, KEPT_SIDE) for k, p in pictures.items()}
        old.leave(opened)
        system = gr.update(value=opened.conversation.system or "")
        status = answers.ending(opened, request)
        return opened, render.messages(opened, request), box(False), status, system
