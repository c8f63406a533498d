"""One visitor's conversation: questions, retries, edits, and the answers, written as they come."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from minigpt4.conversation import Answer, Conversation, ask, texts_of
from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.model.image import Picture
from minigpt4.model.prompt import Message
from minigpt4.web.guard import decoding
from minigpt4.web.guard.limits import FILES_AT_ONCE
from minigpt4.web.page.versions import Fork, Forks, Tail

if TYPE_CHECKING:
    from minigpt4.engine import AnyEngine, Sampling, Stats

KEPT_SIDE = 1024  # pixels; the engine sees pictures at full size, then they are kept smaller
SECONDS_PER_UPDATE = 0.15  # shortest pause between two updates of the page: phones are slow
SECONDS_PER_WARNING = 5.0  # before the same one is shown again
SECONDS_PER_LOOK = 1.0  # how often the place in the queue is shown, and a closed tab is noticed
# Stop reasons after which an answer may be continued; "interrupted": the page left before its end.
CUT_OFF = {"length", "time", "closed", "interrupted"}


@dataclass
class Remark:
    """A line by the page itself, shown before message number `before`; no model sees it."""

    before: int
    text: str


@dataclass
class About:
    """An entry of the browser's list. time: of its last change, in ms since 1970; named: its title
    was given by the visitor."""

    id: str = ""
    title: str = ""
    time: int = 0
    named: bool = False
    pinned: bool = False


@dataclass
class Session:
    """One visitor's data: the conversation, the page's remarks, pictures that are not sent yet.

    A failure before the engine has accepted a question changes none of it, unless it was an edited
    one: that is kept without an answer.
    """

    conversation: Conversation = field(default_factory=Conversation)
    remarks: list[Remark] = field(default_factory=list)
    # Path -> picture in the box that the engine has seen; its longest side is KEPT_SIDE at most.
    uploads: dict[str, Picture] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # picture's key -> path of its upload
    keys: dict[str, str] = field(default_factory=dict)  # picture's key -> its key in the browser
    captions: dict[str, str] = field(default_factory=dict)  # picture's key -> its stored caption
    entry: About | None = None  # of the browser's list, if it was opened from a file
    answer: Answer | None = None  # the running one, or the last one
    busy: bool = False  # while an answer is running
    changed: bool = False  # since the browser last got a record of it
    # The session that the page shows instead of this one.
    successor: "Session | None" = field(default=None, repr=False, compare=False)
    # Sessions that were left before the browser had recorded all of them.
    unrecorded: "list[Session]" = field(default_factory=list, repr=False, compare=False)
    # Records that were sent when this session was opened: `record_left` repeats them.
    opened_with: list[dict] = field(default_factory=list, repr=False, compare=False)
    # The last warning and when it came.
    warned: tuple[str, float] = field(default=("", 0.0), repr=False, compare=False)
    stop_reason: str = ""  # of the last answer
    sent: dict | None = None  # the message box's value when the engine accepted the question
    model: str = ""  # the model's name; "" is the first of those that are offered
    model_chosen: float = 0.0  # when the visitor chose it, in ms of the browser's clock
    name: str = ""  # its id in the browser's list; given with the first question
    statistics: dict[int, "Stats"] = field(default_factory=dict)  # place -> its answer's
    forks: Forks = field(default_factory=dict)  # other versions of what is shown
    # Place -> the message and how it is shown, so that each is rendered once (see render.py).
    rendered: dict[int, tuple[Message, list[dict]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def remark(self, text: str) -> None:
        """Add a remark at the conversation's end."""
        self.remarks.append(Remark(len(self.conversation.messages), text))
        self.changed = True

    def is_news(self, warning: str) -> bool:
        """Whether this warning was not shown a moment ago. If a bad file is sent at once, both the
        first look at it and the question cause the same warning."""
        (before, then), now = self.warned, time.monotonic()
        self.warned = warning, now
        return warning != before or now - then > SECONDS_PER_WARNING

    def leave(self, successor: "Session") -> "Session":
        """Show another conversation; the answer that is running here ends."""
        self.successor = successor
        successor.unrecorded, self.unrecorded = self.unrecorded, []
        if self.busy or self.changed or self.entry:
            successor.record_later(self)
        self.stop()
        return successor

    def record_later(self, left: "Session") -> None:
        """Have the next record include a session that was left."""
        if not any(session is left for session in self.unrecorded):
            self.unrecorded.append(left)

    @property
    def latest(self) -> "Session":
        """The session that the page shows now."""
        return self.successor.latest if self.successor else self

    def stop(self) -> None:
        """End the running answer at once; any thread may call this."""
        if self.answer is not None:
            self.answer.close()

    def load_picture(self, path: str) -> Picture:
        """The picture in an uploaded file. UserError if it is not a picture."""
        picture = self.uploads.get(path) or decoding.load(path)
        self.files[picture.key] = path
        return picture

    @property
    def last_answer(self) -> str:
        """The last answer's text; "" if there is none."""
        return self.answer_at(len(self.conversation.messages) - 1)

    def answer_at(self, index: int) -> str:
        """The text of an answer; "" if message `index` is not one."""
        messages = self.conversation.messages
        if not 0 <= index < len(messages) or messages[index].role != "assistant":
            return ""
        return "".join(p for p in messages[index].parts if isinstance(p, str))

    @property
    def unanswered(self) -> bool:
        """Whether the last question has no answer, or an empty one."""
        return bool(self.conversation.messages) and not self.last_answer

    @property
    def can_continue(self) -> bool:
        """Whether the last answer is missing or was cut off."""
        return self.unanswered or (bool(self.last_answer) and self.stop_reason in CUT_OFF)

    # --- the next conversation to answer; the session's own stays as it is ---------------------

    def with_question(self, text: str, files: list[str]) -> Conversation:
        """The conversation with a further question. UserError if a file is not a picture."""
        pictures = [self.load_picture(path) for path in files]
        conversation = self._up_to(len(self.conversation.messages))
        if conversation.messages and conversation.messages[-1].role == "user":
            conversation.add_answer("")  # questions and answers take turns
        conversation.add_question(text, pictures)
        if len(conversation.pictures) > FILES_AT_ONCE:
            raise too_many_pictures()
        return conversation

    def to_retry(self) -> Conversation:
        """The conversation up to its last question."""
        return self._up_to(self._last_question() + 1)

    def with_edit(self, index: int, text: str) -> Conversation:
        """The conversation up to question `index`, with another text and the same pictures."""
        messages = self.conversation.messages
        if not 0 <= index < len(messages) or messages[index].role != "user":
            raise UserError("Only a question can be edited.", message_id="only_questions")
        images, text = messages[index].images, text.strip()
        if not text and not images:
            raise UserError("The message is empty: write a question.", message_id="empty_message")
        conversation = self._up_to(index)
        conversation.messages.append(Message("user", images + ((text,) if text else ())))
        return conversation

    def to_continue(self) -> Conversation:
        """The conversation with its last answer, which is to be continued, unless it is empty."""
        if self.unanswered:
            return self.to_retry()
        return self._up_to(len(self.conversation.messages))

    def undo(self) -> tuple[str, list[str]]:
        """Remove the last question and its answer. Returns its text and its pictures' paths."""
        index = self._last_question()
        question = self.conversation.messages[index]
        self._put_away(index)
        text = "\n".join(p for p in question.parts if isinstance(p, str))
        return text, [self.files[i.key] for i in question.images if i.key in self.files]

    def _last_question(self) -> int:
        asked = [i for i, m in enumerate(self.conversation.messages) if m.role == "user"]
        if not asked:
            raise UserError("Nothing has been asked yet.", message_id="nothing_asked")
        return asked[-1]

    def _up_to(self, end: int) -> Conversation:
        old = self.conversation
        return Conversation(old.messages[:end], {**old.pictures}, old.system)

    def replace_conversation(self, conversation: Conversation) -> None:
        """Make this the conversation; remarks on removed messages are removed, too."""
        self.conversation, self.changed = conversation, True
        count = len(conversation.messages)
        self.remarks = [r for r in self.remarks if r.before < count]
        self.rendered = {place: r for place, r in self.rendered.items() if place < count}
        self.statistics = {place: s for place, s in self.statistics.items() if place < count}

    # --- versions ------------------------------------------------------------------------------

    def show_version(self, place: int, number: int) -> None:
        """Show another version from `place` on. UserError if there is none."""
        fork = self.forks.get(place)
        if fork is None or not 0 <= number < len(fork.tails) or fork.shown < 0:
            raise no_version()
        if number == fork.shown:
            return
        self._put_away(place)
        tail = fork.take(number)
        if tail is not None:
            self.conversation.messages += tail.messages
            self.forks |= tail.forks
            self.statistics |= tail.statistics
            self.stop_reason = tail.stop_reason

    def _put_away(self, place: int) -> None:
        """Keep what is shown from `place` on as a version that is not shown."""
        messages = self.conversation.messages
        later = {p: fork for p, fork in self.forks.items() if p > place}
        figures = {p: stats for p, stats in self.statistics.items() if p >= place}
        tail = Tail(messages[place:], later, self.stop_reason, figures)
        fork = self.forks.setdefault(place, Fork([None], 0))
        fork.put_away(tail)
        self.forks = {p: f for p, f in self.forks.items() if p <= place}
        self.replace_conversation(self._up_to(place))
        self.stop_reason = ""

    def _branch(self, conversation: Conversation) -> None:
        """Keep as a version what is shown now and is not in `conversation`, shown next."""
        old, new = self.conversation.messages, conversation.messages
        common = (i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a is not b)
        place = next(common, len(old))
        if place < len(old) or place in self.forks:
            self._put_away(place)
            self.forks[place].take(len(self.forks[place].tails))

    # --- the answer ----------------------------------------------------------------------------

    async def run(
        self, engine: "AnyEngine", conversation: Conversation, sampling: "Sampling"
    ) -> AsyncGenerator[None, None]:
        """Have `conversation` answered and write the answer down as it comes.

        Yields whenever there is something new to show, first when the engine has accepted the
        question. A UserError before that changes nothing. The answer is always closed at the end,
        also if this is cancelled at some `await`.
        """
        answer = await start(engine, conversation, sampling)
        try:
            self.answer = answer  # from here on `stop` reaches it
            if self.successor:
                self.stop()
            # The engine holds the pictures itself for as long as it needs them.
            conversation.pictures = await asyncio.to_thread(_shrunk, conversation)
            async with aclosing(self._write_down(answer, conversation)) as steps:
                async for step in steps:
                    yield step
        finally:
            answer.close()

    def keep_unanswered(self, conversation: Conversation) -> None:
        """Show a conversation whose last question the engine has not accepted."""
        conversation.add_answer("")
        self._branch(conversation)
        self.replace_conversation(conversation)
        self.stop_reason = ""

    async def _write_down(
        self, answer: Answer, conversation: Conversation
    ) -> AsyncGenerator[None, None]:
        head = ""
        if conversation.messages[-1].role == "assistant":
            head = self.last_answer
            self.replace_conversation(conversation)
        else:
            self.keep_unanswered(conversation)
        self.stop_reason, self.uploads = "", {}
        self.name = self.name or secrets.token_hex(8)
        place = len(conversation.messages) - 1
        try:
            yield
            updated = 0.0
            async with aclosing(texts_of([answer], SECONDS_PER_LOOK)) as looks:
                async for number, text in looks:
                    if text is not None:
                        self._write(place, head + answer.text)
                    elif number is not None:
                        break  # the answer has ended
                    if time.monotonic() - updated >= SECONDS_PER_UPDATE:
                        yield
                        # After the yield, so that the pause does not include the page's work.
                        updated = time.monotonic()
        finally:
            answer.close()
            self.stop_reason = answer.stop_reason or "closed"
            self.statistics[place] = answer.stats
            text = head + answer.text
            self._write(place, text if self.stop_reason == "length" else text.strip())

    def _write(self, place: int, text: str) -> None:
        messages, self.changed = self.conversation.messages, True
        messages[place] = replace(messages[place], parts=(text,))


def no_version() -> UserError:
    """The error for a version that does not exist."""
    return UserError("There is no such version of this message.", message_id="no_version")


def too_many_pictures() -> UserError:
    """The error for a conversation with more than FILES_AT_ONCE pictures."""
    return UserError(
        f"A conversation may hold at most {FILES_AT_ONCE} pictures.",
        message_id="too_many_pictures",
        values={"count": FILES_AT_ONCE},
    )


async def start(engine: "AnyEngine", conversation: Conversation, sampling: "Sampling") -> Answer:
    """`ask` in a thread. If this is cancelled meanwhile, the answer is closed once it exists."""
    asked = asyncio.ensure_future(asyncio.to_thread(ask, engine, conversation, sampling))
    try:
        return await asyncio.shield(asked)
    except asyncio.CancelledError:
        asked.add_done_callback(_close_answer)
        raise
    finally:
        del asked  # its error refers to this frame: the cycle would keep the pictures in memory


def _close_answer(asked: "asyncio.Future[Answer]") -> None:
    if not asked.cancelled() and asked.exception() is None:
        asked.result().close()


def _shrunk(conversation: Conversation) -> dict[str, Picture]:
    return {key: image.packed(p, KEPT_SIDE) for key, p in conversation.pictures.items()}
