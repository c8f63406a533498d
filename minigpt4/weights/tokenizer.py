"""The language model's tokenizer, from its folder; it must read text as it was trained to."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.errors import UserError
from minigpt4.model.text import JsonTokenizer
from minigpt4.weights.gguf import INDEX

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

# Texts that the conversions of 2023 get wrong: prefixes, spaces, line ends, bytes, other scripts.
PROBES = (
    "Hello world",
    "###Human: what is it? ###Assistant:",
    "two  spaces\n\nand lines\t1234",
    "Grüße, 東京 \U0001f600",
)
_ROLES = ("bos", "eos", "unk")


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer.

    If tokenizer.model exists, the class is Llama's, whatever tokenizer_config.json says, and
    `PROBES` must get SentencePiece's ids. UserError if they do not; other errors are the libraries'
    own.
    """
    if (folder / INDEX).exists():
        return JsonTokenizer(folder)
    from transformers import AutoTokenizer, LlamaTokenizer

    options = {"local_files_only": True, "trust_remote_code": False}
    pieces = _pieces(folder / "tokenizer.model")
    if pieces is None:
        return AutoTokenizer.from_pretrained(folder, **options)
    try:
        tokenizer = LlamaTokenizer.from_pretrained(folder, **options, **_names(folder, pieces))
    except Exception as error:  # anything, for damaged files
        raise UserError(_refusal(folder)) from error
    _check(tokenizer, pieces, folder)
    return tokenizer


def _pieces(path: Path) -> "SentencePieceProcessor | None":
    """The SentencePiece model; None if there is none, as with Llama 3's tokenizer.model."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(str(path)) if path.is_file() else None
    except (RuntimeError, OSError) as error:
        if (path.parent / "tokenizer.json").is_file():
            return None
        raise UserError(
            f"{path} is damaged or not a SentencePiece model: delete it, then fetch it again."
        ) from error


def _names(folder: Path, pieces: "SentencePieceProcessor") -> dict[str, str]:
    """The names of special tokens that the folder's files leave empty, from tokenizer.model."""
    given: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8-sig"))
            given |= {k: v for k, v in content.items() if v}
        except (OSError, ValueError, AttributeError):
            continue
    ids = {role: getattr(pieces, f"{role}_id")() for role in _ROLES}
    return {
        f"{role}_token": pieces.id_to_piece(number)
        for role, number in ids.items()
        if number >= 0 and not given.get(f"{role}_token")
    }


def _check(tokenizer: Any, pieces: "SentencePieceProcessor", folder: Path) -> None:
    """UserError if its ids are not SentencePiece's, or if it has no special tokens."""
    same = all(
        tokenizer.encode(text, add_special_tokens=False) == pieces.encode(text) for text in PROBES
    )
    if not same or tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(_refusal(folder))


def check_tokens(tokenizer: Any, rows: int, folder: Path) -> None:
    """UserError if text may become ids beyond the `rows` of the token embedding. Control tokens
    beyond, such as one for padding, are allowed: no text becomes them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return
    added = backend.get_added_tokens_decoder().items()
    ids = [number for number, token in added if not token.special]
    ids += [tokenizer.bos_token_id or 0, tokenizer.eos_token_id or 0]
    ids += [backend.get_vocab_size(with_added_tokens=False) - 1]
    if max(ids) >= rows:
        raise UserError(
            f"The tokenizer in {folder} has {max(ids) + 1:,} tokens, but the language model's "
            f"embedding has {rows:,}: copy the tokenizer from where the weights come from."
        )


def _refusal(folder: Path) -> str:
    return (
        f"The tokenizer in {folder} does not split text as its tokenizer.model does: delete its "
        "tokenizer.json, tokenizer_config.json and special_tokens_map.json, or fetch the folder "
        "again."
    )
