"""One visitor's conversation, and what the page shows of it."""

import html
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from gradio.processing_utils import save_pil_to_cache
from gradio.utils import get_upload_folder

from minigpt4 import image
from minigpt4.chat import Answer, Conversation, ask
from minigpt4.engine import Engine, Sampling
from minigpt4.image import Picture
from minigpt4.prompt import Message

SECONDS_PER_UPDATE = 0.05  # the page shows new words this often, at most
THUMBNAIL_SIDE = 512
SILENT = "The model had nothing to say; try other words."


@dataclass
class Session:
    """One visitor's: the conversation, the page's view of it, and pictures not yet sent.

    What the page says for itself is in `shown` and never reaches the model.
    """

    conversation: Conversation = field(default_factory=Conversation)
    shown: list[dict] = field(default_factory=list)  # as gr.Chatbot has them
    uploads: dict[str, Picture] = field(default_factory=dict)  # by file
    answer: Answer | None = None  # the one being given

    def say(self, text: str) -> None:
        """A small line of the page's own."""
        self.shown.append({"role": "assistant", "content": f"<small>{html.escape(text)}</small>"})

    def stop(self) -> None:
        """End the answer being given, at once, whichever thread is giving it."""
        if self.answer is not None:
            self.answer.close()

    def read(self, path: str) -> Picture:
        """The picture in an uploaded file, decoded once."""
        if path not in self.uploads:
            self.uploads[path] = image.load(path)
        return self.uploads[path]

    def ask(self, engine: Engine, text: str, files: list[str], sampling: Sampling) -> Answer:
        """Put a question. UserError, and nothing has changed, where it cannot be asked."""
        old = self.conversation
        pictures = [self.read(path) for path in files]
        conversation = Conversation([*old.messages], {**old.pictures}, old.system)
        conversation.add_question(text, pictures)
        self.answer = answer = ask(engine, conversation, sampling)
        content = [_thumbnail(p) for p in pictures] + ([literal(text)] if text.strip() else [])
        conversation.add_answer("")  # `take` writes it
        self.conversation, self.uploads = conversation, {}
        self.shown.append({"role": "user", "content": content})
        if answer.notice:
            self.say(answer.notice)
        return answer

    def take(self, answer: Answer) -> Iterator[None]:
        """Write the answer down as it comes; stops wherever there is something new to show."""
        messages, bubble, updated = self.conversation.messages, None, 0.0
        for _ in answer:
            messages[-1] = Message("assistant", (answer.text.strip(),))
            if bubble is None:
                bubble = {"role": "assistant"}
                self.shown.append(bubble)
            bubble["content"] = literal(answer.text)
            if time.monotonic() - updated > SECONDS_PER_UPDATE:
                yield
                updated = time.monotonic()
        if bubble is None:
            self.say(SILENT)


def literal(text: str) -> str:
    """Markdown that shows tags and picture links as they were written."""
    parts = re.split(r"(```.*?(?:```|\Z)|`[^`\n]*`)", text, flags=re.DOTALL)  # code: every second
    parts[::2] = [p.replace("<", "&lt;").replace("![", "!&#91;") for p in parts[::2]]
    return "".join(parts)


def _thumbnail(picture: Picture) -> dict:
    small = picture.rgb.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    path = save_pil_to_cache(small, get_upload_folder(), "picture")
    return {"path": path, "alt_text": "Your picture"}
