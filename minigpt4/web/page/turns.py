"""What happens in a conversation: asked, asked again, edited, continued, stopped, taken back."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

import gradio as gr

from minigpt4.conversation import Conversation
from minigpt4.errors import UserError
from minigpt4.web.guard.uploads import uploaded
from minigpt4.web.page import preview, shown
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.session import Session
from minigpt4.web.page.texts import say
from minigpt4.web.server import warn

if TYPE_CHECKING:
    from minigpt4.engine import Engine, Sampling

log = logging.getLogger(__name__)


def box(answering: bool, **changes: object) -> dict:
    """The message box: with a button that sends, or one that stops."""
    return gr.update(submit_btn=not answering, stop_btn=answering, **changes)


class Turns:
    """The handlers of a page; those that answer yield (messages, box, status).

    names: the fields of Sampling that the page has controls for, in the order their values come;
    the system prompt comes after them.
    """

    def __init__(self, loading: Loading, names: Sequence[str]) -> None:
        self._loading = loading
        self._names = names

    def engine(self, request: gr.Request | None) -> "Engine":
        """The engine. UserError while it is being loaded."""
        if self._loading.engine is None:
            raise UserError(str(self._loading.error or say("still_loading", request)))
        return self._loading.engine

    async def ask(
        self, value: dict, session: Session, request: gr.Request, *settings: float | str | None
    ) -> AsyncIterator[tuple]:
        """Ask what stands in the box, which is emptied once the question has been taken."""

        def conversation() -> Conversation:
            return session.asking(value["text"], [uploaded(path) for path in value["files"]])

        async with aclosing(self._answer(session, conversation, request, settings, True)) as steps:
            async for step in steps:
                yield step

    async def retry(
        self, session: Session, request: gr.Request, *settings: float | str | None
    ) -> AsyncIterator[tuple]:
        """Answer the last question again."""
        steps = self._answer(session, session.asking_again, request, settings)
        async with aclosing(steps):
            async for step in steps:
                yield step

    async def edit(
        self,
        session: Session,
        edited: gr.EditData,
        request: gr.Request,
        *settings: float | str | None,
    ) -> AsyncIterator[tuple]:
        """Answer an earlier question, changed; what followed it is gone."""

        def conversation() -> Conversation:
            _, places = shown.show(session)
            return session.editing(places[edited.index], shown.written(edited.value))

        async with aclosing(self._answer(session, conversation, request, settings)) as steps:
            async for step in steps:
                yield step

    async def option(
        self,
        session: Session,
        chosen: gr.SelectData,
        request: gr.Request,
        *settings: float | str | None,
    ) -> AsyncIterator[tuple]:
        """Go on with an answer that was cut off, where that is what was clicked."""
        if chosen.value != "continue":
            yield (gr.skip(),) * 3
            return
        async with aclosing(self._answer(session, session.continuing, request, settings)) as steps:
            async for step in steps:
                yield step

    def undo(self, session: Session, request: gr.Request) -> tuple:
        """Put the last question back into the box, and forget its answer."""
        if session.busy:
            warn(say("busy", request))
            return (gr.skip(),) * 3
        try:
            text, files = session.undo()
        except UserError as error:
            warn(error)
            return self.messages(session, request), gr.skip(), ""
        value = {"text": text, "files": files}
        return self.messages(session, request), box(False, value=value), ""

    def stop(self, session: Session) -> None:
        """End the answer at its next step; whoever streams it shows how it ended."""
        session.stop()

    async def _answer(
        self,
        session: Session,
        build: Callable[[], Conversation],
        request: gr.Request | None,
        settings: Sequence[float | str | None],
        empties: bool = False,
    ) -> AsyncIterator[tuple]:
        if session.busy:  # a second Enter, say
            warn(say("busy", request))
            yield (gr.skip(),) * 3
            return
        taken, status, session.busy = False, "", True
        try:
            engine = self.engine(request)
            sampling, system = self._settings(settings, request)
            conversation = await asyncio.to_thread(build)
            conversation.system = system
            steps = session.run(engine, conversation, sampling)
            async with aclosing(steps):
                async for _ in steps:
                    if session.successor:  # the page has moved on
                        continue
                    now = waiting(session, sampling.num_beams, request)
                    line, status = gr.skip() if now == status else now, now
                    changes = gr.skip()
                    if not taken:
                        taken, changes = True, box(True, **({"value": None} if empties else {}))
                    yield self.messages(session, request, False), changes, line
            if not session.last and session.ended != "closed":
                session.remark(say("silent", request))
            status = statistics(session, request)
        except UserError as error:
            status = ""
            if taken:
                session.remark(str(error))
            else:
                warn(error)
        except Exception:
            log.exception("while answering")
            status = ""
            if taken:
                session.remark(say("sorry", request))
            else:
                warn(say("sorry", request))
        finally:
            session.busy = False
        if session.successor:  # what comes last here is shown last
            shown_now = session.latest
            yield self.messages(shown_now, request), box(shown_now.busy), gr.skip()
        else:
            yield self.messages(session, request), box(False), status

    def _settings(
        self, settings: Sequence[float | str | None], request: gr.Request | None
    ) -> tuple["Sampling", str | None]:
        from minigpt4.engine import Sampling

        *values, system = settings
        given = dict(zip(self._names, values, strict=True))
        digits = (given.pop("seed", None) or "").strip()
        if digits and not (digits.isascii() and digits.isdecimal() and len(digits) < 20):
            raise UserError(say("bad_seed", request))
        sampling = Sampling(seed=int(digits) if digits else None, **given)
        return sampling, (system or "").strip() or None

    def messages(
        self, session: Session, request: gr.Request | None, done: bool = True
    ) -> list[dict]:
        """The conversation for gr.Chatbot; `done`: with what can be done about the last answer."""
        messages, places = shown.show(session)
        last = len(session.conversation.messages) - 1
        if done and messages and places[-1] == last and session.last:
            options = []
            if session.can_continue:
                options.append({"value": "continue", "label": say("continue", request)})
            if preview.website(session.last):
                options.append({"value": "preview", "label": say("preview", request)})
            messages[-1]["options"] = options
        return messages


def waiting(session: Session, beams: int, request: gr.Request | None) -> str:
    """What a visitor waits for: the queue, or the answer."""
    if place := session.answer.position:
        return say("next", request) if place == 1 else say("queued", request, place=place)
    return say("weighing" if beams > 1 else "answering", request)


def statistics(session: Session, request: gr.Request | None) -> str:
    """One line on the answer that has ended; "" where nothing was generated."""
    stats = session.answer.stats
    if not stats.tokens:
        return ""
    line = say(
        "stats",
        request,
        tokens=stats.tokens,
        speed=f"{stats.tokens_per_s:.3g}",
        first=f"{stats.seconds_to_first:.2f}",
    )
    if stats.reused_tokens:
        line += say("reused", request, reused=stats.reused_tokens, prompt=stats.prompt_tokens)
    if session.ended in ("length", "time"):
        line += say("cut_length" if session.ended == "length" else "cut_closed", request)
    elif session.ended == "closed":
        line += say("cut_closed", request)
    return line
