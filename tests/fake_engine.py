"""An engine without a model: what it answers depends on the question alone, a word at a time."""

import asyncio
import threading
import time
from types import SimpleNamespace

import numpy as np

from minigpt4.config import MODELS
from minigpt4.engine import Stats
from minigpt4.errors import UserError
from minigpt4.model.image import Detection, Encoded
from minigpt4.model.prompt import ImageRef

WEBSITE = """Here it is.

```html
<!doctype html>
<html lang="en"><head><title>Jokes</title>
<style>body { font: 1.1rem system-ui; background: #fff8e7; color: #333; padding: 2rem }
button { font: inherit; padding: .6rem 1rem; border-radius: .5rem; border: 0; background: teal;
color: white }</style></head>
<body><h1>My Joke Website</h1><p>Why did the chicken cross the road?</p>
<button onclick="answer.hidden = false">Show the answer</button>
<p id="answer" hidden>To get to the other side!</p>
<script>
try { parent.document.title = "taken"; } catch (error) { document.title = "kept out"; }
fetch("/config").catch(() => document.body.dataset.fetch = "refused");
new Image().src = "http://192.0.2.1/spy.png";
</script></body></html>
```
"""
RUN = "window.stolen=1"
SPY = "http://192.0.2.1/spy"
# Each must be shown as it was written, or as a harmless word.
ATTACKS = [
    f"<script>{RUN}</script> <svg onload={RUN}> <img src=x onerror={RUN}> <iframe src={SPY}>",
    f"[click](javascript:{RUN}) [more](JaVaScRiPt&colon;{RUN}) <javascript:{RUN}> [d](data:,x)",
    f"![x]({SPY}.png) ![y][1] and [![z]({SPY}.png)]({SPY})\n\n[1]: {SPY}-reference.png",
    f"a \\`<img src={SPY}.png onerror={RUN}>\\` b `` c ` <img src={SPY}.png> ` d ``",
    f"text ```\n<img src={SPY}.png>\n\nand    ```\n\n<details open ontoggle={RUN}>x</details>",
    f"$\\href{{javascript:{RUN}}}{{x}}$ $\\includegraphics{{{SPY}.png}}$ $<img src={SPY}.png>$",
    f"<style>@import '{SPY}.css'</style><link rel=stylesheet href={SPY}.css><base href={SPY}>"
    f"<form action={SPY}><button formaction=javascript:{RUN}>Send</button></form>",
    f"| a | b |\n|---|---|\n| <img src={SPY}.png> | [x](vbscript:{RUN}) |\n\n> <object data={SPY}>",
]
FORMULAS = r"A circle of $r = 2$ has the area $\pi r^2$. It costs $5 or $10. \(a_1\) `$x$`"
CAPTION = "A red house beside a lake."
OBJECTS = (Detection("boat", 0.4, 0.65, 0.6, 0.85, 0.9),)
LONG = " ".join(f"word{i}" for i in range(1, 400))
STORY = (
    "The red house stands by the lake, and a small boat waits in front of it. Behind the house "
    "there are **green hills**, and a tall tree gives shade in the summer afternoon."
)


class FakeEngine:
    """Answers as `answer_to` says. name: of its model; pictures: the keys it encoded; asked: every
    conversation; ahead: how many others wait before a question, as long as there are any; full: it
    takes none; failure: what it says when it fails, if not the usual."""

    def __init__(self, word_seconds: float = 0.01, name: str = "nano") -> None:
        config = MODELS[name]
        self.model = SimpleNamespace(config=config, quantize="none", device="cpu")
        self.decoder_name = "PyTorch"
        self.word_seconds = word_seconds
        self.pictures: list[str] = []
        self.asked: list = []
        self.samplings: list = []
        self.ahead = 0
        self.full = False
        self.failure = ""
        self.closed = False
        self.running = self.waiting = 0

    def encode(self, picture) -> Encoded:
        self.pictures.append(picture.key)
        found = OBJECTS if self.model.config.detects else ()
        return Encoded(np.zeros((1, 1), np.float32), "", found)

    def close(self) -> None:
        self.closed = True


def text_of(message) -> str:
    return " ".join(p for p in message.parts if isinstance(p, str))


def answer_to(conversation, asked: int) -> str:
    question = text_of([m for m in conversation.messages if m.role == "user"][-1]).lower()
    pictures = sum(isinstance(p, ImageRef) for m in conversation.messages for p in m.parts)
    if "hostile" in question:
        return ATTACKS[int(question.split()[-1])]
    if "briefly" in question:
        return CAPTION
    if "formula" in question:
        return FORMULAS
    if "website" in question:
        return WEBSITE
    if "long" in question:
        return LONG
    if "count" in question:
        return f"I see {pictures} pictures."
    if "attack" in question:
        return "<img src=x onerror='window.stolen=1'><script>window.stolen=1</script> ![x](http://192.0.2.1/a.png)"
    if "again" in question:
        return f"This is answer number {asked}."
    return STORY


class FakeAnswer:
    """As chat.Answer: pieces of text, how it ended, what it took."""

    def __init__(self, engine: FakeEngine, conversation, sampling) -> None:
        if engine.full:
            raise UserError("Too many people are waiting: try again in a minute.")
        captioning = text_of(conversation.messages[-1]) == engine.model.config.short_instruction
        if not captioning:
            engine.asked.append(conversation)
            engine.samplings.append(sampling)
        self._engine, self._limit = engine, sampling.max_new_tokens
        self._closed = threading.Event()
        self.text, self.stop_reason, self.notice, self.dropped_turns = "", "", "", 0
        self.stats = Stats(prompt_tokens=64, reused_tokens=40 if len(engine.asked) > 1 else 0)
        last = conversation.messages[-1]
        question = text_of(conversation.messages[-1]).lower()
        if "forget" in question:
            self.dropped_turns = 1
            self.notice = "The oldest turn was left out."
        self._fails = "fail" in question
        self._words = answer_to(conversation, len(engine.asked)).split(" ")
        if last.role == "assistant":
            self._words = ["", *self._words[len(text_of(last).split(" ")) :]]

    @property
    def position(self) -> int:
        return self._engine.ahead

    def __iter__(self):
        start = time.perf_counter()
        while self.position and not self._closed.wait(0.02):
            pass
        if self._fails:
            raise UserError(
                self._engine.failure or "The model ran out of memory: ask something shorter."
            )
        for i, word in enumerate(self._words):
            if self._closed.wait(self._engine.word_seconds) or self.stop_reason:
                break
            piece = word if i == 0 else " " + word
            self.text += piece
            self.stats.tokens += bool(word)
            if self.stats.tokens == self._limit:
                self.stop_reason = "length"
            yield piece
        self.stop_reason = self.stop_reason or ("closed" if self._closed.is_set() else "stop")
        self.stats.seconds_to_first = 0.15
        self.stats.seconds = 0.15 + time.perf_counter() - start

    async def __aiter__(self):
        pieces = iter(self)
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            yield piece

    def close(self) -> None:
        self._closed.set()
        self.stop_reason = self.stop_reason or "closed"
