"""Adapters (LoRA) in training: a linear layer plus a product of two small matrices."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.weights.adapters import MATRICES, Adapter, Adapters

_SCALE = 2.0  # lora_alpha / rank, as is usual


class Adapted(nn.Module):
    """base(x) + scale · B A x for x [..., columns]; only A and B are trained."""

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.base, self.a, self.b = base, nn.Parameter(a), nn.Parameter(b)

    def forward(self, inputs: Tensor) -> Tensor:
        change = F.linear(F.linear(inputs.float(), self.a), self.b) * _SCALE
        return self.base(inputs) + change.to(inputs.dtype)


def insert(layers: nn.ModuleList, rank: int, seed: int, start: Adapters) -> dict[str, Adapted]:
    """Give each layer's attention adapters: those of `start`, or else new ones, which at first
    change nothing.

    Returns "LAYER.MATRIX" -> adapted layer.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number, layer in enumerate(layers):
        for matrix in MATRICES:
            base = getattr(layer.self_attn, matrix)
            rows, columns = _shape(base)
            a = torch.randn(rank, columns, generator=generator) / columns**0.5
            b = torch.zeros(rows, rank)
            if given := start.get((number, matrix)):
                a, b = given[0].clone(), given[1] / _SCALE
            found[f"{number}.{matrix}"] = Adapted(base, a, b)
            setattr(layer.self_attn, matrix, found[f"{number}.{matrix}"])
    return found


def _shape(linear: nn.Module) -> tuple[int, int]:
    weight = linear.weight if isinstance(linear, nn.Linear) else linear.get_buffer("backwards")
    return weight.shape[0], weight.shape[1]


def tensors_of(adapted: dict[str, Adapted]) -> dict[str, nn.Parameter]:
    """Name -> parameter, for all adapters."""
    return {f"{name}.{half}": getattr(m, half) for name, m in adapted.items() for half in "ab"}


def finished(tensors: dict[str, Tensor]) -> Adapters:
    """These parameters in the form of a file, in which B includes the scale."""
    pairs: dict[tuple[int, str], Adapter] = {}
    for name in {name.rpartition(".")[0] for name in tensors}:
        number, _, matrix = name.partition(".")
        pairs[int(number), matrix] = tensors[f"{name}.a"], tensors[f"{name}.b"] * _SCALE
    return dict(sorted(pairs.items()))
