"""A language model in a GGUF file: blocks of quantized weights, mapped into memory. No torch.

Reading a GGUF file's header takes seconds (the vocabulary is in there), so `write_index` writes
once an index of the tensors' places, with which `BlockLlama.open` maps the file in milliseconds.
"""

import hashlib
import json
import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from gguf import GGUFReader

INDEX = "blocks.json"  # beside the GGUF file
INT4 = "int4"  # the folder of a converted model within its Hugging Face folder

# Kind -> (weights in a block, bytes of a block).
BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
# (kind, float32 [rows, columns]) -> the blocks, uint8 [rows, bytes]
Quantizer = Callable[[str, np.ndarray], np.ndarray]
# Architecture -> does its rotary embedding rotate the halves of a head (else neighbouring pairs)?
ROPE_HALVES = {"llama": False, "qwen2": True}
LAYER_NAMES = {  # name in a Hugging Face layer -> in a GGUF file
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
MOST_HEAD_DIM = 256
MOST_ERROR = 0.08  # between two copies of one matrix in 4-bit blocks; mini's (8 and 5 bits): 0.05
_MOST_LAYERS = 1024
_MOST = 2**24  # of any size: far more than models have, and no product of two overflows 64 bits


@dataclass(frozen=True)
class BlockTensor:
    """A tensor's place in memory: `data` is uint8 [rows, bytes] in blocks, or float32 for "F32".

    sha256: of its bytes, if the file's index has it, or "".
    """

    kind: str  # of BLOCKS
    shape: tuple[int, ...]
    data: np.ndarray
    sha256: str = ""

    def is_sound(self) -> bool:
        """Are the bytes unchanged since they were written? True if the index has no hash."""
        return not self.sha256 or hashlib.sha256(self.data.data).hexdigest() == self.sha256

    def numbers(self) -> np.ndarray:
        """The weights as float32 [rows, columns]."""
        if self.kind == "F32":
            return self.data
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        return dequantize(self.data, GGMLQuantizationType[self.kind]).reshape(self.shape)


@dataclass(frozen=True)
class BlockLlama:
    """Sizes and tensors (under GGUF's names) of one Llama- or Qwen2-style model.

    rope_halves: rotary embeddings rotate number i of a head with number i + head_dim / 2 (Qwen2),
    not with its neighbour (Llama, for which GGUF files reorder the rows of q and k).
    If one matrix is both embedding and head, there is only one of their tensors. ValueError if a
    tensor is missing, unknown or does not fit the others' sizes.
    """

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    vocabulary: int
    context: int
    norm_eps: float
    rope_theta: float
    tensors: dict[str, BlockTensor]
    head_dim: int = 0  # 0: hidden_size / heads
    rope_halves: bool = False
    mapping: mmap.mmap | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // max(self.heads, 1))
        check_sizes(vars(self))
        _check_tensors(self)

    @property
    def embedding(self) -> BlockTensor:
        """[vocabulary, hidden_size]"""
        return self.tensors.get("token_embd.weight") or self.tensors["output.weight"]

    @property
    def head(self) -> BlockTensor:
        """[vocabulary, hidden_size]"""
        return self.tensors.get("output.weight") or self.tensors["token_embd.weight"]

    @classmethod
    def open(cls, folder: str | Path) -> "BlockLlama":
        """Map the file that `folder`'s index describes. OSError or ValueError if file or index are
        missing, cut short or do not fit each other."""
        try:
            return cls._open(Path(folder))
        except (AttributeError, IndexError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{INDEX} is damaged") from error

    @classmethod
    def _open(cls, folder: Path) -> "BlockLlama":
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        with (folder / index["file"]).open("rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        content = np.frombuffer(mapping, np.uint8)
        tensors, digests = {}, index.get("sha256", {})
        for name, (kind, shape, offset) in index["tensors"].items():
            size = size_of(name, kind, shape)
            if not isinstance(offset, int) or not 0 <= offset <= len(content) - size:
                raise ValueError(f"{index['file']} is cut short")
            data = content[offset : offset + size]
            plain = kind == "F32"
            data = data.view(np.float32).reshape(shape) if plain else data.reshape(shape[0], -1)
            tensors[name] = BlockTensor(kind, tuple(shape), data, digests.get(name, ""))
        return cls(**index["sizes"], tensors=tensors, mapping=mapping)

    def release(self) -> None:
        """Release the memory of the file's parts that were read; they are read again when used."""
        if self.mapping is not None and hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)


def size_of(name: str, kind: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor; ValueError if there is no such tensor."""
    if kind not in BLOCKS:
        raise ValueError(
            f"{name} is of kind {kind}, which is not supported: {', '.join(BLOCKS)} are"
        )
    if not 1 <= len(shape) <= 2 or not all(isinstance(n, int) and 0 < n <= _MOST for n in shape):
        raise ValueError(f"{name} has the shape {shape}")
    weights, size = BLOCKS[kind]
    if shape[-1] % weights:
        raise ValueError(f"{name} has rows of {shape[-1]} weights, which {kind} cannot have")
    return math.prod(shape) // weights * size


def neighbours(rows: Any, head_dim: int) -> Any:
    """Reorder rows of q or k [heads * head_dim, ...] (array or tensor, in the order of Hugging
    Face's Llamas) so that the rotary embedding rotates each with its neighbour."""
    halves = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """ValueError if a model with these sizes (`BlockLlama`'s) cannot exist or is not supported."""
    names = "hidden_size layers heads kv_heads intermediate_size vocabulary context head_dim"
    for name in names.split():
        value, most = sizes[name], _MOST_LAYERS if name == "layers" else _MOST
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name} is {value}")
    for name in ("norm_eps", "rope_theta"):
        value = sizes[name]
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} is {value}")
    if sizes["heads"] % sizes["kv_heads"]:
        raise ValueError(f"{sizes['heads']} heads cannot share {sizes['kv_heads']} heads of keys")
    if sizes["head_dim"] % 2 or sizes["head_dim"] > MOST_HEAD_DIM:
        raise ValueError(f"heads of {sizes['head_dim']} numbers are not supported")


def _check_tensors(llama: BlockLlama) -> None:
    optional, required = shapes_of(**vars(llama))
    shapes = optional | required
    for name in required.keys() - llama.tensors.keys():
        raise ValueError(f"{name} is missing")
    if not {"token_embd.weight", "output.weight"} & llama.tensors.keys():
        raise ValueError("token_embd.weight is missing")
    for name, tensor in llama.tensors.items():
        if name not in shapes:
            raise ValueError(f"{name} is not a tensor of a Llama or Qwen2 model")
        if tensor.shape != shapes[name]:
            raise ValueError(f"{name} has the shape {tensor.shape}, not {shapes[name]}")
        if len(tensor.shape) == 1 and tensor.kind != "F32":
            raise ValueError(f"{name} is {tensor.kind}, not F32")
        if tensor.data.nbytes != size_of(name, tensor.kind, list(tensor.shape)):
            raise ValueError(f"{name} has {tensor.data.nbytes} bytes")


def shapes_of(
    *,
    hidden_size: int,
    layers: int,
    heads: int,
    kv_heads: int,
    intermediate_size: int,
    vocabulary: int,
    head_dim: int,
    **_: Any,
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Name -> shape: (of the tensors that may be there, of those that must be)."""
    hidden, inner = hidden_size, intermediate_size
    q, kv = heads * head_dim, kv_heads * head_dim
    optional: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (vocabulary, hidden),
        "output.weight": (vocabulary, hidden),
        "rope_freqs.weight": (head_dim // 2,),
    }
    required: dict[str, tuple[int, ...]] = {"output_norm.weight": (hidden,)}
    for i in range(layers):
        block = {
            "attn_norm": (hidden,),
            "attn_q": (q, hidden),
            "attn_k": (kv, hidden),
            "attn_v": (kv, hidden),
            "attn_output": (hidden, q),
            "ffn_norm": (hidden,),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }
        required |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
        optional |= {
            f"blk.{i}.attn_{name}.bias": (n,) for name, n in zip("qkv", (q, kv, kv), strict=True)
        }
    return optional, required


# --- the index ------------------------------------------------------------------------------------


def write_index(gguf: str | Path, digests: Mapping[str, str] | None = None) -> Path:
    """Write an index of the tensors' places beside a GGUF file of a Llama or Qwen2. Returns the
    index's path.

    digests: SHA-256 of the tensors, which are checked whenever the model is opened. If `token_embd`
    and `output` are one matrix, the index has only `output`. They are if their digests are equal;
    without digests, if they differ by no more than quantization explains. ValueError if the file
    holds another kind of model or of block; any other error if it is damaged.
    """
    gguf = Path(gguf)
    reader = _reader(gguf)
    tensors, blocks = {}, {}
    for tensor in reader.tensors:
        name, kind = tensor.name, tensor.tensor_type.name
        shape = tuple(int(n) for n in reversed(tensor.shape))
        size_of(name, kind, shape)
        tensors[name] = kind, shape, int(tensor.data_offset)
        blocks[name] = BlockTensor(kind, shape, tensor.data)
    sizes = _read_sizes({name: reader.fields[name].contents for name in reader.fields})
    sizes["vocabulary"] = tensors["token_embd.weight"][1][0]
    BlockLlama(**sizes, tensors=blocks)  # raises if one is missing
    first, last = "token_embd.weight", "output.weight"
    if last in blocks and (
        digests[first] == digests[last] if digests else _same(blocks[first], blocks[last])
    ):
        del tensors[first]
    index = {"file": gguf.name, "sizes": sizes, "tensors": tensors, "sha256": dict(digests or {})}
    place = gguf.with_name(INDEX)
    place.write_text(json.dumps(index), encoding="utf-8")
    return place


def _reader(gguf: Path) -> "GGUFReader":
    """The file's header. ValueError for a kind that is not supported, EOFError if it is cut
    short."""
    from gguf import GGUFReader

    with gguf.open("rb") as file:
        magic, version = file.read(4), file.read(4)
    if not b"GGUF".startswith(magic):
        raise ValueError("it does not begin with “GGUF”")
    if len(version) == 4 and version not in (b"\2\0\0\0", b"\3\0\0\0"):
        raise ValueError("it is not of version 2 or 3, or is big-endian")
    try:
        return GGUFReader(str(gguf))  # a string, as from transformers: it may be cached (llm.py)
    except ValueError as error:  # from NumPy
        raise EOFError(str(error)) from error


def read_width(gguf: Path) -> int:
    """The hidden size in a GGUF file's header. Any exception if it cannot be read."""
    from gguf import GGUFReader

    fields = GGUFReader(str(gguf)).fields
    architecture = fields["general.architecture"].contents()
    return int(fields[f"{architecture}.embedding_length"].contents())


def gguf_of(folder: Path) -> Path:
    """The GGUF file that the folder's index names; if the index is broken, one that does not
    exist."""
    try:
        return folder / json.loads((folder / INDEX).read_text(encoding="utf-8"))["file"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return folder / "*.gguf"


def _read_sizes(fields: Mapping) -> dict[str, Any]:
    """The sizes for `BlockLlama` from a GGUF file's fields (name -> function that reads it).

    The values have the types that the file gives them; `BlockLlama` checks them. ValueError for a
    model that is computed in another way.
    """
    architecture = fields["general.architecture"]()
    if architecture not in ROPE_HALVES:
        known = ", ".join(ROPE_HALVES)
        raise ValueError(
            f"models of the architecture {architecture} are not supported: {known} are"
        )

    def read(name: str, default: Any = None) -> Any:
        name = f"{architecture}.{name}"
        if name in fields:
            return fields[name]()
        if default is None:
            raise ValueError(f"{name} is missing")
        return default

    heads = read("attention.head_count")
    sizes = {
        "hidden_size": read("embedding_length"),
        "layers": read("block_count"),
        "heads": heads,
        "kv_heads": read("attention.head_count_kv", heads),
        "intermediate_size": read("feed_forward_length"),
        "context": read("context_length"),
        "norm_eps": read("attention.layer_norm_rms_epsilon"),
        "rope_theta": read("rope.freq_base", 10000.0),
        "head_dim": read("attention.key_length", read("embedding_length") // heads),
        "rope_halves": ROPE_HALVES[architecture],
    }
    for name, expected in (
        ("rope.scaling.type", "none"),
        ("rope.dimension_count", sizes["head_dim"]),
        ("attention.value_length", sizes["head_dim"]),
        ("attention.sliding_window", 0),
        ("expert_count", 0),
    ):
        if (found := read(name, expected)) != expected:
            raise ValueError(f"{architecture}.{name} is {found}, which is not supported")
    for name in ("rope.scaling.factor", "rope.scale_linear"):  # linear, unless a type says "none"
        if (found := read(name, 1)) not in (0, 1) and not read("rope.scaling.type", ""):
            raise ValueError(f"{architecture}.{name} is {found}, which is not supported")
    return sizes


def _same(embedding: BlockTensor, head: BlockTensor, rows: int = 4096) -> bool:
    """Are these two the same matrix, apart from quantization?"""
    if embedding.shape != head.shape:
        return False
    for start in range(0, embedding.shape[0], rows):
        shape = (len(embedding.data[start : start + rows]), embedding.shape[1])
        a, b = (
            BlockTensor(t.kind, shape, t.data[start : start + rows]).numbers()
            for t in (embedding, head)
        )
        if np.linalg.norm(a - b) > MOST_ERROR * np.linalg.norm(b):
            return False
    return True
