"""The conversion of a language model for the CPU, made once: a Hugging Face folder -> a GGUF file
of 4-bit blocks.

Tensors are read one after the other, quantized and written to their places; the shards are not
changed. Matrices get the kinds of llama.cpp's Q4_K_M: 6 bits for embedding and head, and for
`attn_v` and `ffn_down` in half of the layers; 4 bits for the rest.
"""

import glob
import hashlib
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from huggingface_hub.utils import WeakFileLock
from torch import Tensor

from minigpt4.config import ModelConfig
from minigpt4.errors import Report, Step, UserError
from minigpt4.weights.folder import (
    EMBEDDING,
    HEAD,
    NORM,
    check_folder,
    check_is_no_delta,
    check_shape,
    has_own_head,
    read_config,
    read_tensor,
    read_tensors,
    shards_of,
)
from minigpt4.weights.gguf import (
    INDEX,
    INT4,
    LAYER_NAMES,
    ROPE_HALVES,
    Quantizer,
    check_sizes,
    neighbours,
    shapes_of,
    size_of,
    write_index,
)
from minigpt4.weights.llm import describe_gguf
from minigpt4.weights.sources import PARTS, mark_of, weights_folder
from minigpt4.weights.tokenizer import check_tokens, load_tokenizer
from minigpt4.weights.transfer import Progress, in_words

CHUNK = 2**20  # weights quantized at once by a thread
_ALIGNMENT = 32  # of a tensor in a GGUF file

_OUTER = {EMBEDDING: "token_embd.weight", NORM: "output_norm.weight", HEAD: "output.weight"}


def blocks_folder(llm: Path) -> Path:
    """The folder of a language model's 4-bit blocks, which may not exist yet. llm: a folder or a
    GGUF file.

    For a model in the weights folder, it is beside the 16-bit files. For a user's own files, it is
    a folder in the weights folder whose name changes with these files. If they were deleted, as
    they may be, it is the newest folder that was made from them.
    """
    if (llm / INDEX).exists():
        return llm
    weights = weights_folder().resolve()
    if not llm.is_symlink() and llm.is_dir() and llm.resolve().parent == weights:
        return llm / INT4
    name = f"{llm.stem}-{mark_of([], llm.resolve())}"
    files = [llm]
    if llm.is_dir():
        try:
            files = shards_of(llm)
        except ValueError:  # the conversion reports it
            files = []
    if not files or not all(file.exists() for file in files):
        made = [i.parent for i in weights.glob(f"{glob.escape(name)}-*-{INT4}/{INDEX}")]
        return max(made, key=lambda folder: folder.stat().st_mtime, default=weights / name)
    return weights / f"{name}-{mark_of(files)}-{INT4}"


def make_blocks(
    config: ModelConfig, llm: Path, quantize: Quantizer, threads: int, report: Report
) -> Path:
    """The folder with the blocks of a language model; it is made if it is missing.

    UserError if the model is incomplete, of another kind, or the disk is full or read-only.
    """
    target = blocks_folder(llm)
    if (target / INDEX).exists():
        return target
    scratch = weights_folder() / PARTS / target.name
    try:
        scratch.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(weights_folder() / ".lock"):  # another program may be converting it
            if not (target / INDEX).exists():
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir()
                if llm.is_dir():
                    _convert_folder(config, llm, scratch, quantize, threads, report)
                else:
                    _adopt_gguf(llm, scratch, report)
                scratch.rename(target)
    except OSError as error:
        raise UserError(
            f"{error.filename or target} cannot be written ({error.strerror or error}): name "
            "another folder in MINIGPT4_WEIGHTS."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with suppress(OSError):  # not empty, or never made
            scratch.parent.rmdir()
    if llm.is_dir():
        report(_advice(llm, target))
    return target


def _advice(llm: Path, target: Path) -> str:
    """How to free the space of the 16-bit files, or of the files that they link to, as in the hub's
    cache."""
    shards = shards_of(llm)
    size = in_words(sum(shard.stat().st_size for shard in shards))
    names = f"{shards[0].name.split('-')[0].removesuffix(shards[0].suffix)}*{shards[0].suffix}"
    places = f"{shlex.quote(str(llm))}/{names}"
    if any(shard.is_symlink() for shard in shards):
        places = shlex.join(str(shard.resolve()) for shard in shards)
    return (
        f"The 4-bit model is kept in {target}. It does not need the 16-bit files any more; to free "
        f"{size}: rm {places}"
    )


def _adopt_gguf(gguf: Path, target: Path, report: Report) -> None:
    """Make a folder for a user's own GGUF file, which stays where it is."""
    report(Step("reading", "Reading {name} (once) …", name=gguf.name))
    link = target / gguf.name
    link.symlink_to(gguf.resolve())
    describe_gguf(link, str(gguf))


# --- from a Hugging Face folder -----------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """A tensor of the new file: its kind, shape, and first byte after the header."""

    kind: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return size_of("", self.kind, list(self.shape))


def _convert_folder(
    config: ModelConfig,
    folder: Path,
    target: Path,
    quantize: Quantizer,
    threads: int,
    report: Report,
) -> None:
    from transformers.utils import logging as transformers_logging

    check_folder(folder, config)
    transformers_logging.set_verbosity_error()
    try:
        sizes, tied = read_sizes(folder)
        parts = _plan(sizes, tied)
        # A warning about another vocabulary comes when the blocks are loaded.
        check_shape((config.llm_vocabulary, sizes["hidden_size"]), folder, config)
        tokenizer = load_tokenizer(folder)
        check_tokens(tokenizer, sizes["vocabulary"], folder)
        embedding = read_tensor(folder, EMBEDDING)[:1000].clone()
        check_is_no_delta(embedding, read_tensor(folder, NORM), folder, config)
        total = sum(shard.stat().st_size for shard in shards_of(folder))
        _check_space(target, sum(part.size for part in parts.values()), total, report)
        path = target / f"{folder.name}-4bit.gguf"
        with (
            closing(Progress(config.name, total, report, "Converting")) as progress,
            progress.file(total) as count,
        ):
            _write(path, read_tensors(folder, count), sizes, parts, quantize, threads)
        tokenizer.save_pretrained(target)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        why = f"{error} is missing in config.json" if isinstance(error, KeyError) else error
        raise UserError(
            f"{folder} cannot be converted to 4 bit ({why}): move it away and fetch it again, "
            "or choose “--quantize none”."
        ) from error


def _check_space(target: Path, size: int, total: int, report: Report) -> None:
    free = shutil.disk_usage(target).free
    text = "Converting the language model to 4 bit (once): {size} of 16-bit weights → {other} …"
    report(Step("to_4_bit", text, size=in_words(total), other=in_words(size)))
    if size > free:
        raise UserError(
            f"The 4-bit model takes {in_words(size)}, and {weights_folder()} has {in_words(free)} "
            "free: make room, or name another folder in MINIGPT4_WEIGHTS."
        )


def read_sizes(folder: Path) -> tuple[dict[str, Any], bool]:
    """(the sizes for `BlockLlama` from a Hugging Face folder's config.json, is one matrix both
    embedding and head?).

    ValueError for a model that is computed in another way; OSError, ValueError, KeyError or
    TypeError for a damaged file.
    """
    settings = read_config(folder)
    kind = settings["model_type"]
    if kind not in ROPE_HALVES:
        raise ValueError(f"models of the type {kind} are not supported")
    # If both are given, transformers takes the older one.
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    for name, found, expected in (
        ("hidden_act", settings.get("hidden_act", "silu"), "silu"),
        ("rope type", rope.get("rope_type") or rope.get("type") or "default", "default"),
        ("attention_bias", bool(settings.get("attention_bias")), False),
        ("mlp_bias", bool(settings.get("mlp_bias")), False),
        ("use_sliding_window", bool(settings.get("use_sliding_window")), False),
    ):
        if found != expected:
            raise ValueError(f"{name} is {found}, which is not supported")
    heads = settings["num_attention_heads"]
    sizes = {
        "hidden_size": settings["hidden_size"],
        "layers": settings["num_hidden_layers"],
        "heads": heads,
        "kv_heads": settings.get("num_key_value_heads") or heads,
        "intermediate_size": settings["intermediate_size"],
        "vocabulary": settings["vocab_size"],
        "context": settings.get("max_position_embeddings") or 2048,
        "norm_eps": settings.get("rms_norm_eps", 1e-6),
        "rope_theta": float(rope.get("rope_theta") or settings.get("rope_theta") or 10000.0),
        "head_dim": settings.get("head_dim") or settings["hidden_size"] // max(heads, 1),
        "rope_halves": ROPE_HALVES[kind],
    }
    check_sizes(sizes)
    return sizes, bool(settings.get("tie_word_embeddings")) and not has_own_head(folder)


def planned_bytes(folder: Path) -> int:
    """Bytes that a folder's language model will take in 4 bit. ValueError, KeyError, TypeError or
    OSError if it cannot be converted."""
    return sum(part.size for part in _plan(*read_sizes(folder)).values())


def kind_of(name: str, shape: tuple[int, ...], layers: int) -> str:
    """The kind of block in which a tensor with this name (that of GGUF files) is written."""
    if len(shape) == 1:
        return "F32"
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    fine = not found or (found[2] in ("attn_v", "ffn_down") and _is_fine(int(found[1]), layers))
    columns = shape[-1]
    if columns % 32:
        return "F16"
    if columns % 256:
        return "Q8_0" if fine else "Q4_1"
    return "Q6_K" if fine else "Q4_K"


def _is_fine(layer: int, layers: int) -> bool:
    """Does this layer get 6 bits? The first and the last eighth of the layers do, and every third
    between, as in llama.cpp."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _plan(sizes: Mapping[str, Any], tied: bool) -> dict[str, _Part]:
    """The new file's tensors."""
    optional, required = shapes_of(**sizes)
    optional.pop("rope_freqs.weight")
    if not sizes["rope_halves"]:
        optional = {name: shape for name, shape in optional.items() if not name.endswith(".bias")}
    if tied:
        optional.pop("output.weight")
    parts, offset = {}, 0
    for name, shape in (required | optional).items():
        parts[name] = _Part(kind_of(name, shape, sizes["layers"]), shape, offset)
        offset += -(-parts[name].size // _ALIGNMENT) * _ALIGNMENT
    return parts


def new_name(name: str) -> str | None:
    """A Hugging Face tensor's name in a GGUF file; None for one that is not kept."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)", name)
    if found and found[2] in LAYER_NAMES:
        return f"blk.{found[1]}.{LAYER_NAMES[found[2]]}.{found[3]}"
    return _OUTER.get(name)


def _write(
    path: Path,
    tensors: Iterator[tuple[str, Tensor]],
    sizes: Mapping[str, Any],
    parts: Mapping[str, _Part],
    quantize: Quantizer,
    threads: int,
) -> None:
    """Write the file and its index."""
    start = _write_header(path, sizes, parts)
    digests: dict[str, str] = {}
    with path.open("r+b") as file, ThreadPoolExecutor(threads) as pool:
        for old_name, tensor in tensors:
            name = new_name(old_name)
            part = parts.get(name or "")
            if name is None or part is None:
                continue
            if tuple(tensor.shape) != part.shape:
                raise ValueError(f"{name} has the shape {tuple(tensor.shape)}, not {part.shape}")
            if not sizes["rope_halves"] and re.search(r"attn_[qk]\.", name):
                tensor = neighbours(tensor, sizes["head_dim"])
            file.seek(start + part.offset)
            digests[name] = _write_tensor(file, part, tensor, quantize, pool)
        file.flush()
        os.fsync(file.fileno())
    if lost := parts.keys() - digests.keys():
        raise ValueError(f"{min(lost)} is missing")
    write_index(path, digests)


def _write_tensor(
    file: BinaryIO, part: _Part, tensor: Tensor, quantize: Quantizer, pool: ThreadPoolExecutor
) -> str:
    """Quantize and write a tensor. Returns the SHA-256 of the bytes written."""

    def blocks(rows: Tensor) -> np.ndarray:
        numbers = np.ascontiguousarray(rows.float().numpy())
        if not np.isfinite(numbers).all():
            raise ValueError("a weight is not a finite number")
        if part.kind == "F32":
            return numbers
        return numbers.astype(np.float16) if part.kind == "F16" else quantize(part.kind, numbers)

    digest = hashlib.sha256()
    count = max(1, CHUNK // max(1, tensor[0].numel()))
    for written in pool.map(blocks, tensor.split(count)):
        file.write(written.data)
        digest.update(written.data)
    return digest.hexdigest()


def _write_header(path: Path, sizes: Mapping[str, Any], parts: Mapping[str, _Part]) -> int:
    """Write the file without the tensors. Returns the first tensor's place."""
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "qwen2" if sizes["rope_halves"] else "llama")
    writer.add_context_length(sizes["context"])
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_block_count(sizes["layers"])
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    writer.add_key_length(sizes["head_dim"])
    writer.add_value_length(sizes["head_dim"])
    writer.add_rope_dimension_count(sizes["head_dim"])
    writer.add_layer_norm_rms_eps(sizes["norm_eps"])
    writer.add_rope_freq_base(sizes["rope_theta"])
    writer.add_vocab_size(sizes["vocabulary"])
    for name, part in parts.items():
        kind = GGMLQuantizationType[part.kind]
        dtype = {"F32": np.float32, "F16": np.float16}.get(part.kind, np.uint8)
        rows = part.shape[0]
        shape = (rows, part.size // rows) if dtype is np.uint8 else part.shape
        writer.add_tensor_info(name, shape, np.dtype(dtype), part.size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    start = -(-path.stat().st_size // _ALIGNMENT) * _ALIGNMENT
    last = max(parts.values(), key=lambda part: part.offset)
    os.truncate(path, start + -(-(last.offset + last.size) // _ALIGNMENT) * _ALIGNMENT)
    return start
