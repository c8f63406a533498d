"""First looks at a picture, before anyone asks: a short caption, and the places of objects.

They are kept by the picture's content, together with its thumbnail. The page uses them for
alternative texts, titles and outlines.
"""

import asyncio
import logging
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from minigpt4.conversation import Conversation
from minigpt4.errors import UserError
from minigpt4.model.image import Detection, Encoded, Picture
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.session import Session, start

if TYPE_CHECKING:
    from minigpt4.engine import AnyEngine

KEPT = 1000  # pictures
CAPTION_TOKENS = 24
CAPTION_SECONDS = 20.0
LONG = 60  # characters of a sentence
_OPENING = re.compile(
    r"(?:(?:the|this) (?:image|picture|photo|photograph) "
    r"(?:shows|depicts|features|displays|captures|is (?:of|about))|(?:in (?:the|this) "
    r"(?:image|picture|photo|photograph),? )?(?:there (?:is|are)|(?:i|we|you) (?:can )?see))\s+",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[。！？]|\n")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Look:
    """A picture's caption, "" if there is none, and its objects, the surest first.

    objects: None if nobody has looked for them; thumbnail: the path of the picture's small copy,
    which the page may show, "" if there is none.
    """

    caption: str = ""
    objects: tuple[Detection, ...] | None = None
    thumbnail: str = ""


_lock = threading.Lock()  # any thread may look
_kept: OrderedDict[str, Look] = OrderedDict()  # picture's key -> the look, the latest last


def find(key: str) -> Look:
    """The picture's look; an empty one if there is none."""
    with _lock:
        return _kept.get(key, Look())


def note(key: str, **seen: Any) -> None:
    """Set some of the look's fields; the others stay."""
    with _lock:
        _kept[key] = replace(_kept.get(key, Look()), **seen)
        _kept.move_to_end(key)
        while len(_kept) > KEPT:
            _kept.popitem(last=False)


def note_objects(picture: Picture, encoded: Encoded | None) -> None:
    """Keep the objects that the encoder found, if any: another model's encoder may find some."""
    if encoded is not None and encoded.objects:
        note(picture.key, objects=encoded.objects)


def find_objects(engine: "AnyEngine", pictures: Iterable[Picture]) -> None:
    """With a model's detector, look for the objects of pictures that have not been looked at.

    Not for the event loop: pictures that the engine no longer keeps are encoded again.
    """
    for picture in pictures:
        if find(picture.key).objects is None:
            with suppress(UserError):  # the answer reports it
                encoded = engine.encode(picture)
                note(picture.key, objects=encoded.objects if encoded else ())


# --- captions, while the visitor types ------------------------------------------------------------


class FirstLook:
    """Captions new pictures while the visitor types."""

    def __init__(self, loading: Loading) -> None:
        self._loading = loading

    async def caption(self, value: dict, session: Session) -> dict[str, str]:
        """The captions of the pictures in the box, by their paths.

        Only a small model writes them, and only while it is idle.
        """
        captions = {}
        for path in value["files"]:
            picture = session.uploads.get(path)
            if picture is None:
                continue
            if not find(picture.key).caption:
                await self._look_at(picture, session)
            captions[path] = find(picture.key).caption
        return captions

    async def at_conversation(self, session: Session) -> bool:
        """Caption the conversation's pictures that have no caption; returns whether any got one."""
        pictures = session.conversation.pictures.values()
        new = [p for p in pictures if not (find(p.key).caption or p.key in session.captions)]
        for picture in new:
            await self._look_at(picture, session)
        return any(find(picture.key).caption for picture in new)

    async def _look_at(self, picture: Picture, session: Session) -> None:
        engine = self._loading.find(session.model)
        if engine is None or not engine.model.config.small or session.busy:
            return
        if engine.running or engine.waiting:
            return
        try:
            async with asyncio.timeout(CAPTION_SECONDS):
                if caption := await _caption(engine, picture, session):
                    note(picture.key, caption=caption)
        except (UserError, TimeoutError):  # the queue is full, or the machine is slow
            return
        except Exception:
            log.exception("while captioning a picture")


async def _caption(engine: "AnyEngine", picture: Picture, session: Session) -> str:
    """One sentence; "" if somebody asked something meanwhile."""
    from minigpt4.engine import Sampling

    conversation = Conversation.asking(engine.model.config.short_instruction, [picture])
    sampling = Sampling(temperature=0, max_new_tokens=CAPTION_TOKENS)
    answer = await start(engine, conversation, sampling)
    try:
        async for _ in answer:
            if session.busy or engine.waiting or engine.running > 1:
                return ""
            if "\n" in answer.text:
                break
    finally:
        answer.close()
    return first_sentence(answer.text)


def first_sentence(text: str) -> str:
    """The first sentence, without “This image shows”; "…" at the end if it is cut off."""
    text = text.strip()
    end = _SENTENCE_END.search(text)
    sentence = text[: end.start()] if end else text
    if not end and len(text) > LONG:
        sentence = text.rpartition(" ")[0] + "…"
    sentence = _OPENING.sub("", sentence, count=1).strip(' *#-"“')
    return sentence[:1].upper() + sentence[1:]
