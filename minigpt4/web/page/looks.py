"""What the model sees in a picture before anyone asks: a short caption, and where objects are.

Kept by the picture's content for the page's alternative texts, titles and marks.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from minigpt4.errors import UserError
from minigpt4.model.image import Detection, Encoded, Picture

if TYPE_CHECKING:
    from minigpt4.engine import AnyEngine

KEPT = 1000  # pictures


@dataclass(frozen=True)
class Look:
    """A picture's caption, "" where there is none, and its objects, the surest first.

    objects: None where nobody has looked for them.
    """

    caption: str = ""
    objects: tuple[Detection, ...] | None = None


class _Looks:
    """The looks at the pictures seen last, by the picture's key; any thread may call this."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Look] = OrderedDict()

    def find(self, key: str) -> Look:
        """An empty look where there is none."""
        with self._lock:
            return self._kept.get(key, Look())

    def note(self, key: str, **seen: Any) -> None:
        """Add what was seen: Look's fields."""
        with self._lock:
            self._kept[key] = replace(self._kept.get(key, Look()), **seen)
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)


_looks = _Looks()
find, note = _looks.find, _looks.note


def note_objects(picture: Picture, encoded: Encoded | None) -> None:
    """Keep what the encoder found; another model's may find more."""
    if encoded is not None and encoded.objects:
        note(picture.key, objects=encoded.objects)


def find_objects(engine: "AnyEngine | None", pictures: Iterable[Picture]) -> None:
    """Look for the objects of pictures that nobody has looked at, if the model has a detector.

    Not for the event loop: what the engine has forgotten is encoded again.
    """
    if engine is None or not engine.model.config.detects:
        return
    for picture in pictures:
        if find(picture.key).objects is None:
            with suppress(UserError):  # the answer says so
                encoded = engine.encode(picture)
                note(picture.key, objects=encoded.objects if encoded else ())
