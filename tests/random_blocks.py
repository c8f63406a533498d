"""Tiny random models in GGUF's blocks. No torch."""

import numpy as np

from minigpt4.weights.gguf import BLOCKS, BlockLlama, BlockTensor

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER, VOCABULARY, CONTEXT = 64, 2, 2, 1, 96, 320, 512


def random_tensor(kind: str, rows: int, columns: int, seed: int = 0) -> BlockTensor:
    """Every code and scale that the kind can hold; numbers of all sizes and signs."""
    draw = np.random.default_rng(seed)
    if kind in ("F32", "F16"):
        data = draw.normal(size=(rows, columns)).astype(np.float32 if kind == "F32" else np.float16)
        return BlockTensor(kind, (rows, columns), data if kind == "F32" else data.view(np.uint8))
    weights, size = BLOCKS[kind]
    data = draw.integers(0, 256, (rows * columns // weights, size), np.uint8)
    places = {"Q6_K": [208], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q4_1": [0, 2], "Q5_1": [0, 2]}
    for place in places.get(kind, [0]):
        scale = draw.uniform(-1, 1, (len(data), 1)).astype(np.float16)
        data[:, place : place + 2] = scale.view(np.uint8)
    return BlockTensor(kind, (rows, columns), data.reshape(rows, -1))


def block_llama(
    seed: int = 0,
    *,
    hidden: int = HIDDEN,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    head_dim: int = HIDDEN // HEADS,
    inner: int = INNER,
    vocabulary: int = VOCABULARY,
    kind: str = "Q4_1",
    tied: bool = True,
    qwen: bool = False,
) -> BlockLlama:
    """Random matrices of `kind` (Q4_1 or F16) and an 8-bit embedding (F16 for F16), large enough
    to make answers differ. qwen: biases, and rotary embeddings by halves."""
    draw = np.random.default_rng(seed)

    def blocks(kind: str, rows: int, columns: int, size: float) -> BlockTensor:
        if kind == "F16":
            numbers = draw.uniform(-size, size, (rows, columns)).astype(np.float16)
            return BlockTensor(kind, (rows, columns), numbers.view(np.uint8))
        count = rows * columns // 32
        if kind == "Q4_1":
            step = draw.uniform(0.5, 1.5, (count, 1)) * size / 7.5
            header = np.concatenate([step, -7.5 * step], 1).astype(np.float16)
            codes = draw.integers(0, 256, (count, 16), np.uint8)
        else:
            header = (draw.uniform(0.5, 1.5, (count, 1)) * size / 127).astype(np.float16)
            codes = draw.integers(-127, 128, (count, 32)).astype(np.int8).view(np.uint8)
        data = np.concatenate([header.view(np.uint8).reshape(count, -1), codes], 1)
        return BlockTensor(kind, (rows, columns), data.reshape(rows, -1))

    def floats(count: int, low: float, high: float) -> BlockTensor:
        return BlockTensor("F32", (count,), draw.uniform(low, high, count).astype(np.float32))

    outer = "F16" if kind == "F16" else "Q8_0"
    tensors = {
        "token_embd.weight": blocks(outer, vocabulary, hidden, 2.0),
        "output_norm.weight": floats(hidden, 0.5, 1.5),
    }
    if not tied:
        tensors["output.weight"] = blocks(outer, vocabulary, hidden, 2.0)
    for i in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", heads * head_dim, hidden),
            ("attn_k", kv_heads * head_dim, hidden),
            ("attn_v", kv_heads * head_dim, hidden),
            ("attn_output", hidden, heads * head_dim),
            ("ffn_gate", inner, hidden),
            ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            tensors[f"blk.{i}.{name}.weight"] = blocks(kind, rows, columns, 0.4)
            if qwen and name[-1] in "qkv":
                tensors[f"blk.{i}.{name}.bias"] = floats(rows, -1, 1)
        tensors[f"blk.{i}.attn_norm.weight"] = floats(hidden, 0.5, 1.5)
        tensors[f"blk.{i}.ffn_norm.weight"] = floats(hidden, 0.5, 1.5)
    return BlockLlama(
        hidden_size=hidden,
        layers=LAYERS,
        heads=heads,
        kv_heads=kv_heads,
        intermediate_size=inner,
        vocabulary=vocabulary,
        context=2048,
        norm_eps=1e-5,
        rope_theta=1e6 if qwen else 10000.0,
        tensors=tensors,
        head_dim=head_dim,
        rope_halves=qwen,
    )
