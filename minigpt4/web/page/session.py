"""One visitor's conversation: how it is asked, asked again, changed and written down."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from minigpt4.conversation import Answer, Conversation, ask
from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.model.image import Picture
from minigpt4.model.prompt import Message
from minigpt4.web.guard import decoding
from minigpt4.web.guard.limits import FILES_AT_ONCE
from minigpt4.web.page import preview

if TYPE_CHECKING:
    from minigpt4.engine import Engine, Sampling

KEPT_SIDE = 1024  # pixels; longer pictures are kept smaller once the engine has seen them
SECONDS_PER_UPDATE = 0.05  # the page shows new words this often, at most
SECONDS_PER_LOOK = 1.0  # how often the place in the queue is shown, and who left it is noticed
TOO_MANY_PICTURES = f"A conversation may hold at most {FILES_AT_ONCE} pictures."
MIDWAY = {"length", "time", "closed"}  # how an answer ends that may be continued


@dataclass
class Remark:
    """A line of the page's own, shown before the message `before`; the model never sees it."""

    before: int
    text: str


@dataclass
class Session:
    """One visitor's: the conversation, what the page says beside it, pictures not yet sent.

    Whatever fails before the engine takes a question leaves all of it as it was.
    """

    conversation: Conversation = field(default_factory=Conversation)
    remarks: list[Remark] = field(default_factory=list)
    # By file, not yet sent: those that the engine has seen, no longer than KEPT_SIDE.
    uploads: dict[str, Picture] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # picture's key -> the file it came from
    answer: Answer | None = None  # the one being given, or the last one
    busy: bool = False  # an answer is being given
    # What the page shows instead of this one.
    successor: "Session | None" = field(default=None, repr=False, compare=False)
    # One that was left in the middle of an answer, and is still to be written down.
    predecessor: "Session | None" = field(default=None, repr=False, compare=False)
    ended: str = ""  # how the last answer ended
    name: str = ""  # among the visitor's recent conversations; given with the first question

    def remark(self, text: str) -> None:
        """Say something at the conversation's end."""
        self.remarks.append(Remark(len(self.conversation.messages), text))

    def leave(self, successor: "Session") -> "Session":
        """The page goes over to another conversation; what is being answered here ends."""
        self.successor = successor
        if self.busy:
            successor.predecessor = self
        self.stop()
        return successor

    @property
    def latest(self) -> "Session":
        """What the page shows now."""
        return self.successor.latest if self.successor else self

    def stop(self) -> None:
        """End the answer being given, at once, whichever thread is giving it."""
        if self.answer is not None:
            self.answer.close()

    def read(self, path: str) -> Picture:
        """The picture in an uploaded file. UserError where it is none."""
        picture = self.uploads.get(path) or decoding.load(path)
        self.files[picture.key] = path
        return picture

    @property
    def last(self) -> str:
        """The last answer, "" where there is none."""
        return self.said(len(self.conversation.messages) - 1)

    def said(self, index: int) -> str:
        """The text of an answer; "" where message `index` is none."""
        messages = self.conversation.messages
        if not 0 <= index < len(messages) or messages[index].role != "assistant":
            return ""
        return "".join(p for p in messages[index].parts if isinstance(p, str))

    @property
    def websites(self) -> list[str]:
        """The HTML in each answer that holds some, in order."""
        found = (preview.website(self.said(i)) for i in range(len(self.conversation.messages)))
        return [site for site in found if site]

    @property
    def can_continue(self) -> bool:
        """Whether the last answer was cut off."""
        return bool(self.last) and self.ended in MIDWAY

    def asking(self, text: str, files: list[str]) -> Conversation:
        """The conversation with another question. UserError where a file is no picture."""
        pictures = [self.read(path) for path in files]
        conversation = self._until(len(self.conversation.messages))
        conversation.add_question(text, pictures)
        if len(conversation.pictures) > FILES_AT_ONCE:
            raise UserError(TOO_MANY_PICTURES)
        return conversation

    def asking_again(self) -> Conversation:
        """The conversation up to its last question."""
        return self._until(self._last_question() + 1)

    def editing(self, index: int, text: str) -> Conversation:
        """The conversation up to question `index`, with another text and the same pictures."""
        messages = self.conversation.messages
        if not 0 <= index < len(messages) or messages[index].role != "user":
            raise UserError("Only a question can be edited.")
        question = messages[index]
        if not text.strip() and not question.images:
            raise UserError("The message is empty: write a question.")
        conversation = self._until(index)
        parts = question.images + ((text.strip(),) if text.strip() else ())
        conversation.messages.append(Message("user", parts))
        return conversation

    def continuing(self) -> Conversation:
        """The conversation as it is: its last answer will go on."""
        return self._until(len(self.conversation.messages))

    def undo(self) -> tuple[str, list[str]]:
        """Take the last question and its answer back: its text and its pictures' files."""
        index = self._last_question()
        question = self.conversation.messages[index]
        self.keep(self._until(index))
        self.ended = ""
        text = "\n".join(p for p in question.parts if isinstance(p, str))
        return text, [self.files[i.key] for i in question.images if i.key in self.files]

    def _last_question(self) -> int:
        asked = [i for i, m in enumerate(self.conversation.messages) if m.role == "user"]
        if not asked:
            raise UserError("Nothing has been asked yet.")
        return asked[-1]

    def _until(self, end: int) -> Conversation:
        old = self.conversation
        return Conversation(old.messages[:end], {**old.pictures}, old.system)

    def keep(self, conversation: Conversation) -> None:
        """Make this the conversation; remarks on what is gone go too."""
        self.conversation = conversation
        self.remarks = [r for r in self.remarks if r.before < len(conversation.messages)]

    async def run(
        self, engine: "Engine", conversation: Conversation, sampling: "Sampling"
    ) -> AsyncIterator[None]:
        """Have `conversation` answered and write the answer down as it comes.

        Stops wherever there is something new to show, first when the question has been taken.
        UserError before that changes nothing.
        """
        # A copy: the prompt is built from it in another thread.
        answer = await asyncio.to_thread(ask, engine, conversation, sampling)
        self.answer = answer  # from here on `stop` reaches it
        if self.successor:
            self.stop()
        # The engine has its own hold of the pictures for as long as it needs them.
        conversation.pictures = await asyncio.to_thread(_shrunk, conversation)
        head = ""
        if conversation.messages[-1].role == "assistant":
            head = self.last
        else:
            conversation.add_answer("")
        self.keep(conversation)
        self.ended, self.uploads = "", {}
        self.name = self.name or secrets.token_hex(8)
        place = len(conversation.messages) - 1
        if answer.notice:
            self.remarks.append(Remark(place, answer.notice))
        updated = 0.0
        try:
            yield
            async with aclosing(_watched(answer)) as looks:
                async for grown in looks:
                    now = time.monotonic()
                    if grown:
                        self._write(place, head + answer.text)
                    if now - updated > SECONDS_PER_UPDATE:
                        yield
                        updated = now
        finally:
            answer.close()
            self.ended = answer.stop_reason or "closed"
            text = head + answer.text
            self._write(place, text if self.ended == "length" else text.strip())

    def _write(self, place: int, text: str) -> None:
        messages = self.conversation.messages
        messages[place] = replace(messages[place], parts=(text,))


def _shrunk(conversation: Conversation) -> dict[str, Picture]:
    return {key: image.smaller(p, KEPT_SIDE) for key, p in conversation.pictures.items()}


async def _watched(answer: Answer) -> AsyncIterator[bool]:
    """True whenever the answer grew, False now and then while nothing comes."""
    pieces = aiter(answer)
    coming = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(pieces, None))
            done, _ = await asyncio.wait({coming}, timeout=SECONDS_PER_LOOK)
            if not done:
                yield False
                continue
            piece, coming = coming.result(), None
            if piece is None:
                return
            yield True
    finally:
        if coming is not None:
            answer.close()
            coming.cancel()
