"""The compiled decoder: `native.c` built for this machine, reading a GGUF file's blocks."""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_void_p

import numpy as np

from minigpt4.engine.kernels.build import (
    BLOCK,
    KINDS,
    MATRICES,
    CBatch,
    CLayer,
    CMatrix,
    CModel,
    library,
    why_not,
)
from minigpt4.engine.kvcache import BLOCK_SIZE
from minigpt4.engine.scheduler import Rows
from minigpt4.errors import Count, UserError, ignore
from minigpt4.weights.gguf import BLOCKS, BlockLlama, BlockTensor

MAX_ROWS = 256  # in one call of the library; more rows take several calls
_ALIGNMENT = 64  # bytes of a cache line


def whole_blocks(n: int) -> int:
    """n, rounded up to whole blocks."""
    return -(-n // BLOCK) * BLOCK


def _kernels(variant: str) -> ctypes.CDLL:
    kernels = library(variant)
    if kernels is None:
        raise OSError(why_not(variant)[0])
    return kernels


def quantize(kind: str, numbers: np.ndarray, variant: str = "native") -> np.ndarray:
    """Finite float32 [rows, columns] -> blocks of Q4_1, Q8_0, Q4_K or Q6_K, uint8 [rows, bytes].

    ValueError for another kind, OSError if the kernels could not be built.
    """
    kernels = _kernels(variant)
    weights, size = BLOCKS[kind]
    rows, columns = numbers.shape
    if columns % weights:
        raise ValueError(f"{kind} cannot have rows of {columns} weights")
    numbers = np.ascontiguousarray(numbers, np.float32)
    blocks: np.ndarray = np.empty((rows, columns // weights * size), np.uint8)
    place, count = numbers.ctypes.data, numbers.size
    if kernels.minigpt4_quantize(KINDS[kind], place, count, blocks.ctypes.data):
        raise ValueError(f"{kind} is not written")
    return blocks


class PackedMatrices:
    """Matrices in the kernels' order of blocks, in one allocation.

    No weight changes. Rows and columns are padded with zeros to whole blocks; if `group` is given,
    each group of so many rows (a head) is padded.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._wanted: dict[str, tuple[BlockTensor, int]] = {}
        self._matrices: dict[str, CMatrix] = {}
        self.memory: np.ndarray = np.zeros(0, np.uint8)

    def add(self, name: str, tensor: BlockTensor, group: int | None = None) -> None:
        """Note a matrix; `pack` packs all."""
        self._wanted[name] = tensor, group or tensor.shape[0]

    def __getitem__(self, name: str) -> CMatrix:
        return self._matrices[name]

    def pack(self, threads: int, done: Count = ignore) -> None:
        """Allocate the memory for all matrices and fill it. `done` is called with the bytes of each
        matrix that no longer needs its file."""
        offsets, end = {}, 0
        for name, (tensor, group) in self._wanted.items():
            rows = tensor.shape[0] // group * whole_blocks(group)
            matrix = CMatrix(None, KINDS[tensor.kind], rows, whole_blocks(tensor.shape[1]))
            self._matrices[name], offsets[name] = matrix, end
            size = self._library.minigpt4_matrix_bytes(ctypes.byref(matrix))
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        self.memory = np.zeros(end + _ALIGNMENT, np.uint8)
        start = -self.memory.ctypes.data % _ALIGNMENT + self.memory.ctypes.data
        for name, matrix in self._matrices.items():
            matrix.data = start + offsets[name]
        with ThreadPoolExecutor(threads) as pool:
            for size in pool.map(self._fill, self._wanted):
                done(size)
        self._wanted.clear()

    def _fill(self, name: str) -> int:
        tensor, group = self._wanted[name]
        if not tensor.is_sound():
            raise UserError(
                "The file with the language model's 4-bit blocks is damaged: delete the folder "
                "that it is in, and start again."
            )
        rows, columns = tensor.shape
        data = np.ascontiguousarray(tensor.data)
        for number in range(rows // group):
            self._library.minigpt4_pack(
                ctypes.byref(self._matrices[name]),
                data.ctypes.data + number * group * (data.nbytes // rows),
                columns,
                number * whole_blocks(group),
                group,
            )
        return data.nbytes


class NativeDecoder:
    """Runs rows through a `BlockLlama`.

    A row's results have the same bits whatever other rows are computed with it.
    kv_bits: 16 keeps keys and values as floats, 8 as integers with a scale for every 32 of them.
    blocks: uint8 [count, layers, key or value, kv_heads, bytes]; a block takes memory from the
    system only when it is first used.
    """

    name = "compiled"
    chunk_rows = (256, 32)

    def __init__(
        self,
        llama: BlockLlama,
        context: int,
        blocks: int,
        threads: int,
        variant: str = "native",
        count: Count = ignore,
        kv_bits: int = 16,
    ) -> None:
        self._library = _kernels(variant)
        self.vocabulary = llama.vocabulary
        self.hidden_size = llama.hidden_size
        self.kv_bits = kv_bits
        self._kept: list = []  # arrays that the library points into
        self._matrices = PackedMatrices(self._library)
        self._model = self._describe(llama, context, threads, count, kv_bits)
        llama.release()
        heads = (blocks, llama.layers, 2, llama.kv_heads)
        self.blocks: np.ndarray = np.zeros((*heads, _head_bytes(llama, kv_bits)), np.uint8)
        opened = self._library.minigpt4_open(ctypes.byref(self._model), threads, MAX_ROWS)
        if not opened:
            raise MemoryError("no memory for the decoder's buffers or threads")
        self._pool: c_void_p | None = c_void_p(opened)

    @staticmethod
    def block_bytes(llama: BlockLlama, kv_bits: int = 16) -> int:
        """Memory of one block."""
        return llama.layers * 2 * llama.kv_heads * _head_bytes(llama, kv_bits)

    def _describe(
        self, llama: BlockLlama, context: int, threads: int, count: Count, kv_bits: int
    ) -> CModel:
        self._matrices.add("head", llama.head)
        if llama.embedding is not llama.head:
            self._matrices.add("embedding", llama.embedding)
        for i in range(llama.layers):
            for field, name in MATRICES.items():
                group = llama.head_dim if field in "qkv" else None
                self._matrices.add(f"{i}.{field}", llama.tensors[f"blk.{i}.{name}.weight"], group)

        def done(size: int) -> None:
            llama.release()
            count(size)

        self._matrices.pack(threads, done)
        layers = (CLayer * llama.layers)()
        for i, layer in enumerate(layers):
            self._fill_layer(llama, i, layer)
        self._kept.append(layers)
        cosines, sines = _rotations(llama, context)
        head = self._matrices["head"]
        return CModel(
            llama.hidden_size,
            whole_blocks(llama.hidden_size),
            llama.layers,
            llama.heads,
            llama.kv_heads,
            llama.head_dim,
            whole_blocks(llama.head_dim),
            whole_blocks(llama.intermediate_size),
            llama.vocabulary,
            context,
            llama.rope_halves,
            kv_bits,
            llama.norm_eps,
            self._floats(llama.tensors["output_norm.weight"].data),
            self._keep(cosines),
            self._keep(sines),
            head if llama.embedding is llama.head else self._matrices["embedding"],
            head,
            layers,
        )

    def _fill_layer(self, llama: BlockLlama, number: int, layer: CLayer) -> None:
        block = f"blk.{number}."
        layer.attention_norm = self._floats(llama.tensors[f"{block}attn_norm.weight"].data)
        layer.mlp_norm = self._floats(llama.tensors[f"{block}ffn_norm.weight"].data)
        for field in MATRICES:
            setattr(layer, field, self._matrices[f"{number}.{field}"])
        for name in "qkv":
            if bias := llama.tensors.get(f"{block}attn_{name}.bias"):
                setattr(layer, f"{name}_bias", self._floats(bias.data.reshape(-1, llama.head_dim)))

    def _floats(self, array: np.ndarray) -> int:
        """The address of a float32 copy whose rows are padded to whole blocks."""
        array = np.atleast_2d(array)
        padded: np.ndarray = np.zeros((len(array), whole_blocks(array.shape[1])), np.float32)
        padded[:, : array.shape[1]] = array
        return self._keep(padded)

    def _keep(self, array: np.ndarray) -> int:
        """The address of the array as float32, which is kept as long as the decoder."""
        self._kept.append(np.ascontiguousarray(array, np.float32))
        return self._kept[-1].ctypes.data

    def forward(self, rows: Rows) -> np.ndarray:
        """Logits float32 [wanted rows, vocabulary]; keys and values of all rows are kept.

        ValueError if an index in `rows` is out of range.
        """
        parts = [self._call(part) for part in rows.split(MAX_ROWS)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _call(self, rows: Rows) -> np.ndarray:
        logits: np.ndarray = np.empty((len(rows.wanted), self.vocabulary), np.float32)
        numbers = [rows.tokens, rows.positions, rows.table_rows, rows.tables, rows.wanted]
        tokens, positions, table_rows, tables, wanted = (
            np.ascontiguousarray(array, np.int32) for array in numbers
        )
        embeds = np.ascontiguousarray(rows.embeds, np.float32)
        if embeds.shape[1:] != (self.hidden_size,) or not (
            len(tokens) == len(positions) == len(table_rows)
        ):
            raise ValueError("the rows' arrays do not fit each other")
        arrays = (tokens, embeds, positions, table_rows, tables, wanted, self.blocks, logits)
        sizes = (len(tokens), len(wanted), len(embeds), *tables.shape, len(self.blocks))
        batch = CBatch(*sizes, *(array.ctypes.data for array in arrays))
        if self._library.minigpt4_forward(self._pool, ctypes.byref(batch)):
            raise ValueError("a row's token, position, block or embedding does not exist")
        return logits

    def copy_block(self, source: int, target: int) -> None:
        self.blocks[target] = self.blocks[source]

    def close(self) -> None:
        """End the threads and free the buffers."""
        if self._pool:
            self._library.minigpt4_close(self._pool)
            self._pool = None

    def __del__(self) -> None:
        if getattr(self, "_pool", None):
            self.close()


def _head_bytes(llama: BlockLlama, kv_bits: int) -> int:
    """Bytes of a block's keys, or values, of one head in one layer."""
    numbers = BLOCK_SIZE * whole_blocks(llama.head_dim)
    return numbers + numbers // BLOCK * 2 if kv_bits == 8 else numbers * 2


def _rotations(llama: BlockLlama, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [context, head_dim / 2] of the rotary embedding's angles."""
    exponents = np.arange(0, llama.head_dim, 2, dtype=np.float64) / llama.head_dim
    frequencies = llama.rope_theta**-exponents
    if factors := llama.tensors.get("rope_freqs.weight"):
        frequencies = frequencies / factors.data
    angles = np.arange(context)[:, None] * frequencies
    return np.cos(angles), np.sin(angles)
