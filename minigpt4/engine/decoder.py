"""Rows -> logits, with keys and values kept in pages: in PyTorch for any Llama on any device, or
compiled for the CPU (`native.py`) for a GGUF file's blocks."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from minigpt4.engine.rows import PAGE, Rows
from minigpt4.weights.gguf import BlockLlama

if TYPE_CHECKING:
    from minigpt4.model.minigpt4 import MiniGPT4

USUAL_CPU_MEGABYTES = 384
GPU_SHARE = 0.3  # of what is free once the model is loaded


class Decoder(Protocol):
    """What the engine needs of a decoder."""

    def forward(self, rows: Rows) -> np.ndarray:
        """Float32 logits [wanted rows, vocabulary]; every row's keys and values are kept."""

    def copy_page(self, source: int, target: int) -> None:
        """Give page `target` what `source` holds."""


def build_decoder(model: "MiniGPT4", megabytes: int | None = None) -> tuple[Decoder, int]:
    """(the decoder for a model's language model, how many pages it has).

    megabytes: for keys and values; None: a third of a GPU's free memory, 384 on a CPU, and always
    enough for one conversation of the model's context.
    """
    context = model.config.context
    budget = (USUAL_CPU_MEGABYTES if megabytes is None else megabytes) * 2**20
    if isinstance(model.llm, BlockLlama):
        from minigpt4.engine.native import NativeDecoder

        pages = _count(budget, NativeDecoder.page_bytes(model.llm), context)
        return NativeDecoder(model.llm, context, pages, threads()), pages

    from minigpt4.engine.torch_decoder import TorchDecoder, free_memory

    if megabytes is None and model.device.type == "cuda":
        budget = int(free_memory(model.device) * GPU_SHARE)
    pages = _count(budget, TorchDecoder.page_bytes(model.llm), context)
    return TorchDecoder(model.llm, pages), pages


def _count(budget: int, page_bytes: int, context: int) -> int:
    return max(budget // page_bytes, -(-context // PAGE) + 1)  # and one for `Engine.health`


def threads() -> int:
    """Processors that this program may use: what $OMP_NUM_THREADS says, else what the system and
    the container allow; a decoder gains little from more than eight."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdecimal() and int(asked) > 0:
        return min(int(asked), 8)
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:  # a container's quota: microseconds of processor time in each period
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        available = min(available, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # there is none ("max"), or this is no Linux
        pass
    return min(available or 1, 8)
