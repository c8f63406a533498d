"""EVA ViT-g for the CPU: its linear layers in int8, in a separate file that is made once.

The file is mapped: no tensor is copied. Each row of a weight has a scale. Matrices are multiplied
with the int8 numbers themselves, which bfloat16 holds exactly.
"""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from huggingface_hub.utils import WeakFileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from minigpt4.data.files import check_pointer, replacing
from minigpt4.errors import Report, Step, UserError
from minigpt4.model.parts import EvaViT
from minigpt4.model.vision import build_encoder
from minigpt4.weights.checkpoint import check_tensors, eva_tensors, forget, read_checkpoint
from minigpt4.weights.int8 import quantize_rows
from minigpt4.weights.sources import mark_of, weights_folder
from minigpt4.weights.transfer import Progress

INT8 = "-int8.safetensors"  # the end of the file's name
ROWS = 256  # of a weight, converted at once: so many fit into the processor's cache
NORM = "vit.post_layernorm."  # BLIP-2's final norm, which comes from another file


class Int8EncoderLinear(nn.Module):
    """[..., in] -> [..., out] of the inputs' type, from int8 [out, in] and a scale [out]."""

    def __init__(self, numbers: Tensor, scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("numbers", numbers)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        parts = self.get_buffer("numbers").split(ROWS)
        outputs = torch.cat([F.linear(inputs, part.to(inputs.dtype)) for part in parts], -1)
        scaled = torch.addcmul(self.get_buffer("bias"), outputs.float(), self.get_buffer("scale"))
        return scaled.to(inputs.dtype)


def make_int8(config: EvaViT, vision: Path, report: Report) -> Path:
    """The file with the encoder in int8; it is made if it is missing.

    UserError if the encoder's own file is damaged, or the disk is full or read-only.
    """
    if vision.name.endswith(INT8):
        return vision
    mark = mark_of([vision], config)
    target = weights_folder() / f"{vision.stem}-{mark}{INT8}"
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(weights_folder() / ".lock"):  # another program may be making it
            if not target.exists():
                with replacing(target) as partial:
                    save_file(dict(_quantized(config, vision, report)), partial)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{target} cannot be written ({reason}): make room, or name another folder in "
            "MINIGPT4_WEIGHTS."
        ) from error
    return target


def _quantized(config: EvaViT, vision: Path, report: Report) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of everything in an encoder of `Int8EncoderLinear` layers, except the norm.
    Tensors that are not quantized are in 32 bit."""
    tensors = eva_tensors(read_checkpoint(vision), config)
    encoder = _on_meta(config)
    linears = {name for name, module in encoder.named_modules() if isinstance(module, nn.Linear)}
    wanted = {n: t for n, t in encoder.state_dict().items() if not n.startswith(NORM)}
    check_tensors(wanted, tensors, vision, "EVA ViT-g")
    size = sum(tensors[name].nbytes for name in wanted)
    what = Step("encoder", "the visual encoder")
    with closing(Progress(what, size, report, "Converting")) as progress:
        for name in wanted:
            tensor, (owner, _, leaf) = tensors[name], name.rpartition(".")
            if owner in linears and leaf == "weight":
                numbers, scale = quantize_rows(tensor)
                yield f"{owner}.numbers", numbers
                yield f"{owner}.scale", scale
            else:
                yield name, tensor.to(torch.float32, copy=True)
            forget(tensor)
            progress.add(tensor.nbytes)


def load_int8_encoder(
    config: EvaViT, path: Path, norm: dict[str, Tensor], dtype: torch.dtype
) -> nn.Module:
    """The encoder from such a file. norm: `ln_vision`. UserError if the file is damaged."""
    check_pointer(path)
    encoder = _on_meta(config)
    for name, module in [*encoder.named_modules()]:
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(encoder.get_submodule(parent), leaf, _empty(module))
    try:
        tensors = load_file(path) | eva_tensors(norm, config)
        for name, expected in encoder.state_dict().items():
            found = tensors[name]
            if found.shape != expected.shape or (found.dtype == torch.int8) != (
                expected.dtype == torch.int8
            ):
                raise ValueError(f"{name} is {found.dtype} {tuple(found.shape)}")
        encoder.load_state_dict(tensors, strict=True, assign=True)
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"{path} is damaged: delete it, and it will be made again at the next start."
        ) from error
    for module in encoder.modules():
        if not isinstance(module, Int8EncoderLinear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)
    return encoder


def _on_meta(config: EvaViT) -> nn.Module:
    with torch.device("meta"):
        return build_encoder(config)


def _empty(linear: nn.Linear) -> Int8EncoderLinear:
    numbers = torch.empty_like(linear.weight, dtype=torch.int8)
    scale = torch.empty(len(linear.weight), device="meta")
    return Int8EncoderLinear(numbers, scale, torch.empty_like(scale))
