"""`native.c` compiled for this machine, and its structures and functions for Python."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int32, c_size_t, c_void_p
from pathlib import Path
from typing import Any

from minigpt4._data import cache_folder
from minigpt4.data.files import replacing, shortened

_SOURCE = Path(__file__).parent.with_name("native.c")
_FLAGS = ("-O2", "-fno-math-errno", "-std=gnu11", "-Wno-psabi", "-shared", "-fPIC", "-pthread")
# Compiler options of each variant. "native" is used, or "plain" if it does not compile; tests
# compare them.
VARIANTS = {
    "native": ("-march=native",),
    "avx2": ("-march=x86-64-v3",),
    "plain": ("-DMINIGPT4_PLAIN",),
    "checked": ("-DMINIGPT4_PLAIN", "-O1"),  # for sanitizers, under which -O3 takes minutes
}
KINDS = dict(  # as GGUF numbers them
    F32=0, F16=1, Q4_0=2, Q4_1=3, Q5_0=6, Q5_1=7, Q8_0=8, Q4_K=12, Q5_K=13, Q6_K=14
)
BLOCK = 32  # rows and columns that are stored together

FAILED: dict[str, str] = {}  # variant -> why it could not be built or opened
_tried: set[str] = set()  # variants that `library` has looked for in this process

log = logging.getLogger(__name__)


class CMatrix(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("kind", c_int32), ("rows", c_int32), ("columns", c_int32)]


MATRICES = {  # of a layer, and their names in GGUF files
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}


class CLayer(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("attention_norm", "mlp_norm")),
        *((name, c_void_p) for name in ("q_bias", "k_bias", "v_bias")),
        *((name, CMatrix) for name in MATRICES),
    ]


class CModel(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("hidden", "hidden_width", "layers", "heads", "kv_heads")),
        *((name, c_int32) for name in ("head_dim", "head_width", "inner_width")),
        *((name, c_int32) for name in ("vocabulary", "context", "rope_halves", "kv_bits")),
        ("norm_eps", c_float),
        *((name, c_void_p) for name in ("final_norm", "cosines", "sines")),
        ("embedding", CMatrix),
        ("head", CMatrix),
        ("layer", POINTER(CLayer)),
    ]


class CBatch(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("rows", "logit_rows", "embed_rows", "conversations")),
        *((name, c_int32) for name in ("table_width", "page_count")),
        *((name, c_void_p) for name in ("tokens", "embeds", "positions", "table_rows")),
        *((name, c_void_p) for name in ("tables", "wanted", "pages", "logits")),
    ]


_FUNCTIONS: dict[str, tuple[Any, list]] = {  # name -> (result, arguments)
    "open": (c_void_p, [POINTER(CModel), c_int32, c_int32]),
    "forward": (c_int32, [c_void_p, POINTER(CBatch)]),
    "close": (None, [c_void_p]),
    "matrix_bytes": (c_size_t, [POINTER(CMatrix)]),
    "pack": (None, [POINTER(CMatrix), c_void_p, c_int32, c_int32, c_int32]),
    "quantize": (c_int32, [c_int32, c_void_p, c_size_t, c_void_p]),
    "unpack": (None, [POINTER(CMatrix), c_int32, c_void_p]),
    "multiply": (c_int32, [POINTER(CMatrix), c_void_p, c_int32, c_void_p]),
}


@functools.cache
def library(variant: str = "native") -> ctypes.CDLL | None:
    """The compiled `native.c`, built the first time (seconds); None if that is not possible."""
    _tried.add(variant)
    try:
        loaded = ctypes.CDLL(str(_find_or_build(variant)))
    except (OSError, subprocess.SubprocessError) as error:
        log.debug("the CPU kernels could not be built", exc_info=True)
        FAILED[variant] = shortened(getattr(error, "strerror", None) or error)
        return None
    finally:
        if _scratch_folder.cache_info().currsize:  # a library that is open needs no file
            shutil.rmtree(_scratch_folder(), ignore_errors=True)
            _scratch_folder.cache_clear()
    for name, (result, arguments) in _FUNCTIONS.items():
        function = loaded[f"minigpt4_{name}"]
        function.restype, function.argtypes = result, arguments
        setattr(loaded, f"minigpt4_{name}", function)
    return loaded


def must_compile(variant: str = "native") -> bool:
    """Whether `library` has to compile first, which takes seconds."""
    return variant not in _tried and _compiler() is not None and _kept(variant) is None


def why_not(variant: str = "native") -> tuple[str, str]:
    """Why `library` returned None, and what to do: the beginning and the end of a sentence."""
    compiler, reason = _compiler(), FAILED.get(variant)
    if compiler is None:
        return "No C compiler was found", "install gcc or clang, or set $CC"
    if named := os.environ.get("CC"):
        why = f"The C compiler “{named}”, which $CC names, failed ({reason})"
        return why, "correct $CC, or unset it"
    return f"The C compiler {compiler[0]} failed ({reason})", "mend this, or set $CC to another"


def _place(folder: Path, variant: str) -> Path:
    return folder / f"native-{_fingerprint(variant)}.so"


def _find_or_build(variant: str) -> Path:
    """The path of the build, made if necessary. OSError if there is no compiler or it fails."""
    if kept := _kept(variant):
        return kept
    compiler = _compiler()
    if compiler is None:
        raise OSError("no C compiler was found")
    built = _place(_build_folder() or _scratch_folder(), variant)
    try:
        _build(compiler, VARIANTS[variant], built)
    except OSError:
        if variant != "native":
            raise
        _build(compiler, VARIANTS["plain"], built)  # a compiler without -march=native
    return built


def _kept(variant: str) -> Path | None:
    """An existing build, even in a folder that cannot be written; not one of another user."""
    try:
        place = _place(_build_folder() or cache_folder(), variant)
        own = place.stat().st_uid in (0, getattr(os, "getuid", int)())
    except (OSError, RuntimeError):  # RuntimeError: a user without a home folder
        return None
    return place if own else None


def _compiler() -> list[str] | None:
    """The C compiler that $CC names, or one that is installed."""
    if named := os.environ.get("CC"):
        return named.split()
    found = next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    return [found] if found else None


def _fingerprint(variant: str) -> str:
    """A hash of the sources, $CC, the options, and the processor. Not of the compiler that was
    found: an existing build can be used without one."""
    processor = platform.machine() + platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += next((x for x in lines if x.startswith(("flags", "Features"))), "")
    except OSError:
        pass
    options = [os.environ.get("CC", ""), *_FLAGS, *VARIANTS[variant], processor]
    content = hashlib.sha256(" ".join(options).encode())
    for file in (_SOURCE, *sorted(Path(__file__).parent.glob("*.h"))):
        content.update(file.read_bytes())
    return content.hexdigest()[:16]


def _build_folder() -> Path | None:
    """A folder in which a build can be kept, or None. Only this user may write to it, since its
    files are executed."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: a user without a home folder
        pass
    return None


@functools.cache
def _scratch_folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="minigpt4-"))


def _build(compiler: Sequence[str], options: Sequence[str], target: Path) -> None:
    with replacing(target, shared=True) as partial:
        command = [*compiler, *_FLAGS, *options, str(_SOURCE), "-o", str(partial), "-lm"]
        done = subprocess.run(command, capture_output=True, timeout=300)
        if done.returncode:
            said = done.stderr.decode("utf-8", "replace").splitlines()
            reason = next((line for line in said if "error" in line or "failed" in line), "")
            raise OSError(shortened(reason.strip()) or f"exit status {done.returncode}")
