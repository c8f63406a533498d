"""Token ids -> text to show: complete characters, without any part of a stop string. No torch."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer


class JsonTokenizer:
    """A tokenizer.json, read by the tokenizers library alone: transformers takes seconds to import.

    It has the methods of a Hugging Face tokenizer that this project uses, with the same results;
    text is always plain. folder: holds tokenizer.json, and tokenizer_config.json with the names of
    the special tokens. OSError, ValueError or KeyError if they are missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        content = (folder / "tokenizer.json").read_text(encoding="utf-8")
        try:
            self._tokenizer = Tokenizer.from_str(content)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError("tokenizer.json cannot be read") from error
        self._tokenizer.encode_special_tokens = True  # a control token's name is plain text
        self.eos_token_id = self.convert_tokens_to_ids(config["eos_token"])
        self.bos_token_id = self.convert_tokens_to_ids(config["bos_token"])

    def encode(
        self, text: str, add_special_tokens: bool = False, split_special_tokens: bool = True
    ) -> list[int]:
        """Token ids of plain text: nothing in it becomes a control token, and none is added."""
        if add_special_tokens or not split_special_tokens:
            raise NotImplementedError("`prompt` writes control tokens, by their names")
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The tokenizers library's tokenizer, under the name that transformers gives it."""
        return self._tokenizer

    def convert_tokens_to_ids(self, token: str) -> int:
        """The id of one token; KeyError if there is none."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise KeyError(token)
        return found


class TextStream:
    """Turns token ids into text as they arrive.

    Text is held back while it ends in half a character or in the beginning of a stop string, so
    that nothing shown has to be taken back. `ended` is true once a stop string was found.

    decode: token ids -> text. stop: strings that end the text; they are not part of it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(s for s in stop if s)
        self._ids: list[int] = []
        self._read = 0  # ids whose text was released or held back
        self._start = 0  # ids from here on are decoded, including some already read: for spaces
        self._held = ""
        self.ended = False

    def push(self, token: int) -> str:
        """The text that can be shown after `token`; may be empty."""
        if self.ended:
            return ""
        self._ids.append(token)
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if text.endswith("\ufffd") or len(text) <= len(known):
            return ""  # half a character: its other bytes are in later tokens
        self._start, self._read = self._read, len(self._ids)
        return self._release(self._held + text[len(known) :])

    def finish(self) -> str:
        """The rest of the text after the last id; half a character is dropped."""
        if self.ended:
            return ""
        known = self._decode(self._ids[self._start : self._read])
        text = self._held + self._decode(self._ids[self._start :])[len(known) :]
        shown = self._before_stop(text)
        self.ended = True
        return text.rstrip("\ufffd") if shown is None else shown

    def _release(self, text: str) -> str:
        shown = self._before_stop(text)
        if shown is not None:
            self.ended = True
            return shown
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _before_stop(self, text: str) -> str | None:
        found = [text.index(s) for s in self._stop if s in text]
        return text[: min(found)] if found else None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
