"""A frozen linear layer in 8-bit integers, forwards and backwards, for training on a CPU.

Weights have a scale for each output, activations and gradients one for each token. On processors
that multiply 8-bit integers natively this is up to three times as fast as floats.
"""

import time

import torch
from torch import Tensor, nn


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, columns] -> (int8 numbers, scale [rows, 1]), by each row's largest number."""
    rows = rows.float()  # in 16 bits, the largest number may become 128, which wraps to -128
    # Twice over the numbers is many times faster than `aminmax`, which is not vectorised.
    largest = torch.maximum(rows.amax(1, keepdim=True), -rows.amin(1, keepdim=True))
    scale = largest.clamp_min(1e-12) / 127
    return (rows * (1 / scale)).round_().to(torch.int8), scale


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: Tensor, forwards: Tensor, backwards: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(backwards, scale)
        numbers, token_scale = quantized(inputs.flatten(0, -2))
        product = torch._int_mm(numbers, forwards).float().mul_(token_scale).mul_(scale)
        return product.to(inputs.dtype).view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        backwards, scale = ctx.saved_tensors
        numbers, token_scale = quantized(gradient.flatten(0, -2) * scale)
        product = torch._int_mm(numbers, backwards).float().mul_(token_scale)
        return product.to(gradient.dtype).view(*gradient.shape[:-1], -1), None, None, None


class Int8Linear(nn.Module):
    """What `linear` computes, in 8 bit; its weight is never trained."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        numbers, scale = quantized(linear.weight.detach().float())
        self.register_buffer("backwards", numbers)  # [out, in]
        self.register_buffer("forwards", numbers.t().contiguous())
        self.register_buffer("scale", scale[:, 0])
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        product = _Product.apply(inputs, self.forwards, self.backwards, self.scale)
        return product if self.bias is None else product + self.bias


def is_faster() -> bool:
    """Does this processor multiply 8-bit integers faster than floats? Measured, in a moment."""
    floats = torch.randn(512, 896), nn.Linear(896, 4864).requires_grad_(False)
    layers = (floats[1], Int8Linear(floats[1]))

    def seconds(layer: nn.Module) -> float:
        times = []
        for _ in range(4):
            started = time.process_time()
            layer(floats[0])
            times.append(time.process_time() - started)
        return min(times[1:])

    return seconds(layers[1]) < seconds(layers[0])


def replace_linears(module: nn.Module) -> None:
    """Put `Int8Linear` in the place of every linear layer within `module`."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child))
        else:
            replace_linears(child)
