"""The tiny random models for transformers, and as the engine's model."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from minigpt4.config import get_model
from minigpt4.model.image import Encoded
from minigpt4.weights.gguf import BlockLlama
from tests.random_blocks import CONTEXT, HIDDEN, VOCABULARY, block_llama

__all__ = ["CONTEXT", "HIDDEN", "VOCABULARY", "as_transformers", "block_llama", "tiny_chat_model"]

IMAGE_TOKENS = 5


def as_transformers(llama: BlockLlama) -> PreTrainedModel:
    """The same weights in PyTorch, float32."""
    tied = llama.head is llama.embedding
    kinds = (
        (Qwen2Config, Qwen2ForCausalLM) if llama.rope_halves else (LlamaConfig, LlamaForCausalLM)
    )
    config = kinds[0](
        hidden_size=llama.hidden_size,
        num_hidden_layers=llama.layers,
        num_attention_heads=llama.heads,
        num_key_value_heads=llama.kv_heads,
        head_dim=llama.head_dim,
        intermediate_size=llama.intermediate_size,
        vocab_size=llama.vocabulary,
        rms_norm_eps=llama.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": llama.rope_theta},
        tie_word_embeddings=tied,
        max_position_embeddings=2048,
    )
    model = kinds[1](config).eval()
    state = {}

    def numbers(name: str) -> torch.Tensor:
        return torch.from_numpy(llama.tensors[name].numbers().copy())

    def unpaired(weight: torch.Tensor, heads: int) -> torch.Tensor:
        """A Llama's GGUF keeps the two halves of a head's rows as pairs."""
        if llama.rope_halves:
            return weight
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
        for name in "qkv" if llama.rope_halves else "":
            state[f"{layer}self_attn.{name}_proj.bias"] = numbers(f"{block}attn_{name}.bias")
    state["model.embed_tokens.weight"] = torch.from_numpy(llama.embedding.numbers().copy())
    state["lm_head.weight"] = torch.from_numpy(llama.head.numbers().copy())
    state["model.norm.weight"] = numbers("output_norm.weight")
    model.load_state_dict(state, strict=True)
    return model


def tiny_chat_model(llm, context: int = CONTEXT):
    """What the engine needs of a model: a language model, and pictures as 5 vectors of their own.

    The vectors are fixed random projections of the picture's pixels.
    """
    config = replace(get_model("nano"), llm_hidden_size=HIDDEN, context=context)
    mix = np.random.default_rng(1).normal(size=(IMAGE_TOKENS, 48, HIDDEN)).astype(np.float32)

    def encode_pictures(pictures) -> list[Encoded]:
        small = [np.asarray(p.resize((4, 4)), np.float32).ravel() / 255 - 0.5 for p in pictures]
        return [Encoded(np.einsum("p,tph->th", pixels, mix)) for pixels in small]

    return SimpleNamespace(
        config=config,
        llm=llm,
        quantize="none",
        device=torch.device("cpu"),
        encode_pictures=encode_pictures,
    )
