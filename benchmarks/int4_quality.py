"""Perplexity and next tokens of weights in 4 bit, against the same weights in float32.

`python -m benchmarks.int4_quality FOLDER TEXT...` reads a Hugging Face folder and text files, and
prints one line for each way to quantize. `--ggml libggml-base.so` adds llama.cpp's own quantizer
(the library is in the wheel of pywhispercpp, for example).

The folders at hand were unpacked from 4- to 6-bit files, whose numbers lie on few steps. So each
column of a matrix is first multiplied by a random factor that what comes before it takes back
(RMSNorm's weight, or the rows of another matrix): the model is the same, the steps are gone. Their
rows are too short for blocks of 256 weights, too, which a 7B has: for these ways, zeros are added.
"""

import argparse
import ctypes
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize as round_plainly
from torch import Tensor

from benchmarks.int8_quality import WINDOW, measure
from minigpt4.engine.native import quantize
from minigpt4.weights.convert import kind_of, new_name
from minigpt4.weights.gguf import BLOCKS, BlockTensor
from minigpt4.weights.tokenizer import load_tokenizer

Quantizer = Callable[[str, np.ndarray], np.ndarray]

LOWEST, HIGHEST = 0.7, 1.4  # of the factors


def main() -> None:
    """Quantize and measure in each way; print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--ggml", help="libggml-base.so")
    options = parser.parse_args()
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in options.texts)
    ids = torch.tensor(load_tokenizer(options.folder).encode(text)[: options.tokens])
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    llm = read(options.folder)
    before, _ = measure(llm, windows[:1])
    rescale(llm)
    after, _ = measure(llm, windows[:1])
    if abs(after - before) > 1e-3:
        raise SystemExit(f"rescaling changes the model: {before} became {after}")
    ways: dict[str, tuple[Quantizer, bool]] = {
        "ours": (quantize, False),
        "plain rounding": (rounded, False),
        "ours, blocks of 256": (quantize, True),
    }
    if options.ggml:
        ways["llama.cpp's, blocks of 256"] = (ggml(options.ggml), True)
    loss, likeliest = measure(llm, windows)
    report({"quantized": "float32", "tokens": windows.numel()}, loss)
    weights = {name: tensor.clone() for name, tensor in llm.named_parameters()}
    for name, (quantizer, wide) in ways.items():
        bits = put(llm, weights, quantizer, wide)
        loss, found = measure(llm, windows)
        same = (found == likeliest).float().mean().item()
        report({"quantized": name, "bits": round(bits, 2), "same_likeliest": round(same, 4)}, loss)


def report(line: dict, loss: float) -> None:
    print(json.dumps(line | {"perplexity": round(math.exp(loss), 3)}), flush=True)


def read(folder: Path):
    """The model in float32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return llm.eval().requires_grad_(False)


def rescale(llm) -> None:
    """Multiply the columns of all layers' matrices by random factors, and divide what feeds them.

    Embedding and head, which take 6 bits or more, stay as they are.
    """
    generator = torch.Generator().manual_seed(0)

    def factors(count: int) -> Tensor:
        drawn = torch.rand(count, generator=generator)
        return LOWEST * (HIGHEST / LOWEST) ** drawn

    def feed(norm: Tensor, *matrices: Tensor) -> None:
        f = factors(len(norm))
        norm /= f
        for matrix in matrices:
            matrix *= f

    config = llm.config
    groups = config.num_attention_heads // config.num_key_value_heads
    for layer in llm.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
        feed(layer.input_layernorm.weight, *(linear.weight for linear in qkv))
        feed(layer.post_attention_layernorm.weight, mlp.gate_proj.weight, mlp.up_proj.weight)
        f = factors(len(attention.v_proj.weight))
        attention.v_proj.weight /= f[:, None]
        if attention.v_proj.bias is not None:
            attention.v_proj.bias /= f
        heads = f.view(config.num_key_value_heads, 1, -1).expand(-1, groups, -1)
        attention.o_proj.weight *= heads.flatten()
        f = factors(len(mlp.up_proj.weight))
        mlp.up_proj.weight /= f[:, None]
        mlp.down_proj.weight *= f


# --- ways to quantize -----------------------------------------------------------------------------


def put(llm, weights: dict[str, Tensor], quantizer: Quantizer, wide: bool) -> float:
    """Give the model these weights, quantized as the product's converter does it; bits a weight of
    the layers' matrices. wide: rows are filled up for blocks of 256."""
    layers, sizes, counts = llm.config.num_hidden_layers, 0, 0
    for name, parameter in llm.named_parameters():
        own, numbers = new_name(name) or "", weights[name].numpy()
        if numbers.ndim == 1:
            continue
        columns = numbers.shape[1]
        filled = np.pad(numbers, ((0, 0), (0, -columns % 256 if wide else 0)))
        kind = kind_of(own, filled.shape, layers)
        if quantizer is rounded:
            kind = {"Q4_K": "Q4_1", "Q6_K": "Q8_0"}.get(kind, kind)
        blocks = BlockTensor(kind, filled.shape, quantizer(kind, filled))
        parameter.copy_(torch.from_numpy(blocks.numbers()[:, :columns].copy()))
        if own.startswith("blk."):
            count, size = BLOCKS[kind]
            sizes += 8 * size * numbers.size // count
            counts += numbers.size
    return sizes / counts


def rounded(kind: str, numbers: np.ndarray) -> np.ndarray:
    """By rounding between each block's extremes."""
    return round_plainly(numbers, GGMLQuantizationType[kind])


def ggml(path: str) -> Quantizer:
    """By llama.cpp's library."""
    library = ctypes.CDLL(path)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t

    def quantizer(kind: str, numbers: np.ndarray) -> np.ndarray:
        numbers = np.ascontiguousarray(numbers, np.float32)
        (rows, columns), (weights, size) = numbers.shape, BLOCKS[kind]
        blocks = np.empty((rows, columns // weights * size), np.uint8)
        pointers = ctypes.c_void_p(numbers.ctypes.data), ctypes.c_void_p(blocks.ctypes.data)
        counts = (ctypes.c_int64(n) for n in (0, rows, columns))
        written = library.ggml_quantize_chunk(
            int(GGMLQuantizationType[kind]), *pointers, *counts, None
        )
        if written != blocks.nbytes:
            raise ValueError(f"{written} bytes were written, not {blocks.nbytes}")
        return blocks

    return quantizer


if __name__ == "__main__":
    main()
