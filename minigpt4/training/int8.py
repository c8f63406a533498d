"""A frozen linear layer in 8-bit integers, with its backward pass, for training on a CPU.

Weights have a scale for each output; activations and gradients have one for each token. On
processors that multiply 8-bit integers natively, this is up to three times as fast as floats.
"""

import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from minigpt4.weights.llm import DTYPES, choose_dtype

_INTEGERS = "8-bit integers and "
_ROWS = 256  # tokens multiplied at a time


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, columns] -> (int8 numbers, scale [rows, 1]), by each row's largest number."""
    rows = rows.float()  # in 16 bits, the largest number may become 128, which wraps to -128
    # Two passes over the numbers are many times faster than `aminmax`, which is not vectorised.
    largest = torch.maximum(rows.amax(1, keepdim=True), -rows.amin(1, keepdim=True))
    scale = largest.clamp_min(1e-12) / 127
    return (rows * (1 / scale)).round_().to(torch.int8), scale


def _multiplied(
    rows: Tensor, matrix: Tensor, before: Tensor | None = None, after: Tensor | None = None
) -> Tensor:
    """(rows [n, k] * before [k]) @ int8 matrix [k, m] * after [m], in the rows' type.

    _ROWS rows at a time, which stay in the processor's cache: 1.6 times as fast.
    """
    product = rows.new_empty(len(rows), matrix.shape[1])
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        numbers, scale = quantized(part if before is None else part * before)
        result = torch._int_mm(numbers, matrix).float().mul_(scale)
        product[start : start + _ROWS] = result if after is None else result.mul_(after)
    return product


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: Tensor, forwards: Tensor, backwards: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(backwards, scale)
        product = _multiplied(inputs.flatten(0, -2), forwards, after=scale)
        return product.view(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        backwards, scale = ctx.saved_tensors
        product = _multiplied(gradient.flatten(0, -2), backwards, before=scale)
        return product.view(*gradient.shape[:-1], -1), None, None, None


class TrainableInt8Linear(nn.Module):
    """The linear layer `linear` computed in 8 bit; its weight is never trained."""

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


def arithmetic(option: str, begun: str = "") -> tuple[str, torch.dtype, bool]:
    """The arithmetic of a language model in training: (name, floating type, are products computed
    in integers?).

    option: the value of --dtype. “auto” is the arithmetic in which the run has `begun` (its name),
    or for a new run the fastest on this processor.
    """
    if option != "auto":
        return option, choose_dtype(option), False
    name = begun
    if not name:
        dtype = fastest_dtype()
        name = f"{_INTEGERS if is_faster(dtype) else ''}{str(dtype).removeprefix('torch.')}"
    return name, choose_dtype(name.removeprefix(_INTEGERS)), name.startswith(_INTEGERS)


def arithmetic_of(log: Path) -> str:
    """The last name of an arithmetic in a run's log; "" if there is none."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    names = f"(?:{_INTEGERS})?(?:{'|'.join(DTYPES)})"
    return next(reversed(re.findall(f'"arithmetic": "({names})"', text)), "")


def fastest_dtype() -> torch.dtype:
    """The type in which this processor multiplies matrices fastest, as measured here."""
    candidates = torch.bfloat16, torch.float32
    pairs = [(torch.ones(256, 896).to(d), torch.ones(896, 4864).to(d)) for d in candidates]
    return candidates[fastest([partial(torch.mm, *pair) for pair in pairs])]


def is_faster(dtype: torch.dtype = torch.float32) -> bool:
    """Does this processor multiply 8-bit integers faster than `dtype`? This is measured quickly."""
    inputs, linear = torch.randn(512, 896).to(dtype), nn.Linear(896, 4864).requires_grad_(False)
    layers: tuple[nn.Module, nn.Module] = (TrainableInt8Linear(linear), linear.to(dtype))
    return fastest([partial(layer, inputs) for layer in layers]) == 0


def fastest(calls: Sequence[Callable[[], object]]) -> int:
    """The index of the call that takes the least processor time on one thread."""
    best, threads = [float("inf")] * len(calls), torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, two wait for each other, which counts as work
    for _ in range(8):  # in turns, so that other programs slow down all calls
        for number, call in enumerate(calls):
            started = time.thread_time()
            call()
            best[number] = min(best[number], time.thread_time() - started)
    torch.set_num_threads(threads)
    return best.index(min(best))


def replace_linears(module: nn.Module) -> None:
    """Put `TrainableInt8Linear` in the place of every linear layer within `module`."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, TrainableInt8Linear(child))
        else:
            replace_linears(child)
