"""Adapters (LoRA): trained low-rank matrices that are added to those of a frozen language model.

They are in the projection's file, since both are trained together: two tensors for each adapted
matrix W, under the PEFT library's names: A [rank, columns] and B [rows, rank]. The model computes
with W + B·A; B includes PEFT's factor lora_alpha / rank. The language model's own file does not
change: the sum is computed whenever the model is loaded.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np
from torch import Tensor, nn

from minigpt4.config import ModelConfig
from minigpt4.errors import UserError
from minigpt4.weights.checkpoint import read_checkpoint, read_projection
from minigpt4.weights.gguf import LAYER_NAMES, BlockLlama, BlockTensor, Quantizer, neighbours
from minigpt4.weights.llm import TokenEmbedding

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")  # of a layer's attention
_NAME = re.compile(r"\.layers\.(\d+)\.self_attn\.(\w+)\.lora_([AB])\.(?:default\.)?weight$")

Adapter = tuple[Tensor, Tensor]  # A, B
Adapters = dict[tuple[int, str], Adapter]  # (layer, matrix) -> its adapter


def read_adapters(path: str | Path) -> Adapters:
    """The adapters in a projection's file, none or many. UserError if one is incomplete."""
    halves: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, tensor in read_checkpoint(path).items():
        if ".lora_" not in name:
            continue
        found = _NAME.search(name)
        if not found or found[2] not in MATRICES or tensor.ndim != 2:
            raise UserError(f"{path} holds an adapter “{name}”, which is not supported.")
        if not tensor.isfinite().all():
            raise UserError(f"{path} holds numbers that are not finite: give another file.")
        halves.setdefault((int(found[1]), found[2]), {})[found[3]] = tensor.float()
    for (layer, matrix), half in halves.items():
        if half.keys() != {"A", "B"} or len(half["A"]) != half["B"].shape[1]:
            raise UserError(
                f"{path} is incomplete: both halves of {matrix} in layer {layer} are needed."
            )
    return {place: (half["A"], half["B"]) for place, half in halves.items()}


def named(adapters: Mapping[tuple[int, str], Adapter]) -> dict[str, Tensor]:
    """The adapters' tensors for a projection's file, in 16 bit."""
    return {
        f"base_model.model.model.layers.{layer}.self_attn.{matrix}.lora_{half}.weight": t.half()
        for (layer, matrix), halves in adapters.items()
        for half, t in zip("AB", halves, strict=True)
    }


def trained_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors that are read from a projection's file: the projection and any adapters."""
    return read_projection(path) | named(read_adapters(path))


def adapted(
    llm: Union["PreTrainedModel", BlockLlama],
    path: Path,
    config: ModelConfig,
    quantize: Quantizer | None = None,
) -> Union["PreTrainedModel", BlockLlama]:
    """The language model with the adapters in a projection's file, if any. UserError if they do
    not fit.

    quantize: makes a BlockLlama's new blocks; by default the gguf library does, more slowly.
    """
    adapters = read_adapters(path)
    if not adapters:
        return llm
    if not config.adapter_rank:
        raise UserError(
            f"{path} holds adapters for a language model, and {config.name} takes none: give "
            "another file with “--projection”."
        )
    if isinstance(llm, TokenEmbedding):
        raise UserError(
            f"{path} holds adapters, which a language model on other machines does not have: give "
            "a file without them with “--projection”, or leave out “--llm-url”."
        )
    try:
        if isinstance(llm, BlockLlama):
            return _adapted_blocks(llm, adapters, quantize or _quantize)
        for (layer, matrix), (a, b) in adapters.items():
            linear = getattr(llm.get_decoder().layers[layer].self_attn, matrix)
            if type(linear) is not nn.Linear:
                raise UserError(
                    "Adapters cannot be added to a language model that is quantized here: choose "
                    "“--quantize none”, or “--quantize int4” on the CPU."
                )
            linear.weight.data = (linear.weight + (b @ a).to(linear.weight.device)).to(
                linear.weight.dtype
            )
        return llm
    except (IndexError, KeyError, RuntimeError, ValueError) as error:
        raise UserError(
            f"The adapters in {path} are another language model's: give another file with "
            "“--projection”."
        ) from error


def _quantize(kind: str, numbers: np.ndarray) -> np.ndarray:
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    return quantize(numbers, GGMLQuantizationType[kind])


def _adapted_blocks(llm: BlockLlama, adapters: Adapters, quantize: Quantizer) -> BlockLlama:
    """The sums, in 8 bit: adapters change a weight by less than a step of 4 bits."""
    tensors = dict(llm.tensors)
    for (layer, matrix), (a, b) in adapters.items():
        name = f"blk.{layer}.{LAYER_NAMES[f'self_attn.{matrix}']}.weight"
        change = (b @ a).numpy()
        if not llm.rope_halves and matrix in ("q_proj", "k_proj"):
            change = neighbours(change, llm.head_dim)
        weights = tensors[name].numbers() + change
        blocks = quantize("Q8_0", weights.astype(np.float32, copy=False))
        tensors[name] = BlockTensor("Q8_0", weights.shape, blocks)
    return replace(llm, tensors=tensors)
