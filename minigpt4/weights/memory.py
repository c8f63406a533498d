"""The memory that a model needs on the CPU, and the free memory: compared before loading."""

import math
from collections.abc import Iterator
from pathlib import Path

import torch

from minigpt4.config import MODELS, ModelConfig, Quantize
from minigpt4.errors import UserError
from minigpt4.model.bridge import build_bridge
from minigpt4.model.parts import EvaViT
from minigpt4.model.vision import build_encoder
from minigpt4.weights.convert import blocks_folder, planned_bytes, read_sizes
from minigpt4.weights.gguf import INDEX, BlockLlama, shapes_of
from minigpt4.weights.transfer import in_words

LIBRARIES = 600 * 10**6  # Python, PyTorch and transformers once they are loaded
_BLOCK = 16  # positions; the engine's cache has at least a whole context of them, and one more
_CGROUPS = Path("/sys/fs/cgroup")


# --- how much there is --------------------------------------------------------------------------


def free_memory(mapped: int = 0) -> int | None:
    """Bytes that this process can still allocate; None if the system does not tell.

    This is the minimum of the machine's free memory, the limits of the process's control groups
    (containers), and the rest of its address space after `mapped` bytes of files.
    """
    found = [*_machine(), *_control_groups(), *(n - mapped for n in _address_space())]
    return max(0, min(found)) if found else None


def _machine() -> Iterator[int]:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _control_groups() -> Iterator[int]:
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            yield from _group(_CGROUPS, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            yield from _group(_CGROUPS / "memory", path, *names)


def _group(root: Path, path: str, limit: str, usage: str, cache: str) -> Iterator[int]:
    """For a group and each group that contains it: its limit minus its memory in use, without the
    pages of files."""
    folder = root / path.lstrip("/")
    for group in (folder, *folder.parents):
        if not group.is_relative_to(root):
            return
        most, used = _number(group / limit), _number(group / usage)
        if most is not None and used is not None:
            reclaimable = sum(
                int(line.split()[1])
                for line in _lines(group / "memory.stat")
                if line.startswith(f"{cache} ")
            )
            yield most - used + reclaimable


def _number(file: Path) -> int | None:
    """The number in a file; None if there is no such file, or no limit."""
    text = next(iter(_lines(file)), "")
    return int(text) if text.isdecimal() and int(text) < 2**60 else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _address_space() -> Iterator[int]:
    try:
        import resource  # Windows has none

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    except (ImportError, OSError, ValueError):
        return
    if limit == resource.RLIM_INFINITY:
        return
    for line in _lines(Path("/proc/self/statm")):
        yield limit - int(line.split()[0]) * resource.getpagesize()


# --- how much is needed -------------------------------------------------------------------------


def check_memory(
    config: ModelConfig,
    llm: Path,
    quantize: Quantize,
    llm_dtype: torch.dtype,
    vision_dtype: torch.dtype | None,
) -> None:
    """UserError if the CPU's memory is too small for the model, the libraries and a conversation.
    It says how much is needed and free, and what would fit.

    llm_dtype: of a language model that is not quantized; vision_dtype: of the encoder (None: 32
    bit). If a language model's folder cannot be read, the loader reports it.
    """
    size = (vision_dtype or torch.float32).itemsize
    eight_bit = quantize == "int4" and isinstance(config.vision, EvaViT)
    try:
        weights = llm_bytes(llm, quantize, llm_dtype.itemsize)
        chat = chat_bytes(config, llm, quantize, llm_dtype)
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return
    needed = weights + chat + LIBRARIES + vision_bytes(config, size, 1 if eight_bit else size)
    free = free_memory(weights if quantize == "int4" else 0)
    if free is not None and needed > free:
        raise too_little(config, quantize, needed, free)


def too_little(
    config: ModelConfig, quantize: Quantize, needed: int | None = None, free: int | None = None
) -> UserError:
    """The error for a model that does not fit into the CPU's memory."""
    free = free_memory() if free is None else free
    amount = f" needs about {in_words(needed)} of memory" if needed else " does not fit into memory"
    there = f", and {in_words(free)} are free" if free is not None else ""
    return UserError(f"{config.name}{amount}{there}: {_advice(config, quantize, free)}.", "memory")


def _advice(config: ModelConfig, quantize: Quantize, free: int | None) -> str:
    room = (free or 0) / 1e9
    if quantize not in ("int4", "remote") and 0 < config.cpu_gigabytes <= room:
        return f"choose “--quantize int4”, which needs {config.cpu_gigabytes:g} GB"
    fitting = [m for m in MODELS.values() if 0 < m.cpu_gigabytes <= room]
    smaller = [m for m in fitting if m.cpu_gigabytes < (config.cpu_gigabytes or math.inf)]
    if smaller:
        best = max(smaller, key=lambda m: m.cpu_gigabytes)
        return f"choose “--model {best.name}”, which needs {best.cpu_gigabytes:g} GB"
    return "close other programs, or raise the limit on memory"


def llm_bytes(llm: Path, quantize: Quantize, size: int) -> int:
    """Bytes of the language model's weights. Weights that are not quantized have `size` bytes each;
    bitsandbytes holds them in 16 bit while it loads."""
    if quantize == "int4":
        folder = blocks_folder(llm)
        if (folder / INDEX).exists():
            tensors = BlockLlama.open(folder).tensors.values()
            return sum(tensor.data.nbytes for tensor in tensors)
        return planned_bytes(llm) if llm.is_dir() else llm.stat().st_size
    sizes, tied = read_sizes(llm)
    optional, required = shapes_of(**sizes)
    for name in ["token_embd.weight"] if tied else ["token_embd.weight", "output.weight"]:
        required[name] = optional[name]
    counts = [math.prod(shape) for shape in required.values()]
    if quantize == "w8a16":  # plus two copies in 32 bit of the matrix being quantized or used
        return sum(counts) + 8 * max(counts)
    return sum(counts) * (size if quantize == "none" else 2)


def chat_bytes(config: ModelConfig, llm: Path, quantize: Quantize, llm_dtype: torch.dtype) -> int:
    """Bytes of the keys and values of the longest conversation, to which the cache of a large model
    may grow. Many conversations with a small one need more."""
    if quantize == "int4" and (blocks_folder(llm) / INDEX).exists():
        sizes = vars(BlockLlama.open(blocks_folder(llm)))
    elif llm.is_dir():
        sizes, _ = read_sizes(llm)
    else:
        return 0
    width = sizes["kv_heads"] * sizes["head_dim"]
    if quantize == "int4":  # with 8 bits, 32 numbers share a scale of 16 bits
        size = 2.0 if config.kv_bits == 16 else 17 / 16
    else:  # with 8 bits, a head's numbers share a scale of 32 bits
        size = 1 + 4 / sizes["head_dim"] if config.kv_bits == 8 else llm_dtype.itemsize
    positions = (-(-config.context // _BLOCK) + 1) * _BLOCK
    return int(positions * sizes["layers"] * 2 * width * size)


def vision_bytes(config: ModelConfig, size: int, encoder_size: int) -> int:
    """Bytes of bridge and projection, with `size` bytes a number, and of the encoder, with
    `encoder_size` bytes a number."""
    with torch.device("meta"):
        encoder, bridge = build_encoder(config.vision), build_bridge(config)
    counts = [sum(p.numel() for p in part.parameters()) for part in (encoder, bridge)]
    return encoder_size * counts[0] + size * (
        counts[1] + config.projection_in * config.llm_hidden_size
    )
