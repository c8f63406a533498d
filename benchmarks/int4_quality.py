"""Perplexity and next tokens of weights converted to 4 bit, against the same weights in float32.

`python -m benchmarks.int4_quality FOLDER TEXT...` reads a Hugging Face folder and text files, and
prints one line for each way to quantise: ours (`weights/convert.py`), plain rounding to 4 bits, and
llama.cpp's Q4_K_M where `llama_cpp` is installed.

The folders at hand were unpacked from 4- to 6-bit files, whose numbers lie on few steps. So each
column of a matrix is first multiplied by a random factor that what comes before it takes back
(RMSNorm's weight, or the rows of another matrix): the model is the same, the steps are gone.
"""

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import quantize as round_plainly
from torch import Tensor

from benchmarks.int8_quality import WINDOW, measure
from minigpt4.config import get_model
from minigpt4.engine.native import quantize
from minigpt4.weights import convert
from minigpt4.weights.gguf import BlockLlama
from minigpt4.weights.llm import load_tokenizer

LOWEST, HIGHEST = 0.7, 1.4  # of the factors


def main() -> None:
    """Quantise and measure in each way; print JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=4096)
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
    loss, likeliest = measure(llm, windows)
    report("float32", llm, windows, loss, 1.0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "llm")
        llm.save_pretrained(folder)
        for file in options.folder.glob("tokenizer*"):
            shutil.copy(file, folder)
        for name, make in WAYS.items():
            try:
                blocks = make(folder, Path(scratch, name.replace(" ", "-")))
            except ImportError as error:
                print(json.dumps({"quantised": name, "left out": str(error)}), flush=True)
                continue
            put(llm, blocks)
            loss, found = measure(llm, windows)
            same = (found == likeliest).float().mean().item()
            bits = 8 * sum(t.data.nbytes for t in blocks.tensors.values())
            report(name, llm, windows, loss, same, bits)


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


def report(
    name: str, llm, windows: Tensor, loss: float, same: float, bits: int | None = None
) -> None:
    line: dict = {"quantised": name, "tokens": windows.numel(), "perplexity": math.exp(loss)}
    if bits:
        count = sum(p.numel() for p in llm.parameters())
        line |= {"same_likeliest": round(same, 4), "bits_a_weight": round(bits / count, 2)}
    line["perplexity"] = round(line["perplexity"], 3)
    print(json.dumps(line), flush=True)


# --- ways to quantise -----------------------------------------------------------------------------


def ours(folder: Path, target: Path) -> BlockLlama:
    """As the product converts it."""
    return converted(folder, target, quantize)


def plain(folder: Path, target: Path) -> BlockLlama:
    """Q4_1 and Q8_0 by rounding between each block's extremes."""

    def rounded(kind: str, numbers: np.ndarray) -> np.ndarray:
        return round_plainly(numbers, GGMLQuantizationType[kind])

    def kinds(name: str, shape: tuple[int, ...], layers: int) -> str:
        kind = usual(name, shape, layers)
        return {"Q4_K": "Q4_1", "Q6_K": "Q8_0"}.get(kind, kind)

    usual = convert.kind_of
    return converted(folder, target, rounded, kinds)


def llama_cpp(folder: Path, target: Path) -> BlockLlama:
    """Q4_K_M, by llama.cpp's own quantiser."""
    import llama_cpp as library

    def kinds(name: str, shape: tuple[int, ...], layers: int) -> str:
        return "F32"

    converted(folder, target, quantize, kinds)
    (whole,) = target.glob("*.gguf")
    small = target / "small"
    small.mkdir()
    parameters = library.llama_model_quantize_default_params()
    parameters.ftype = library.LLAMA_FTYPE_MOSTLY_Q4_K_M
    place = str(small / "q4_k_m.gguf").encode()
    if library.llama_model_quantize(str(whole).encode(), place, parameters):
        raise RuntimeError("llama.cpp could not quantise the file")
    convert.write_index(small / "q4_k_m.gguf")
    return BlockLlama.open(small)


WAYS: dict[str, Callable[[Path, Path], BlockLlama]] = {
    "ours": ours,
    "plain rounding": plain,
    "llama.cpp's Q4_K_M": llama_cpp,
}


def converted(
    folder: Path,
    target: Path,
    quantizer: convert.Quantizer,
    kinds: Callable[[str, tuple[int, ...], int], str] | None = None,
) -> BlockLlama:
    """The folder's blocks, in other kinds than the usual ones where these are given."""
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    config = replace(get_model("llama2-7b"), llm_hidden_size=width)
    usual = convert.kind_of
    target.mkdir()
    try:
        convert.kind_of = kinds or usual
        convert._convert_folder(config, folder, target, quantizer, 2, lambda *_, **__: None)
    finally:
        convert.kind_of = usual
    return BlockLlama.open(target)


def put(llm, blocks: BlockLlama) -> None:
    """Give the PyTorch model the blocks' weights."""
    for name, parameter in llm.named_parameters():
        own = convert.new_name(name) or ""
        tensor = blocks.embedding if own == "token_embd.weight" else blocks.tensors[own]
        numbers = torch.from_numpy(np.array(tensor.numbers())).view(parameter.shape)
        if not blocks.rope_halves and name.endswith(("q_proj.weight", "k_proj.weight")):
            pairs = numbers.unflatten(0, (-1, blocks.head_dim // 2, 2))
            numbers = pairs.transpose(1, 2).flatten(0, 2)
        parameter.copy_(numbers)


if __name__ == "__main__":
    main()
