"""A language model of a published size with random weights, as a GGUF file: for speed and memory
where the weights themselves are not available."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from torch import nn

from minigpt4.config import get_model
from minigpt4.engine.native import quantize
from minigpt4.model.minigpt4 import MiniGPT4
from minigpt4.weights.convert import kind_of
from minigpt4.weights.gguf import BLOCKS, BlockLlama, shapes_of, write_index

# The published config.json files.
SIZES: dict[str, dict[str, int]] = {
    "vicuna-7b": {"hidden": 4096, "layers": 32, "heads": 32, "inner": 11008, "vocabulary": 32001},
    "vicuna-13b": {"hidden": 5120, "layers": 40, "heads": 40, "inner": 13824, "vocabulary": 32001},
    "llama2-7b": {"hidden": 4096, "layers": 32, "heads": 32, "inner": 11008, "vocabulary": 32000},
}
POOL = 2**22  # numbers that are quantized; a tensor's blocks are drawn from them
DEVIATION = 0.02


def write(model: str, layers: int | None, folder: Path) -> Path:
    """The GGUF file, with the index beside it that `BlockLlama` opens.

    layers: as many as the published model has, by default. The kinds of blocks are those that
    converting the published weights gives.
    """
    sizes = SIZES[model]
    layers = layers or sizes["layers"]
    shapes = _shapes(sizes, layers)
    path = folder / f"{model}-random-{layers}.gguf"
    writer = GGUFWriter(path, "llama")
    _describe(writer, model, sizes, layers)
    kinds = {name: kind_of(name, shape, layers) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if kinds[name] == "F32":
            writer.add_tensor_info(name, shape, np.dtype(np.float32), shape[0] * 4)
            continue
        numbers, size = BLOCKS[kinds[name]]
        row = shape[1] // numbers * size
        kind = GGMLQuantizationType[kinds[name]]
        writer.add_tensor_info(name, (shape[0], row), np.dtype(np.uint8), shape[0] * row, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    draw = np.random.default_rng(0)
    pools = {kind: _pool(kind, draw) for kind in set(kinds.values()) - {"F32"}}
    for name, shape in shapes.items():
        if kinds[name] == "F32":
            writer.write_tensor_data(np.ones(shape, np.float32))
        else:
            count = shape[0] * shape[1] // BLOCKS[kinds[name]][0]
            pool = pools[kinds[name]]
            first = int(draw.integers(len(pool)))
            chosen = np.resize(np.roll(pool, -first, axis=0), (count, pool.shape[1]))
            writer.write_tensor_data(chosen.reshape(shape[0], -1))
    writer.close()
    write_index(path)
    return path


def open_model(model: str, path: Path) -> MiniGPT4:
    """The file's language model alone: there is no encoder, and no tokenizer."""
    llm = BlockLlama.open(path.parent)
    config = replace(get_model(model), llm_hidden_size=llm.hidden_size)
    projection = nn.Linear(1, 1, dtype=torch.float32)
    return MiniGPT4(config, nn.Identity(), nn.Identity(), projection, llm, None, "int4")


def _shapes(sizes: Mapping[str, int], layers: int) -> dict[str, tuple[int, ...]]:
    optional, required = shapes_of(
        hidden_size=sizes["hidden"],
        layers=layers,
        heads=sizes["heads"],
        kv_heads=sizes["heads"],
        intermediate_size=sizes["inner"],
        vocabulary=sizes["vocabulary"],
        head_dim=sizes["hidden"] // sizes["heads"],
    )
    outer = {name: optional[name] for name in ("token_embd.weight", "output.weight")}
    return {**outer, **required}


def _describe(writer: GGUFWriter, model: str, sizes: Mapping[str, int], layers: int) -> None:
    """What llama.cpp wants to know of it; the vocabulary is made up."""
    writer.add_name(f"{model}, random")
    writer.add_context_length(get_model(model).context)
    writer.add_embedding_length(sizes["hidden"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(sizes["inner"])
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(sizes["hidden"] // sizes["heads"])
    count = sizes["vocabulary"]
    tokens: list[Any] = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += [f"\u2581{i}" for i in range(len(tokens), count)]
    writer.add_vocab_size(count)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(count)])
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (count - 259)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _pool(kind: str, draw: np.random.Generator) -> np.ndarray:
    """Blocks [count, bytes] of normal numbers."""
    numbers = draw.normal(0, DEVIATION, (POOL // 4096, 4096)).astype(np.float32)
    return quantize(kind, numbers).reshape(-1, BLOCKS[kind][1])
