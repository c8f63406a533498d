"""The turns of a conversation: ask, retry, edit, continue, stop, undo."""

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.processing_utils import save_file_to_cache
from gradio.utils import get_upload_folder

from minigpt4.config import wrong_setting
from minigpt4.conversation import Conversation
from minigpt4.errors import UserError
from minigpt4.web.guard.uploads import uploaded
from minigpt4.web.page import answers, examples, looks, render, transcript
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.session import Remark, Session, no_version
from minigpt4.web.page.texts import explain, explain_loading, translate
from minigpt4.web.server import warn

if TYPE_CHECKING:
    from minigpt4.engine import AnyEngine, Sampling

SECONDS_PER_RECORD = 0.5  # between two records of an answer that is coming
UNCHANGED = (gr.skip(),) * 4

log = logging.getLogger(__name__)


def box(answering: bool, **changes: object) -> dict:
    """An update of the message box: it gets a stop button while answering, else a send button."""
    return gr.update(submit_btn=not answering, stop_btn=answering, **changes)


class Turns:
    """The page's handlers. Those that answer yield (messages, box, status, record for the browser).

    names: the fields of Sampling that the page has controls for, in the order of their values. The
    system prompt comes after these, and then `shown`, the browser's id of the conversation on the
    page. If the session no longer has that conversation, as after a day, the handler does nothing
    else than have the page open it again.
    """

    def __init__(self, loading: Loading, names: Sequence[str]) -> None:
        self._loading = loading
        self._names = names
        self._first_look = looks.FirstLook(loading)

    async def ask(
        self, value: dict, session: Session, request: gr.Request, *settings: float | str | None
    ) -> AsyncGenerator[tuple, None]:
        """Ask what is in the box, which is emptied once the engine has accepted the question."""

        def conversation() -> Conversation:
            return session.with_question(value["text"], [uploaded(path) for path in value["files"]])

        session.sent = None
        async with aclosing(self._answer(session, conversation, request, settings, value)) as steps:
            async for step in steps:
                yield step

    def empty(self, value: dict | None, session: Session) -> dict:
        """Empty the box after the turn if it still has its value at sending: a busy browser may
        apply all updates of a turn at once, and then loses the update that empties the box."""
        sent, session.sent = session.sent, None
        if not sent or not value or value["text"] != sent["text"]:
            return gr.skip()
        later = [path for path in value["files"] if path not in sent["files"]]
        return gr.update(value={"text": "", "files": later})

    async def example(
        self,
        session: Session,
        clicked: gr.SelectData,
        request: gr.Request,
        *settings: float | str | None,
    ) -> AsyncGenerator[tuple, None]:
        """Ask an example's question about its picture, with its seed unless the visitor has chosen
        one. The box keeps what is in it."""
        example = [*examples.EXAMPLES.values()][clicked.index]

        def conversation() -> Conversation:
            copy = save_file_to_cache(example.file, get_upload_folder())
            asked = session.with_question(example.question, [copy])
            looks.note(asked.messages[-1].images[0].key, caption=example.caption)
            return asked

        steps = self._answer(session, conversation, request, settings, seed=example.seed)
        async with aclosing(steps):
            async for step in steps:
                yield step

    async def look(self, session: Session, request: gr.Request) -> tuple:
        """After the answer, caption pictures that were sent at once: (messages, record)."""
        if not await self._first_look.at_conversation(session) or session.busy or session.successor:
            return gr.skip(), gr.skip()
        session.rendered.clear()
        return render.messages(session, request), self._record(session)

    async def retry(
        self, session: Session, request: gr.Request, *settings: float | str | None
    ) -> AsyncGenerator[tuple, None]:
        """Answer the last question again."""
        async with aclosing(self._answer(session, session.to_retry, request, settings)) as steps:
            async for step in steps:
                yield step

    async def edit(
        self,
        session: Session,
        edited: gr.EditData,
        request: gr.Request,
        *settings: float | str | None,
    ) -> AsyncGenerator[tuple, None]:
        """Answer an earlier question with another text; what followed becomes a version. If it is
        not accepted, it is shown without an answer: its text is nowhere else."""
        text = render.unescape(edited.value)

        def conversation() -> Conversation:
            _, places = render.show(session)
            known = edited.index in range(len(places))  # the conversation may have changed
            return session.with_edit(places[edited.index] if known else -1, text)

        steps = self._answer(session, conversation, request, settings, edited=text)
        async with aclosing(steps):
            async for step in steps:
                yield step

    async def option(
        self,
        session: Session,
        chosen: gr.SelectData,
        request: gr.Request,
        *settings: float | str | None,
    ) -> AsyncGenerator[tuple, None]:
        """Continue an answer that was cut off, if that is the button that was clicked."""
        if chosen.value != "continue":
            yield UNCHANGED
            return
        async with aclosing(self._answer(session, session.to_continue, request, settings)) as steps:
            async for step in steps:
                yield step

    async def undo(
        self, value: dict | None, session: Session, shown: str | None, request: gr.Request
    ) -> tuple:
        """Put the last question back into the box, before what is in it, and remove its answer."""
        if blocked := _blocked(session, shown, request):
            return blocked
        try:
            text, files = session.undo()
        except UserError as error:
            warn(explain(error, request))
            return render.messages(session, request), gr.skip(), "", gr.skip()
        await asyncio.to_thread(render.make_thumbnails, session.conversation)
        typed = value or {"text": "", "files": []}
        text = "\n".join(filter(None, (text, typed["text"])))
        together = {"text": text, "files": [*files, *typed["files"]]}
        latest = session.latest  # the visitor may have left this one meanwhile
        return render.messages(latest, request), box(latest.busy, value=together), "", gr.skip()

    async def version(
        self, session: Session, shown: str | None, chosen: gr.SelectData, request: gr.Request
    ) -> tuple:
        """Show another version of the conversation from a place on."""
        if blocked := _blocked(session, shown, request):
            return blocked
        value = chosen.value if isinstance(chosen.value, dict) else {}
        place, number = value.get("place"), value.get("number")
        try:
            if not isinstance(place, int) or not isinstance(number, int):
                raise no_version()
            session.show_version(place, number)
        except UserError as error:
            warn(explain(error, request))
            return UNCHANGED
        await asyncio.to_thread(render.make_thumbnails, session.conversation)
        latest = session.latest
        status = answers.ending(latest, request)
        return render.messages(latest, request), gr.skip(), status, gr.skip()

    def stop(self, session: Session) -> None:
        """End the answer at its next step; the handler that streams it shows how it ended."""
        session.stop()

    async def _answer(
        self,
        session: Session,
        build: Callable[[], Conversation],
        request: gr.Request | None,
        settings: Sequence[float | str | None],
        sent: dict | None = None,
        seed: int | None = None,
        edited: str = "",
    ) -> AsyncGenerator[tuple, None]:
        """sent: the box's value, if it is to be emptied; seed: used if the settings have none;
        edited: an edited question's text, which is kept also if it is not accepted."""
        *settings, shown = settings
        if blocked := _blocked(session, str(shown or ""), request, edited):
            yield blocked
            return
        accepted, status, failure, session.busy = False, "", "", True
        refused, recorded = False, 0.0  # refused: a picture in the box
        try:
            async with aclosing(self._run(session, build, request, settings, seed)) as steps:
                async for now in steps:
                    line, status = gr.skip() if now == status else now, now
                    change = gr.skip()
                    if not accepted:
                        accepted = True
                        session.sent = sent
                        change = box(True, **({"value": None} if sent else {}))
                    kept = gr.skip()
                    if time.monotonic() - recorded >= SECONDS_PER_RECORD:
                        recorded = time.monotonic()
                        kept = self._record(session)
                    yield render.messages(session, request, False), change, line, kept
            if not session.last_answer and session.stop_reason != "closed":
                session.remark(translate("silent", request))
            status = answers.ending(session, request)
        except UserError as error:
            failure, refused = explain(error, request), bool(sent and "name" in error.values)
        except Exception:
            log.exception("while answering")
            failure = translate("sorry", request)
        finally:
            session.busy = False
        if failure:
            status = ""
            if accepted:
                session.remark(failure)
            elif session.is_news(failure):
                warn(failure, mark="refused" if sent else "")
            if edited and not accepted:
                with suppress(UserError):  # which was the failure
                    session.keep_unanswered(build())
            if refused and sent and (sent["text"].strip() or len(sent["files"]) > 1):
                warn(translate("unsent", request))
        if not session.successor:
            yield render.messages(session, request), box(False), status, gr.skip()
        if session.successor:  # perhaps since that yield: the last update is what the page shows
            latest = session.latest
            if session.changed:  # since it was left and recorded
                latest.record_later(session)
            yield render.messages(latest, request), box(latest.busy), gr.skip(), gr.skip()

    async def _run(
        self,
        session: Session,
        build: Callable[[], Conversation],
        request: gr.Request | None,
        settings: Sequence[float | str | None],
        seed: int | None,
    ) -> AsyncGenerator[str, None]:
        """Answer the conversation that `build` returns; yields the status line at each step."""
        engine = self._engine(session, request)
        sampling, system = self._sampling(settings, request)
        if sampling.seed is None:
            sampling = replace(sampling, seed=seed)
        conversation = await asyncio.to_thread(_build, build)
        conversation.system = system
        accepted = False
        async with aclosing(session.run(engine, conversation, sampling)) as steps:
            async for _ in steps:
                if not accepted:
                    accepted = True
                    self._remark_on_dropped_turns(session, request)
                if not session.successor:  # else the page shows another conversation
                    yield answers.waiting(session, sampling.num_beams, request)

    def _record(self, session: Session) -> dict:
        return transcript.told(
            session, transcript.record(session, self._loading.name(session.model))
        )

    def _remark_on_dropped_turns(self, session: Session, request: gr.Request | None) -> None:
        if session.answer and (count := session.answer.dropped_turns):
            text = translate("dropped_one" if count == 1 else "dropped", request, count=count)
            session.remarks.append(Remark(len(session.conversation.messages) - 1, text))

    def _engine(self, session: Session, request: gr.Request | None) -> "AnyEngine":
        """The engine of the session's model. UserError while it is being loaded."""
        engine = self._loading.find(session.model)
        if engine is None:
            error = self._loading.error
            raise UserError(
                explain_loading(error, request) if error else translate("still_loading", request)
            )
        return engine

    def _sampling(
        self, settings: Sequence[float | str | None], request: gr.Request | None
    ) -> tuple["Sampling", str | None]:
        """The settings and the system prompt. UserError if they are not valid."""
        from minigpt4.engine import Sampling

        *values, system = settings
        given: dict[str, Any] = dict(zip(self._names, values, strict=True))  # Sampling checks them
        digits = str(given.pop("seed", None) or "").strip()
        chosen = int(digits) if re.fullmatch("-?[0-9]{1,19}", digits) else None
        if digits and wrong_setting("seed", chosen):
            raise UserError(translate("bad_seed", request))
        sampling = Sampling(seed=chosen, **given)
        return sampling, str(system or "").strip() or None


def _blocked(
    session: Session, shown: str | None, request: gr.Request | None, edited: str = ""
) -> tuple | None:
    """The result of a handler that can do nothing now; None if it can."""
    if shown and not session.name:
        return (*UNCHANGED[:3], transcript.forgotten(shown, edited))
    if session.busy:  # a second Enter, for example
        warn(translate("busy", request))
        return UNCHANGED
    return None


def _build(build: Callable[[], Conversation]) -> Conversation:
    """In a thread: opening pictures and writing thumbnails take too long for the event loop."""
    conversation = build()
    render.make_thumbnails(conversation)
    return conversation
