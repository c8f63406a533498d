"""Token ids -> pieces of text to show: whole characters, nothing of a stop string. No torch."""

from collections.abc import Callable, Sequence


class TextStream:
    """Turns ids into text as they come.

    A piece is held back while it ends in half a character or in what may become a stop string, so
    what has been shown never has to be taken back. `ended` is true once a stop string was found.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(s for s in stop if s)
        self._ids: list[int] = []
        self._read = 0  # ids whose text has been taken
        self._start = 0  # ids before the ones being read, decoded along for the spaces between
        self._held = ""
        self.ended = False

    def push(self, token: int) -> str:
        """The text that can be shown now that `token` has come; may be empty."""
        if self.ended:
            return ""
        self._ids.append(token)
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if text.endswith("\ufffd") or len(text) <= len(known):
            return ""  # half a character: its other bytes are still to come
        self._start, self._read = self._read, len(self._ids)
        return self._release(self._held + text[len(known) :])

    def finish(self) -> str:
        """What is left to show when no more ids come; half a character is dropped."""
        if self.ended:
            return ""
        known = self._decode(self._ids[self._start : self._read])
        text = self._held + self._decode(self._ids[self._start :])[len(known) :]
        self._held = ""
        self.ended = True
        found = [text.index(s) for s in self._stop if s in text]
        return text[: min(found)] if found else text.rstrip("\ufffd")

    def _release(self, text: str) -> str:
        found = [text.index(s) for s in self._stop if s in text]
        if found:
            self.ended = True
            self._held = ""
            return text[: min(found)]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
