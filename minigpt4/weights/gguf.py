"""A Llama as a GGUF file holds it: blocks of 4- and 8-bit weights, mapped into memory. No torch.

Reading a GGUF file's header takes seconds (its vocabulary is in there), so `write_index` notes once
where the tensors lie, and `BlockLlama.open` maps the file by that note in milliseconds.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

INDEX = "blocks.json"  # beside the GGUF file
_BLOCK = 32  # weights
_BLOCK_BYTES = {"Q4_1": 20, "Q8_0": 34}


@dataclass(frozen=True)
class BlockTensor:
    """A tensor's place in memory: `data` is uint8 [rows, bytes] in blocks, or float32 for "F32"."""

    kind: str  # "Q4_1", "Q8_0" or "F32"
    shape: tuple[int, ...]
    data: np.ndarray

    def numbers(self) -> np.ndarray:
        """Its weights as float32 [rows, columns]."""
        if self.kind == "F32":
            return self.data
        blocks = self.data.reshape(-1, _BLOCK_BYTES[self.kind])
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        if self.kind == "Q8_0":
            return (scale * blocks[:, 2:].view(np.int8)).reshape(self.shape)
        minimum = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
        codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        return (scale * codes + minimum).reshape(self.shape)


@dataclass(frozen=True)
class BlockLlama:
    """Sizes and tensors (under GGUF's names) of one Llama."""

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

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.heads

    @classmethod
    def open(cls, folder: str | Path) -> "BlockLlama":
        """Map the file that `folder`'s index describes. OSError, ValueError or KeyError where file
        or index are missing, cut or do not fit each other."""
        folder = Path(folder)
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        content = np.memmap(folder / index["file"], np.uint8, "r")
        tensors = {}
        for name, (kind, shape, offset) in index["tensors"].items():
            size = _size(kind, shape)
            data = content[offset : offset + size]
            if len(data) != size:
                raise ValueError(f"{index['file']} is cut short")
            data = data.view(np.float32) if kind == "F32" else data.reshape(shape[0], -1)
            tensors[name] = BlockTensor(kind, tuple(shape), data)
        return cls(**index["sizes"], tensors=tensors)


def _size(kind: str, shape: list[int]) -> int:
    count = int(np.prod(shape))
    return count * 4 if kind == "F32" else count // _BLOCK * _BLOCK_BYTES[kind]


def write_index(gguf: str | Path) -> Path:
    """Note beside a GGUF file of a Llama where its tensors lie; the note's own place.

    ValueError where the file holds another kind of model or of block.
    """
    from gguf import GGUFReader

    gguf = Path(gguf)
    reader = GGUFReader(str(gguf))  # by its name, as transformers asks: it may be read already

    def field(name: str) -> float:
        return reader.fields[f"llama.{name}"].contents()

    tensors = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        if kind != "F32" and kind not in _BLOCK_BYTES:
            raise ValueError(f"{tensor.name} is {kind}")
        shape = [int(n) for n in reversed(tensor.shape)]
        tensors[tensor.name] = [kind, shape, int(tensor.data_offset)]
    sizes = {
        "hidden_size": field("embedding_length"),
        "layers": field("block_count"),
        "heads": field("attention.head_count"),
        "kv_heads": field("attention.head_count_kv"),
        "intermediate_size": field("feed_forward_length"),
        "vocabulary": tensors["token_embd.weight"][1][0],
        "context": field("context_length"),
        "norm_eps": field("attention.layer_norm_rms_epsilon"),
        "rope_theta": field("rope.freq_base"),
    }
    index = {"file": gguf.name, "sizes": sizes, "tensors": tensors}
    place = gguf.with_name(INDEX)
    place.write_text(json.dumps(index), encoding="utf-8")
    return place
