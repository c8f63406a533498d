"""A tokenizer.json, read by the tokenizers library alone: transformers takes seconds to import."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer


class JsonTokenizer:
    """What this project uses of a Hugging Face tokenizer, with the same results; text is plain.

    folder: holds tokenizer.json, and tokenizer_config.json with the names of the special tokens.
    OSError, ValueError or KeyError where these are missing or damaged.
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
        """Token ids of plain text: nothing in it is ever a control token, and none is added."""
        if add_special_tokens or not split_special_tokens:
            raise NotImplementedError("control tokens are written by `prompt`, by their names")
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def convert_tokens_to_ids(self, token: str) -> int:
        """The id of one token; KeyError where there is none."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise KeyError(token)
        return found
