"""One visitor's conversation: how it is asked, repeated, edited and written down as it comes."""

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

KEPT_SIDE = 1024  # pixels; the engine sees pictures whole, afterwards they are kept smaller
SECONDS_PER_UPDATE = 0.15  # rest between two updates of the page, at least: phones are slow
SECONDS_PER_WARNING = 5.0  # before the same one is shown again
SECONDS_PER_LOOK = 1.0  # how often the place in the queue is shown, and a closed tab is noticed
# Stop reasons after which an answer may be continued; "interrupted": the page was gone at its end.
CUT_OFF = {"length", "time", "closed", "interrupted"}


@dataclass
class Remark:
    """A line by the page itself, shown before the message `before`; the model never sees it."""

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
    """What one visitor has: the conversation, the page's remarks, pictures that are not sent yet.

    Whatever fails before the engine accepts a question leaves all of it as it was.
    """

    conversation: Conversation = field(default_factory=Conversation)
    remarks: list[Remark] = field(default_factory=list)
    # Path -> picture, not sent yet: those that the engine has seen, at most KEPT_SIDE long.
    uploads: dict[str, Picture] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # picture's key -> path of its upload
    keys: dict[str, str] = field(default_factory=dict)  # picture's key -> its key in the browser
    captions: dict[str, str] = field(default_factory=dict)  # picture's key -> as it was opened with
    entry: About | None = None  # of the browser's list, where a file told it
    answer: Answer | None = None  # the running one, or the last one
    busy: bool = False  # while an answer is running
    changed: bool = False  # since the browser was last told of a turn's end
    # The session that the page shows instead of this one.
    successor: "Session | None" = field(default=None, repr=False, compare=False)
    # Those that were left before the browser knew all of them, until they are recorded.
    unrecorded: "list[Session]" = field(default_factory=list, repr=False, compare=False)
    # What was told when this one was opened: it is told again with each record of that kind.
    opened_with: list[dict] = field(default_factory=list, repr=False, compare=False)
    # The last warning and when it came.
    warned: tuple[str, float] = field(default=("", 0.0), repr=False, compare=False)
    stop_reason: str = ""  # of the last answer
    sent: dict | None = None  # what the message box held, once it was asked
    model: str = ""  # that answers; "" is the first of those that are offered
    name: str = ""  # among the visitor's recent conversations; given with the first question
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
        """Whether the visitor has not been warned of the same a moment ago: of a bad file that is
        sent at once, its look and its question both tell."""
        (before, then), now = self.warned, time.monotonic()
        self.warned = warning, now
        return warning != before or now - then > SECONDS_PER_WARNING

    def leave(self, successor: "Session") -> "Session":
        """Show another conversation; the answer that is running here ends."""
        self.successor = successor
        successor.unrecorded, self.unrecorded = self.unrecorded, []
        if self.busy or self.changed or self.entry:
            successor.unrecorded.append(self)
        self.stop()
        return successor

    @property
    def latest(self) -> "Session":
        """The session that the page shows now."""
        return self.successor.latest if self.successor else self

    def stop(self) -> None:
        """End the running answer at once; any thread may call this."""
        if self.answer is not None:
            self.answer.close()

    def load_picture(self, path: str) -> Picture:
        """The picture in an uploaded file. UserError where it is not a picture."""
        picture = self.uploads.get(path) or decoding.load(path)
        self.files[picture.key] = path
        return picture

    @property
    def last_answer(self) -> str:
        """The last answer's text; "" where there is none."""
        return self.answer_at(len(self.conversation.messages) - 1)

    def answer_at(self, index: int) -> str:
        """The text of an answer; "" where message `index` is not one."""
        messages = self.conversation.messages
        if not 0 <= index < len(messages) or messages[index].role != "assistant":
            return ""
        return "".join(p for p in messages[index].parts if isinstance(p, str))

    @property
    def unanswered(self) -> bool:
        """Whether the last question's answer has not a word."""
        return bool(self.conversation.messages) and not self.last_answer

    @property
    def can_continue(self) -> bool:
        """Whether the last answer was cut off."""
        return self.unanswered or (bool(self.last_answer) and self.stop_reason in CUT_OFF)

    # --- the next conversation to answer; the session's own stays as it is ---------------------

    def with_question(self, text: str, files: list[str]) -> Conversation:
        """The conversation and another question. UserError where a file is not a picture."""
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
        """The conversation unchanged, so that its last answer can be continued; without an answer
        that has not a word."""
        if self.unanswered:
            return self.to_retry()
        return self._up_to(len(self.conversation.messages))

    def undo(self) -> tuple[str, list[str]]:
        """Take back the last question and its answer: its text, and the paths of its pictures."""
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
        """Make this the conversation; remarks on removed messages go, too."""
        self.conversation, self.changed = conversation, True
        count = len(conversation.messages)
        self.remarks = [r for r in self.remarks if r.before < count]
        self.rendered = {place: r for place, r in self.rendered.items() if place < count}
        self.statistics = {place: s for place, s in self.statistics.items() if place < count}

    # --- versions ------------------------------------------------------------------------------

    def show_version(self, place: int, number: int) -> None:
        """Show another version from `place` on. UserError where there is none."""
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
        """What `conversation`, which is to be shown, leaves out becomes a version."""
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
        question; UserError before that changes nothing. However this ends, cancelled at any
        `await` included, the answer is closed.
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

    async def _write_down(
        self, answer: Answer, conversation: Conversation
    ) -> AsyncGenerator[None, None]:
        head = ""
        if conversation.messages[-1].role == "assistant":
            head = self.last_answer
        else:
            conversation.add_answer("")
            self._branch(conversation)
        self.replace_conversation(conversation)
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
                        break  # its end
                    if time.monotonic() - updated >= SECONDS_PER_UPDATE:
                        yield
                        # After the yield: however long the page took, the loop then rests.
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
    """What is raised where a version is asked for that is none."""
    return UserError("There is no such version of this message.", message_id="no_version")


def too_many_pictures() -> UserError:
    """What is raised, or shown, where a conversation would have more than FILES_AT_ONCE."""
    return UserError(
        f"A conversation may hold at most {FILES_AT_ONCE} pictures.",
        message_id="too_many_pictures",
        values={"count": FILES_AT_ONCE},
    )


async def start(engine: "AnyEngine", conversation: Conversation, sampling: "Sampling") -> Answer:
    """`ask` in a thread. Where this is cancelled meanwhile, the answer is closed once it exists."""
    asked = asyncio.ensure_future(asyncio.to_thread(ask, engine, conversation, sampling))
    try:
        return await asyncio.shield(asked)
    except asyncio.CancelledError:
        asked.add_done_callback(_close_answer)
        raise
    finally:
        del asked  # an error in it refers to this frame: the cycle would keep the pictures


def _close_answer(asked: "asyncio.Future[Answer]") -> None:
    if not asked.cancelled() and asked.exception() is None:
        asked.result().close()


def _shrunk(conversation: Conversation) -> dict[str, Picture]:
    return {key: image.packed(p, KEPT_SIDE) for key, p in conversation.pictures.items()}
