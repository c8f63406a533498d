"""Pictures on their way through the visual encoder, and the embeddings of those that were there.

Kept under the picture's content: what one person uploads is encoded for everybody.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from minigpt4.errors import UserError
from minigpt4.model.image import Picture

if TYPE_CHECKING:
    from minigpt4.model.minigpt4 import MiniGPT4

KEPT = 256  # most recently used: 60 KB each for nano

log = logging.getLogger(__name__)


class Pictures:
    """Not safe for threads: whoever uses it holds the engine's lock, but for `encode`.

    explain: an exception of the encoder -> what people are told.
    """

    def __init__(self, model: "MiniGPT4", explain: Callable[[Exception], UserError]) -> None:
        self._model, self._explain = model, explain
        self._uploads: OrderedDict[str, tuple[Picture, Future]] = OrderedDict()
        self._embeds: OrderedDict[str, np.ndarray] = OrderedDict()

    @property
    def waiting(self) -> bool:
        """Is there anything to encode?"""
        return bool(self._uploads)

    def find(self, key: str) -> np.ndarray | None:
        """The embeddings [image_tokens, llm_hidden_size] of a picture that was encoded."""
        if key in self._embeds:
            self._embeds.move_to_end(key)
        return self._embeds.get(key)

    def want(self, picture: Picture) -> Future:
        """Have a picture encoded soon; its embeddings or the UserError come in the future."""
        return self._uploads.setdefault(picture.key, (picture, Future()))[1]

    def next(self, count: int) -> list[Picture]:
        """The pictures that have waited longest."""
        return [self._uploads[key][0] for key in list(self._uploads)[:count]]

    def encode(self, pictures: list[Picture]) -> list[np.ndarray | UserError]:
        """All together; where that fails, one by one, so that one bad picture fails alone."""
        try:
            return self._embed(pictures)
        except Exception:
            return [self._encode_alone(p) for p in pictures]

    def _embed(self, pictures: list[Picture]) -> list[np.ndarray]:
        """ArithmeticError where the encoder gives no numbers, which nobody shall be answered by."""
        outcomes = list(self._model.embed_pictures([p.rgb for p in pictures]))
        if not all(np.isfinite(embeds).all() for embeds in outcomes):
            raise ArithmeticError("the encoder's embeddings are no numbers")
        return outcomes

    def _encode_alone(self, picture: Picture) -> np.ndarray | UserError:
        try:
            return self._embed([picture])[0]
        except Exception as error:
            log.exception("while encoding a picture")
            return self._explain(error)

    def note(self, picture: Picture, outcome: np.ndarray | UserError) -> None:
        """Keep what `encode` gave, and tell whoever waits for it."""
        _, future = self._uploads.pop(picture.key, (picture, Future()))
        if isinstance(outcome, UserError):
            future.set_exception(outcome)
            return
        self._embeds[picture.key] = outcome
        future.set_result(outcome)
        while len(self._embeds) > KEPT:
            self._embeds.popitem(last=False)

    def fail_all(self, error: UserError) -> None:
        """Nothing that waits will be encoded."""
        while self._uploads:
            self._uploads.popitem()[1][1].set_exception(error)
