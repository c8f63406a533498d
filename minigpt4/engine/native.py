"""The compiled decoder: `native.c` built for this machine, reading a GGUF file's blocks."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32, c_void_p
from pathlib import Path

import numpy as np

from minigpt4.engine.rows import PAGE, Rows
from minigpt4.weights.gguf import BlockLlama

MAX_ROWS = 256  # in one call of the library; longer ones are cut
_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-std=gnu11", "-shared", "-fPIC", "-pthread")
_TYPES = {"Q4_1": 3, "Q8_0": 8}  # as GGUF numbers them

log = logging.getLogger(__name__)


class _Matrix(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("type", c_int32), ("rows", c_int32), ("columns", c_int32)]


_MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


class _Layer(ctypes.Structure):
    _fields_ = [("attention_norm", c_void_p), ("mlp_norm", c_void_p)] + [
        (name, _Matrix) for name in _MATRICES
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("hidden", "layers", "heads", "kv_heads", "head_dim")),
        *((name, c_int32) for name in ("intermediate", "vocabulary", "context")),
        ("norm_eps", c_float),
        *((name, c_void_p) for name in ("final_norm", "cosines", "sines")),
        ("embedding", _Matrix),
        ("head", _Matrix),
        ("layer", POINTER(_Layer)),
    ]


class _Batch(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("rows", "logit_rows", "table_width")),
        *((name, c_void_p) for name in ("tokens", "embeds", "positions", "table_rows")),
        *((name, c_void_p) for name in ("tables", "wanted", "pages", "logits")),
    ]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled `native.c`, built the first time (seconds); None where that cannot be."""
    compiler = _compiler()
    try:
        built = _cache_folder() / f"native-{_fingerprint(compiler)}.so"
        if not built.exists():
            if compiler is None:
                return None
            _build(compiler, built)
        loaded = ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("the CPU kernels could not be built: %s", error)
        return None
    loaded.minigpt4_open.restype = c_void_p
    loaded.minigpt4_open.argtypes = [POINTER(_Model), c_int32, c_int32]
    loaded.minigpt4_forward.argtypes = [c_void_p, POINTER(_Batch)]
    loaded.minigpt4_forward.restype = None
    loaded.minigpt4_panels.argtypes = [c_void_p, c_void_p, c_int32, c_int32, c_int32]
    loaded.minigpt4_panels.restype = None
    loaded.minigpt4_close.argtypes = [c_void_p]
    loaded.minigpt4_close.restype = None
    return loaded


def _compiler() -> list[str] | None:
    """The C compiler that $CC names, or one that is installed."""
    if named := os.environ.get("CC"):
        return named.split()
    found = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    return [found] if found else None


def _fingerprint(compiler: Sequence[str] | None) -> str:
    """Of the source, the compiler's name and options, and the processor it was built for."""
    processor = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += next((x for x in lines if x.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    content = _SOURCE.read_bytes() + " ".join([*(compiler or ()), *_FLAGS, processor]).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _cache_folder() -> Path:
    """Where builds are kept; a folder of this user alone, since what lies there is executed."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = home / "minigpt4"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return _scratch_folder()


@functools.cache
def _scratch_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="minigpt4-"))


def _build(compiler: Sequence[str], target: Path) -> None:
    print("Compiling the CPU kernels (once) …", file=sys.stderr, flush=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    command = [*compiler, *_FLAGS, str(_SOURCE), "-o", str(partial), "-lm"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise OSError(f"{compiler[0]} failed: {done.stderr[-500:]}")
    partial.replace(target)


class NativeDecoder:
    """Runs rows through a `BlockLlama`; keys and values lie in pages of 16-bit floats.

    pages: [count, layers, key or value, kv_heads, PAGE * head_dim]; memory that no conversation has
    used yet is not taken from the system.
    """

    exact = True  # a row's numbers are the same bits whatever else is computed beside it

    def __init__(self, llama: BlockLlama, context: int, pages: int, threads: int) -> None:
        self._library = library()
        if self._library is None:
            raise OSError("there is no C compiler, and no build of the kernels")
        self.vocabulary = llama.vocabulary
        self.hidden_size = llama.hidden_size
        self._kept = []  # arrays that the library points into
        self._model = self._describe(llama, context)
        shape = (pages, llama.layers, 2, llama.kv_heads, PAGE * llama.head_dim)
        self.pages = np.zeros(shape, np.float16)
        opened = self._library.minigpt4_open(ctypes.byref(self._model), threads, MAX_ROWS)
        if not opened:
            raise MemoryError("no memory for the decoder's buffers or threads")
        self._pool = c_void_p(opened)

    @staticmethod
    def page_bytes(llama: BlockLlama) -> int:
        """Memory of one page."""
        return 2 * llama.layers * 2 * llama.kv_heads * PAGE * llama.head_dim

    def _describe(self, llama: BlockLlama, context: int) -> _Model:
        tensors = llama.tensors

        def floats(array: np.ndarray) -> int:
            array = np.ascontiguousarray(array, np.float32)
            self._kept.append(array)
            return array.ctypes.data

        @functools.cache  # the embedding is the head as well
        def matrix(name: str) -> _Matrix:
            tensor = tensors[name]
            kind, (rows, columns) = _TYPES[tensor.kind], tensor.shape
            panels = np.empty_like(tensor.data, subok=False)
            blocks = np.ascontiguousarray(tensor.data)
            self._library.minigpt4_panels(
                blocks.ctypes.data, panels.ctypes.data, rows, columns, kind
            )
            self._kept.append(panels)
            return _Matrix(panels.ctypes.data, kind, rows, columns)

        names = dict(zip(_MATRICES, ("attn_q", "attn_k", "attn_v", "attn_output"), strict=False))
        names |= {"gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
        layers = (_Layer * llama.layers)()
        for i, layer in enumerate(layers):
            layer.attention_norm = floats(tensors[f"blk.{i}.attn_norm.weight"].data)
            layer.mlp_norm = floats(tensors[f"blk.{i}.ffn_norm.weight"].data)
            for field, name in names.items():
                setattr(layer, field, matrix(f"blk.{i}.{name}.weight"))
        self._kept.append(layers)
        head_dim = llama.head_dim
        frequencies = llama.rope_theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        angles = np.arange(context)[:, None] * frequencies
        head = "output.weight" if "output.weight" in tensors else "token_embd.weight"
        return _Model(
            llama.hidden_size,
            llama.layers,
            llama.heads,
            llama.kv_heads,
            head_dim,
            llama.intermediate_size,
            llama.vocabulary,
            context,
            llama.norm_eps,
            floats(tensors["output_norm.weight"].data),
            floats(np.cos(angles)),
            floats(np.sin(angles)),
            matrix("token_embd.weight"),
            matrix(head),
            layers,
        )

    def forward(self, rows: Rows) -> np.ndarray:
        """Logits float32 [wanted rows, vocabulary]; keys and values of all rows are kept."""
        parts = [self._call(part) for part in rows.split(MAX_ROWS)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _call(self, rows: Rows) -> np.ndarray:
        logits = np.empty((len(rows.wanted), self.vocabulary), np.float32)
        arrays = [
            np.ascontiguousarray(rows.tokens, np.int32),
            np.ascontiguousarray(rows.embeds, np.float32),
            np.ascontiguousarray(rows.positions, np.int32),
            np.ascontiguousarray(rows.table_rows, np.int32),
            np.ascontiguousarray(rows.tables, np.int32),
            np.ascontiguousarray(rows.wanted, np.int32),
            self.pages,
            logits,
        ]
        batch = _Batch(
            len(arrays[0]),
            len(rows.wanted),
            arrays[4].shape[1],
            *(array.ctypes.data for array in arrays),
        )
        self._library.minigpt4_forward(self._pool, ctypes.byref(batch))
        return logits

    def copy_page(self, source: int, target: int) -> None:
        """Give page `target` what `source` holds."""
        self.pages[target] = self.pages[source]

    def close(self) -> None:
        """End the threads and give the buffers back."""
        if self._pool:
            self._library.minigpt4_close(self._pool)
            self._pool = None

    def __del__(self) -> None:
        if getattr(self, "_pool", None):
            self.close()
