"""The kernels at sizes that are no whole blocks, for a run under sanitizers (`test_sanitizers.py`).
No torch and no pytest: they would take longer than the kernels."""

import ctypes
import sys

import numpy as np

from minigpt4.engine.kernels.build import library
from minigpt4.engine.kvcache import BLOCK_SIZE
from minigpt4.engine.native import NativeDecoder, PackedMatrices, quantize
from minigpt4.engine.scheduler import Rows
from minigpt4.weights.gguf import BLOCKS
from tests.random_blocks import block_llama, random_tensor

SHAPES = [
    {"vocabulary": 32001, "tied": False},
    {"qwen": True, "heads": 6, "kv_heads": 2, "head_dim": 16, "vocabulary": 33},
    {"kind": "F16", "hidden": 54, "heads": 3, "head_dim": 20, "inner": 70, "vocabulary": 61},
]


def multiply(variant: str, kind: str) -> None:
    matrices = PackedMatrices(library(variant))
    matrices.add("it", random_tensor(kind, 83, 512))
    matrices.pack(2)
    matrix = matrices["it"]
    for count in (1, 3, 9):
        x = np.random.default_rng(0).normal(size=(count, matrix.columns)).astype(np.float32)
        x[0, :32] = 0
        out = np.empty((count, matrix.rows), np.float32)
        library(variant).minigpt4_multiply(
            ctypes.byref(matrix), x.ctypes.data, count, out.ctypes.data
        )
        if not np.isfinite(out).all():
            raise SystemExit(f"{kind}: not a number")


def write_blocks(variant: str) -> None:
    draw = np.random.default_rng(1)
    numbers = draw.normal(size=(9, 512)).astype(np.float32)
    numbers[0], numbers[1], numbers[2], numbers[3, :40] = 0, 1e-30, 1e30, 60000
    for kind in ("Q4_1", "Q8_0", "Q4_K", "Q6_K"):
        quantize(kind, numbers, variant)


def decode(variant: str, shape: dict, kv_bits: int) -> None:
    llama = block_llama(**shape)
    decoder = NativeDecoder(llama, 64, 8, 2, variant, kv_bits=kv_bits)
    draw = np.random.default_rng(0)
    tables = np.array([[0, 1, 2], [3, 4, 5]], np.int32)
    for count in (1, 16, 40):  # of two conversations; the first row is a picture's
        tokens = draw.integers(0, llama.vocabulary, 2 * count).astype(np.int32)
        tokens[0], tokens[-1] = -1, llama.vocabulary - 1
        positions = np.tile(np.arange(count, dtype=np.int32), 2)
        which = np.repeat(np.arange(2, dtype=np.int32), count)
        embeds = draw.normal(size=(1, llama.hidden_size)).astype(np.float32)
        wanted = np.array([0, 2 * count - 1], np.int32)
        logits = decoder.forward(Rows(tokens, embeds, positions, which, tables, wanted))
        if not np.isfinite(logits).all():
            raise SystemExit(f"{shape}: not a number")
    if len(tables[0]) * BLOCK_SIZE < count:
        raise SystemExit("the tables are too short")
    decoder.close()


def main() -> None:
    variant = sys.argv[1]
    for kind in BLOCKS:
        multiply(variant, kind)
    write_blocks(variant)
    for shape in SHAPES:
        for kv_bits in (16, 8):
            decode(variant, shape, kv_bits)
    print("done")


if __name__ == "__main__":
    main()
