"""First look: while the visitor types, the model writes a short caption of each new picture."""

import asyncio
import logging
from typing import TYPE_CHECKING

from minigpt4.conversation import Conversation
from minigpt4.errors import UserError
from minigpt4.model.image import Picture
from minigpt4.web.page import looks
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.session import Session, start
from minigpt4.web.page.titles import first_sentence

if TYPE_CHECKING:
    from minigpt4.engine import AnyEngine

CAPTION_TOKENS = 24
CAPTION_SECONDS = 20.0

log = logging.getLogger(__name__)


class FirstLook:
    """The page's handler that has new pictures captioned while the visitor types."""

    def __init__(self, loading: Loading) -> None:
        self._loading = loading

    async def caption(self, value: dict, session: Session) -> dict[str, str]:
        """The captions of the pictures in the box, by their paths.

        Only where the model is small, and only while it has nothing else to do.
        """
        captions = {}
        for path in value["files"]:
            picture = session.uploads.get(path)
            if picture is None:
                continue
            if not looks.find(picture.key).caption:
                await self._look_at(picture, session)
            captions[path] = looks.find(picture.key).caption
        return captions

    async def _look_at(self, picture: Picture, session: Session) -> None:
        engine = self._loading.find(session.model)
        if engine is None or not engine.model.config.small or session.busy:
            return
        if engine.running or engine.waiting:
            return
        try:
            async with asyncio.timeout(CAPTION_SECONDS):
                if caption := await _caption(engine, picture, session):
                    looks.note(picture.key, caption=caption)
        except (UserError, TimeoutError):  # the queue is full, or the machine is slow
            return
        except Exception:
            log.exception("while captioning a picture")


async def _caption(engine: "AnyEngine", picture: Picture, session: Session) -> str:
    """One sentence; "" where somebody asked something meanwhile."""
    from minigpt4.engine import Sampling

    conversation = Conversation()
    conversation.add_question(engine.model.config.short_instruction, [picture])
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
