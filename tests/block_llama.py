"""Tiny random Llamas in GGUF's blocks, and the same ones for transformers."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt4.config import get_model
from minigpt4.weights.gguf import BlockLlama, BlockTensor

HIDDEN, LAYERS, HEADS, KV_HEADS, INNER, VOCABULARY, CONTEXT = 64, 2, 2, 1, 96, 320, 512
IMAGE_TOKENS = 5


def block_llama(seed: int = 0) -> BlockLlama:
    """Random 4-bit matrices and an 8-bit embedding, large enough to make answers differ."""
    draw = np.random.default_rng(seed)

    def blocks(kind: str, rows: int, columns: int, size: float) -> BlockTensor:
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

    def norm() -> BlockTensor:
        return BlockTensor("F32", (HIDDEN,), draw.uniform(0.5, 1.5, HIDDEN).astype(np.float32))

    head_dim = HIDDEN // HEADS
    tensors = {
        "token_embd.weight": blocks("Q8_0", VOCABULARY, HIDDEN, 2.0),
        "output_norm.weight": norm(),
    }
    for i in range(LAYERS):
        for name, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", KV_HEADS * head_dim, HIDDEN),
            ("attn_v", KV_HEADS * head_dim, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", INNER, HIDDEN),
            ("ffn_up", INNER, HIDDEN),
            ("ffn_down", HIDDEN, INNER),
        ):
            tensors[f"blk.{i}.{name}.weight"] = blocks("Q4_1", rows, columns, 0.4)
        tensors[f"blk.{i}.attn_norm.weight"] = norm()
        tensors[f"blk.{i}.ffn_norm.weight"] = norm()
    return BlockLlama(
        HIDDEN, LAYERS, HEADS, KV_HEADS, INNER, VOCABULARY, 2048, 1e-5, 10000.0, tensors
    )


def as_transformers(llama: BlockLlama) -> LlamaForCausalLM:
    """The same weights in PyTorch, float32."""
    config = LlamaConfig(
        hidden_size=llama.hidden_size,
        num_hidden_layers=llama.layers,
        num_attention_heads=llama.heads,
        num_key_value_heads=llama.kv_heads,
        intermediate_size=llama.intermediate_size,
        vocab_size=llama.vocabulary,
        rms_norm_eps=llama.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": llama.rope_theta},
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    model = LlamaForCausalLM(config).eval()
    state = {}

    def numbers(name: str) -> torch.Tensor:
        return torch.from_numpy(llama.tensors[name].numbers().copy())

    def unpaired(weight: torch.Tensor, heads: int) -> torch.Tensor:
        """GGUF keeps the two halves of a head's rows as pairs."""
        return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    for i in range(llama.layers):
        layer, block = f"model.layers.{i}.", f"blk.{i}."
        state[layer + "self_attn.q_proj.weight"] = unpaired(
            numbers(block + "attn_q.weight"), llama.heads
        )
        state[layer + "self_attn.k_proj.weight"] = unpaired(
            numbers(block + "attn_k.weight"), llama.kv_heads
        )
        for ours, theirs in (
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("mlp.gate_proj", "ffn_gate"),
            ("mlp.up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
            ("input_layernorm", "attn_norm"),
            ("post_attention_layernorm", "ffn_norm"),
        ):
            state[f"{layer}{ours}.weight"] = numbers(f"{block}{theirs}.weight")
    state["model.embed_tokens.weight"] = numbers("token_embd.weight")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["model.norm.weight"] = numbers("output_norm.weight")
    model.load_state_dict(state, strict=True)
    return model


def tiny_chat_model(llm, context: int = CONTEXT):
    """What the engine needs of a model: a language model, and pictures as 5 vectors of their own.

    The vectors are fixed random projections of the picture's pixels.
    """
    config = replace(get_model("nano"), llm_hidden_size=HIDDEN, context=context)
    mix = np.random.default_rng(1).normal(size=(IMAGE_TOKENS, 48, HIDDEN)).astype(np.float32)

    def embed_pictures(pictures) -> list[np.ndarray]:
        small = [np.asarray(p.resize((4, 4)), np.float32).ravel() / 255 - 0.5 for p in pictures]
        return [np.einsum("p,tph->th", pixels, mix) for pixels in small]

    return SimpleNamespace(
        config=config, llm=llm, device=torch.device("cpu"), embed_pictures=embed_pictures
    )
