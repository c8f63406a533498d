"""A language model's Hugging Face folder: its configuration, its weight files and their tensors."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from minigpt4.config import ModelConfig
from minigpt4.errors import Count, UserError, ignore
from minigpt4.weights.checkpoint import forget, tensors_of
from minigpt4.weights.gguf import INDEX, INT4, gguf_of

# The name of a single weight file; with “.index.json” added, that of an index of shards.
WHOLE = ("model.safetensors", "pytorch_model.bin")
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"  # a Llama's first and last
HEAD = "lm_head.weight"  # if it is not the embedding
_TYPES = ("llama", "qwen2", "mistral")  # types of models that are computed alike
LLAMA_VOCABULARY = 32_000
# Vicuna v0 added one token, for padding, to LLaMA's; later versions did not.
_KNOWN = {32_001: "Vicuna v0", LLAMA_VOCABULARY: "LLaMA, Llama-2 and Vicuna since v1.1"}
# A delta is the difference that training made: its embeddings are a hundred times smaller than a
# model's, and its last norm is around 0, not 1 and above.
DELTA_EMBEDDING_STD, DELTA_NORM = 0.003, 0.1

log = logging.getLogger(__name__)


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. OSError or ValueError if it cannot be read."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def read_index(index: Path) -> dict[str, str]:
    """Tensor's name -> name of its file, without a folder, according to an index of shards. OSError
    or ValueError if it cannot be read."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: Path(file).name for name, file in places.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index.name} is damaged") from error


def shards_of(folder: Path) -> list[Path]:
    """The files that hold the folder's weights; safetensors first. ValueError for a damaged index.

    If neither form is complete: the files that an index names, or none.
    """
    found: list[Path] = []
    for whole in WHOLE:
        index = folder / f"{whole}.index.json"
        names = sorted({*read_index(index).values()}) if index.is_file() else [whole]
        files = [folder / name for name in names]
        if all(file.is_file() for file in files):
            return files
        found = found or (files if index.is_file() else [])
    return found


def read_tensors(folder: Path, count: Count = ignore) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all the folder's weight files; one tensor is read at a time.

    count: is called with each tensor's bytes after its use. UserError for a damaged file.
    """
    for shard in shards_of(folder):
        for name, tensor in tensors_of(shard, ("",)):
            yield name, tensor
            forget(tensor)
            count(tensor.nbytes)


def read_tensor(folder: Path, name: str) -> Tensor:
    """One tensor; shards that do not hold it may be missing. ValueError if there is none."""
    for shard in filter(Path.is_file, shards_of(folder)):
        for found, tensor in tensors_of(shard, (name,)):
            if found == name:
                return tensor.clone()
    raise ValueError(f"{name} is missing")


def has_own_head(folder: Path) -> bool:
    """Is there a head that differs from the embedding? If so, it is used, as in transformers,
    whatever "tie_word_embeddings" says."""
    try:
        head = read_tensor(folder, HEAD)
    except ValueError:
        return False
    embedding = read_tensor(folder, EMBEDDING)
    return head.dtype != embedding.dtype or not head.equal(embedding)


# --- is it complete, and the right one? -----------------------------------------------------------


def check_folder(folder: Path, config: ModelConfig) -> None:
    """UserError if files are missing, or hold a type of model that is not supported."""
    fetch = (
        f"move it away and fetch the whole folder with “python -m minigpt4 download {config.name}”"
    )
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} is not a language model's folder (config.json is missing): {fetch}."
        )
    if not _has_tokenizer(folder):
        raise UserError(
            f"{folder} has no tokenizer (tokenizer.model or tokenizer.json): copy it from where "
            f"the weights come from, or {fetch}."
        )
    if (missing := missing_weights(folder)) and (folder / INT4 / INDEX).is_file():
        raise UserError(
            f"{folder} holds its 4-bit model alone, since its 16-bit files were deleted: choose "
            f"“--device cpu --quantize int4”, or {fetch}."
        )
    if missing:
        raise UserError(f"{folder} is incomplete ({missing} is missing): {fetch}.")
    check_type(folder, config)


def check_type(folder: Path, config: ModelConfig) -> None:
    """UserError if config.json cannot be read, or is that of a model that is not computed as a
    Llama and would answer nonsense."""
    try:
        settings = read_config(folder)
        kind = settings["model_type"]
        known, windowed = kind in _TYPES, kind == "mistral" or settings.get("use_sliding_window")
        window = settings.get("sliding_window", 4096) if windowed else None
        narrow = window is not None and window < config.context
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{folder / 'config.json'} is damaged, or not a language model's: move the "
            "folder away and fetch it again."
        ) from error
    if not known:
        raise UserError(
            f"{folder} holds a model of the type “{kind}”, which is not supported: give one of "
            f"the type {', '.join(_TYPES[:-1])} or {_TYPES[-1]}."
        )
    if narrow:
        raise UserError(
            f"{folder} holds a model that looks back {window:,} tokens (“sliding_window”), but "
            f"{config.name} needs {config.context:,}: give one without a sliding window."
        )


def check_shards(folder: Path) -> None:
    """UserError if a weight file's header shows that it is damaged."""
    for shard in shards_of(folder):
        next(tensors_of(shard, ("no tensor",)), None)


def check_shape(shape: Sequence[int], folder: Path, config: ModelConfig) -> None:
    """UserError if the token embedding [vocabulary, hidden_size] has another width than the
    model's; a warning if it has another vocabulary."""
    vocabulary, width = shape[0], shape[-1]
    if width != config.llm_hidden_size:
        raise UserError(
            f"{folder} holds a language model of width {width}, but {config.name} needs "
            f"{config.llm_hidden_size}: give the right folder or another “--model”."
        )
    if config.llm_vocabulary not in (0, vocabulary):
        found, trained = (
            f"{number:,} tokens" + (f" ({_KNOWN[number]})" if number in _KNOWN else "")
            for number in (vocabulary, config.llm_vocabulary)
        )
        log.warning(
            f"{folder} has a vocabulary of {found}, but {config.name}'s projection was trained "
            f"with {trained}: expect poor answers, or give the right one with “--llm”."
        )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))


def missing_weights(folder: Path, blocks: bool = True) -> str:
    """The name of a missing weight file; "" if the weights are complete.

    blocks: a GGUF file with its index counts as complete, too.
    """
    if blocks and (folder / INDEX).is_file():
        file = gguf_of(folder)
        return "" if file.is_file() else file.name
    try:
        files = shards_of(folder)
    except ValueError:
        return "a readable index of the shards"
    if not files:
        return "model.safetensors or pytorch_model.bin"
    return next((file.name for file in files if not file.is_file()), "")


def is_complete(folder: Path) -> bool:
    """Does the folder hold a configuration, a tokenizer and all weight files?"""
    configured = (folder / "config.json").is_file()
    return configured and _has_tokenizer(folder) and not missing_weights(folder)


def check_is_no_delta(embedding: Tensor, norm: Tensor, folder: Path, config: ModelConfig) -> None:
    """UserError if the weights are the difference between Vicuna's and LLaMA's.

    embedding: [tokens, hidden_size], at least of the first tokens; norm: the last norm's weight.
    """
    spread = embedding[:LLAMA_VOCABULARY].float().std().item()  # without an added token's
    norm_size = norm.float().mean().abs().item()
    if spread < DELTA_EMBEDDING_STD and norm_size < DELTA_NORM:
        raise UserError(
            f"{folder} holds Vicuna's delta weights, which must be added to LLaMA's first: apply "
            "them with FastChat's apply_delta, or run “python -m minigpt4 download "
            f"{config.name}”."
        )
