"""Perplexity and next tokens with keys and values in 8 bits, against 16.

`python -m benchmarks.kv_quality FOLDER TEXT...` reads the weights of a folder such as
weights/mini-llm and text files. It prints one line for each precision of the cache: that of the
CPU's kernels with the 4-bit weights, or with `--torch` that of PyTorch and GPUs with 16-bit ones.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch

from minigpt4.engine.decoder import threads
from minigpt4.engine.kvcache import BLOCK_SIZE
from minigpt4.engine.native import NativeDecoder
from minigpt4.engine.sampling import log_softmax
from minigpt4.engine.scheduler import Rows
from minigpt4.engine.torch_decoder import TorchDecoder
from minigpt4.weights.gguf import BlockLlama
from minigpt4.weights.llm import _from_pretrained
from minigpt4.weights.tokenizer import load_tokenizer


def decoder(folder: Path, window: int, bits: int, in_torch: bool) -> NativeDecoder | TorchDecoder:
    """For texts of `window` tokens."""
    blocks = -(-window // BLOCK_SIZE)
    if in_torch:
        llm, _ = _from_pretrained(folder, torch.device("cpu"), "none", torch.float32)
        return TorchDecoder(llm.eval(), blocks, bits)
    return NativeDecoder(BlockLlama.open(folder), window, blocks, threads(), kv_bits=bits)


def read(decoder: NativeDecoder | TorchDecoder, ids: np.ndarray) -> np.ndarray:
    """Log-probabilities [positions - 1, vocabulary] of the token after each position."""
    positions = np.arange(len(ids), dtype=np.int32)
    blocks = np.arange(-(-len(ids) // BLOCK_SIZE), dtype=np.int32)[None]
    embeds = np.zeros((0, 1), np.float32)
    if isinstance(decoder, NativeDecoder):
        embeds = np.zeros((0, decoder.hidden_size), np.float32)
    rows = Rows(ids, embeds, positions, np.zeros_like(positions), blocks, positions[:-1])
    return log_softmax(decoder.forward(rows))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=1024, help="tokens read together")
    parser.add_argument("--torch", action="store_true", help="PyTorch's decoder")
    options = parser.parse_args()
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in options.texts)
    ids = np.array(load_tokenizer(options.folder).encode(text)[: options.tokens], np.int32)
    windows = ids[: len(ids) // options.window * options.window].reshape(-1, options.window)
    decoders = [decoder(options.folder, options.window, bits, options.torch) for bits in (16, 8)]
    losses: dict[int, list[float]] = {16: [], 8: []}
    divergence, same = [], []
    for window in windows:
        exact, found = (read(one, window) for one in decoders)
        for bits, logs in ((16, exact), (8, found)):
            losses[bits].append(-float(logs[np.arange(len(logs)), window[1:]].mean()))
        divergence.append((np.exp(exact) * (exact - found)).sum(-1).mean())
        same.append((exact.argmax(-1) == found.argmax(-1)).mean())
    for bits in (16, 8):
        line = {"kv_bits": bits, "perplexity": round(math.exp(float(np.mean(losses[bits]))), 3)}
        if bits == 8:
            line["same_likeliest"] = round(float(np.mean(same)), 4)
            line["kl_divergence_nats_a_token"] = round(float(np.mean(divergence)), 6)
        print(json.dumps({"tokens": windows.size} | line), flush=True)


if __name__ == "__main__":
    main()
