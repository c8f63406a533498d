"""Is a folder the language model that a projection was trained with? What can be recognised of the
usual mistakes is said in one sentence: no tokenizer, missing shards, delta weights, another Vicuna.
"""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.config import ModelConfig
from minigpt4.errors import UserError
from minigpt4.model import prompt
from minigpt4.model.tokenizer import JsonTokenizer
from minigpt4.weights.gguf import INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

# Vicuna v0 added one token, for padding, to LLaMA's; later versions did not.
VICUNA_V0_VOCABULARY, LLAMA_VOCABULARY = 32_001, 32_000
# A delta is what training changed: its embeddings are a hundred times smaller than a model's, and
# its last norm lies around 0, not 1 and above.
DELTA_EMBEDDING_STD, DELTA_NORM = 0.003, 0.1


def check_folder(folder: Path, config: ModelConfig) -> None:
    """UserError where files are missing; a warning where it looks like another model."""
    fetch = f"fetch the folder whole: “python -m minigpt4 download {config.name}”"
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no language model folder (config.json is missing): {fetch}.")
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise UserError(
            f"{folder} has no tokenizer (tokenizer.model or tokenizer.json): copy it from where "
            f"the weights come from, or {fetch}."
        )
    if missing := missing_weights(folder):
        raise UserError(f"{folder} is incomplete ({missing} is missing): {fetch}.")
    try:
        vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    except (ValueError, KeyError, OSError):
        return  # whoever loads the folder will say so
    names = {
        VICUNA_V0_VOCABULARY: "Vicuna v0",
        LLAMA_VOCABULARY: "LLaMA, Llama-2 and Vicuna since v1.1",
    }
    wanted = VICUNA_V0_VOCABULARY if config.template is prompt.VICUNA else LLAMA_VOCABULARY
    if vocabulary in names and vocabulary != wanted:
        log.warning(
            f"{folder} has {vocabulary:,} words, as {names[vocabulary]} have, but {config.name}'s "
            f"projection was trained with {names[wanted]}, which has {wanted:,}: expect poor "
            "answers, or give the right one with “--llm”."
        )


def missing_weights(folder: Path) -> str:
    """The name of a weight file that is missing; "" where none is."""
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).is_file():
            try:
                text = (folder / index).read_text(encoding="utf-8")
                shards = sorted({*json.loads(text)["weight_map"].values()})
            except (ValueError, KeyError, AttributeError):
                return index
            missing = [name for name in shards if not (folder / name).is_file()]
            if not missing:
                return ""
            lost = missing[0]
            break
    else:
        lost = "model.safetensors or pytorch_model.bin"
    whole = ("model.safetensors", "pytorch_model.bin")
    return "" if any((folder / name).is_file() for name in whole) else lost


def is_complete(folder: Path) -> bool:
    """Are all the files there?"""
    tokenizer = any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json"))
    return tokenizer and (folder / "config.json").is_file() and not missing_weights(folder)


def check_is_no_delta(llm: "PreTrainedModel", folder: Path, config: ModelConfig) -> None:
    """UserError where the loaded weights are the difference between Vicuna's and LLaMA's."""
    spread = llm.get_input_embeddings().weight[:LLAMA_VOCABULARY].float().std().item()
    norm = llm.get_decoder().norm.weight.float().mean().abs().item()
    if spread < DELTA_EMBEDDING_STD and norm < DELTA_NORM:
        raise UserError(
            f"{folder} holds Vicuna's delta weights, which are to be added to LLaMA's, not a whole "
            f"model: add them first (FastChat's apply_delta), or run “python -m minigpt4 download "
            f"{config.name}”."
        )


def load_tokenizer(folder: Path):
    """The folder's tokenizer; what is wrong with it is raised as the libraries raise it."""
    if (folder / INDEX).exists():
        return JsonTokenizer(folder)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
