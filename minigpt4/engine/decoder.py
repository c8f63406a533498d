"""The choice of the decoder, and its memory. A decoder turns rows into logits, and keeps keys
and values in blocks: in PyTorch for any Llama on any device (`torch_decoder.py`), in CUDA graphs
for int8 weights on a GPU (`gpu/`), or compiled for the CPU for a GGUF file's weights (`native.py`).
"""

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from minigpt4.engine.kvcache import BLOCK_SIZE
from minigpt4.errors import Count, UserError, ignore, out_of_memory, say
from minigpt4.weights.gguf import BlockLlama

if TYPE_CHECKING:
    import torch

    from minigpt4.engine.scheduler import Outputs, Rows
    from minigpt4.model.minigpt4 import MiniGPT4

CPU_MEGABYTES = 384
GPU_SHARE = 0.3  # of the memory that is free once the model is loaded


class Decoder(Protocol):
    """The interface of a decoder.

    name: for people. chunk_rows: (prompt rows in a step without running answers, with some).
    """

    name: str
    chunk_rows: tuple[int, int]

    def forward(self, rows: "Rows") -> "Outputs":
        """For each wanted row: float32 logits [vocabulary], or the token that its draw chooses (-1
        if the logits are not finite). Keys and values of every row are stored."""

    def copy_block(self, source: int, target: int) -> None:
        """Copy block `source` to block `target`."""


def build_decoder(
    model: "MiniGPT4",
    megabytes: int | None = None,
    max_running: int = 32,
    eager: bool = False,
    count: Count = ignore,
) -> tuple[Decoder, int]:
    """(the decoder for a model's language model, its number of blocks).

    megabytes: for keys and values; None: 30 % of a GPU's free memory or 384 MB on a CPU, at most
    what `max_running` full contexts need. The memory is always enough for one context. If it is not
    available, the decoder gets less, and a line says so; UserError if not even one context fits.
    eager: use no CUDA graphs. count: is called with the bytes of weights that are read here.
    """
    context = model.config.context
    if isinstance(model.llm, BlockLlama):
        from minigpt4.engine.native import NativeDecoder

        kv_bits = model.config.kv_bits or 8

        def build(blocks: int) -> Decoder:
            limits = context, blocks, threads()
            return NativeDecoder(model.llm, *limits, count=count, kv_bits=kv_bits)

        block_bytes = NativeDecoder.block_bytes(model.llm, kv_bits)
    else:
        from minigpt4.engine.gpu.choose import faster
        from minigpt4.engine.torch_decoder import TorchDecoder

        kv_bits = model.config.kv_bits or 16
        graphs = model.device.type == "cuda" and model.quantize == "w8a16" and not eager

        def build(blocks: int) -> Decoder:
            decoder = TorchDecoder(model.llm, blocks, kv_bits)
            return faster(decoder, model.llm, context) if graphs else decoder

        block_bytes = TorchDecoder.block_bytes(model.llm, kv_bits)
    least = _blocks_of(context) + 1  # and one for `Engine.health`
    if megabytes is None:
        blocks = _usual_bytes(model.device) // block_bytes
        blocks = min(blocks, max_running * _blocks_of(context) + 1)
    else:
        blocks = megabytes * 2**20 // block_bytes
    built = _build_within_memory(build, max(blocks, least), least)
    used = -(-built[1] * block_bytes // 2**20)
    if built[1] < blocks:
        asked = blocks * block_bytes // 2**20
        say(f"There is no memory for {asked} MB of keys and values: {used} MB are used instead.")
    elif megabytes is not None and blocks < least:
        needed = f"less than one conversation takes: {used} MB are used"
        say(f"--kv-megabytes {megabytes} is {needed}.")
    if model.device.type == "cpu":
        _compact_heap()
    return built


def kept_blocks(device: "torch.device", blocks: int, megabytes: int | None) -> int:
    """How many blocks may be used before those of finished conversations are used again. On a CPU,
    where a block takes memory only when it is first used: a quarter, unless `megabytes` is set."""
    return blocks // 4 if device.type == "cpu" and megabytes is None else blocks


def _blocks_of(context: int) -> int:
    return -(-context // BLOCK_SIZE)


def _usual_bytes(device: "torch.device") -> int:
    if device.type != "cuda":
        return CPU_MEGABYTES * 2**20
    import torch

    return int(torch.cuda.mem_get_info(device)[0] * GPU_SHARE)


def _build_within_memory(
    build: Callable[[int], Decoder], blocks: int, least: int
) -> tuple[Decoder, int]:
    while True:
        try:
            return build(blocks), blocks
        except Exception as error:
            if not out_of_memory(error):
                raise
        if blocks == least:
            raise UserError(
                "There is not enough memory for a conversation beside the model: close other "
                "programs, or choose a smaller --model or --quantize.",
                "memory",
            )
        blocks = max(least, blocks // 2)


def _compact_heap() -> None:
    """Return free memory that loading has left in glibc's heap, and keep the heap small: few
    arenas, and buffers of a megabyte or more are returned when freed. Without glibc: nothing."""
    arena_max, mmap_threshold, trim_threshold = -8, -3, -1  # malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(arena_max, 2)
        libc.mallopt(mmap_threshold, 2**20)
        libc.mallopt(trim_threshold, 2**20)
        libc.malloc_trim(0)


def thread_start(device: "torch.device", own_stream: bool = False) -> Callable[[], None]:
    """The function that a new thread which computes on `device` calls first. own_stream: the GPU
    works for it in parallel with other threads.

    By default, a new thread uses the first GPU. On the CPU it uses the number of threads that was
    set last, which `suitable_threads` changes for a moment: it is set to the caller's number.
    """
    import torch

    threads = torch.get_num_threads()

    def begin() -> None:
        torch.set_num_threads(threads)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        if device.type == "cuda" and own_stream:
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.default_stream(device))  # which has loaded the weights
            torch.cuda.set_stream(stream)

    return begin


def empty_cache(device: "torch.device") -> None:
    """Give memory that PyTorch caches but does not use back to the GPU."""
    if device.type == "cuda":
        import torch

        torch.cuda.empty_cache()


def threads() -> int:
    """The number of threads for a decoder: $OMP_NUM_THREADS, or else as many as the system and the
    container allow, at most eight, since more gain little."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    if asked.isdecimal() and int(asked) > 0:
        return min(int(asked), 8)
    if hasattr(os, "sched_getaffinity"):
        available = len(os.sched_getaffinity(0))
    else:
        available = os.cpu_count() or 1
    try:  # a container's quota: microseconds of processor time per period
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        available = min(available, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no quota ("max"), or no Linux
        pass
    return min(available, 8)
