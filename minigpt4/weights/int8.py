"""Language models with weight-only int8: one scale per output channel, activations unquantized.

A Llama's linears, head and embedding are quantized while its files are read, one tensor at a time.
Layers that read the same input are stored together, for kernels that compute them together.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.errors import Count, ignore
from minigpt4.weights.folder import has_own_head, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FUSED = {
    "self_attn": {"qkv": ("q_proj", "k_proj", "v_proj"), "output": ("o_proj",)},
    "mlp": {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)},
}


@dataclass(frozen=True)
class Int8Weight:
    """A weight [out, in] as int8 numbers and a float32 scale [out]; a bias [out] or None."""

    numbers: Tensor
    scale: Tensor
    bias: Tensor | None = None

    def rows(self, start: int, count: int) -> "Int8Weight":
        """Some outputs, in the same memory."""
        part = slice(start, start + count)
        bias = None if self.bias is None else self.bias[part]
        return Int8Weight(self.numbers[part], self.scale[part], bias)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> (int8 [out, in], float32 scale [out]), by each row's largest magnitude."""
    weight = weight.float()
    scale = weight.abs().amax(1).clamp_min(1e-12) / 127
    return (weight / scale[:, None]).round_().to(torch.int8), scale


class Int8Module(nn.Module):
    """A linear or embedding layer's weight, in int8; it computes in `dtype`."""

    def __init__(self, stored: Int8Weight, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored, self.dtype = stored, dtype

    @property
    def weight(self) -> Tensor:
        """Dequantized [out, in], computed at each call."""
        return self.stored.numbers.to(self.dtype) * self.stored.scale.to(self.dtype)[:, None]

    def load(self, name: str, tensor: Tensor) -> None:
        """Store the tensor "weight" [out, in] or "bias" [out]. ValueError for another shape."""
        target = self.stored.numbers if name == "weight" else self.stored.bias
        if target is None or tensor.shape != target.shape:
            raise ValueError(f"{name} has the shape {[*tensor.shape]}")
        if name == "weight":
            numbers, scale = quantize_rows(tensor.to(target.device))
            target.copy_(numbers)
            self.stored.scale.copy_(scale)
        else:
            target.copy_(tensor)


class Int8Linear(Int8Module):
    """[..., in] -> [..., out]."""

    def forward(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.weight, self.stored.bias)


class Int8Embedding(Int8Module):
    """Token ids [...] -> embeddings [..., hidden_size]."""

    def forward(self, ids: Tensor) -> Tensor:
        scale = self.stored.scale[ids][..., None]
        return (self.stored.numbers[ids] * scale).to(self.dtype)


def load_int8(
    folder: Path, device: torch.device, dtype: torch.dtype, count: Count = ignore
) -> tuple["PreTrainedModel", dict]:
    """(model, report of missing tensors, in transformers' form) from a Hugging Face folder."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.tie_word_embeddings:
        config.tie_word_embeddings = not has_own_head(folder)
    return build_int8(config, read_tensors(folder, count), device, dtype)


def build_int8(
    config, tensors: Iterator[tuple[str, Tensor]], device: torch.device, dtype: torch.dtype
) -> tuple["PreTrainedModel", dict]:
    """(model, report) from a Llama's configuration and its named 16- or 32-bit tensors."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    missing = {*llm.state_dict()}
    _replace_modules(llm, device, dtype)
    if config.tie_word_embeddings:
        missing.discard("lm_head.weight")
    mismatched = []
    for name, tensor in tensors:
        if name in missing:
            missing.discard(name)
            parent, _, leaf = name.rpartition(".")
            try:
                _load(llm.get_submodule(parent), leaf, tensor, device, dtype)
            except ValueError as error:
                mismatched.append((name, str(error)))
    report = {"missing_keys": sorted(missing), "mismatched_keys": mismatched, "error_msgs": []}
    return llm.requires_grad_(False), report


def _replace_modules(llm: "PreTrainedModel", device: torch.device, dtype: torch.dtype) -> None:
    """Give a model on "meta" int8 layers on the device, and a rotary embedding, whose numbers are
    computed, not loaded."""
    decoder = llm.get_decoder()
    for layer in decoder.layers:
        for part, groups in FUSED.items():
            module = getattr(layer, part)
            for name, members in groups.items():
                setattr(module, name, _fuse(module, members, device, dtype))
    table = _empty([llm.get_input_embeddings()], device, dtype)
    tied = llm.config.tie_word_embeddings
    head = table if tied else _empty([llm.get_output_embeddings()], device, dtype)
    llm.set_input_embeddings(Int8Embedding(table, dtype))
    llm.set_output_embeddings(Int8Linear(head, dtype))
    decoder.rotary_emb = type(decoder.rotary_emb)(llm.config).to(device)


def _fuse(
    module: nn.Module, members: tuple[str, ...], device: torch.device, dtype: torch.dtype
) -> Int8Weight:
    """Replace the linears by int8 ones with consecutive weights. Returns the whole weight."""
    linears = [getattr(module, member) for member in members]
    whole, start = _empty(linears, device, dtype), 0
    for member, linear in zip(members, linears, strict=True):
        count = len(linear.weight)
        setattr(module, member, Int8Linear(whole.rows(start, count), dtype))
        start += count
    return whole


def _empty(layers: list, device: torch.device, dtype: torch.dtype) -> Int8Weight:
    outputs, width = sum(len(layer.weight) for layer in layers), layers[0].weight.shape[1]
    numbers = torch.empty(outputs, width, dtype=torch.int8, device=device)
    biased = getattr(layers[0], "bias", None) is not None
    return Int8Weight(
        numbers,
        torch.empty(outputs, device=device),
        torch.empty(outputs, dtype=dtype, device=device) if biased else None,
    )


def _load(
    module: nn.Module, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype
) -> None:
    if isinstance(module, Int8Module):
        module.load(name, tensor)
    elif tensor.shape != module.get_parameter(name).shape:
        raise ValueError(f"the shape is {[*tensor.shape]}")
    else:
        module.register_parameter(name, nn.Parameter(tensor.to(device, dtype)))
