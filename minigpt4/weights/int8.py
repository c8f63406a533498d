"""Language models with weight-only int8: one scale per output channel, activations unquantised."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Int8Weight:
    """A weight [out, in] as int8 numbers and a float32 scale [out]; a bias [out] or None."""

    numbers: Tensor
    scale: Tensor
    bias: Tensor | None = None


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[out, in] -> (int8 [out, in], float32 scale [out]), by each row's largest magnitude."""
    weight = weight.float()
    scale = weight.abs().amax(1).clamp_min(1e-12) / 127
    return (weight / scale[:, None]).round_().to(torch.int8), scale
