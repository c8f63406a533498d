"""Compile the GPU's kernels for one architecture, on a machine without a GPU.

`python -m tests.gpu_compile 80` prints one line for each kernel at the shapes of a 7B model: its
name, registers, spilled bytes and shared memory; or "skip" and the reason. TRITON_INTERPRET must
not be 1.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minigpt4.engine.gpu import kernels

TYPES = {
    "x": "*fp16", "norm": "*fp16", "weight": "*i8", "scale": "*fp32", "bias": "*fp16",
    "residual": "*fp16", "out": "*fp16", "rows": "i32", "eps": "fp32", "qkv": "*fp16",
    "inputs": "*i32", "stride": "i32", "cosines": "*fp32", "sines": "*fp32", "keys": "*fp16",
    "values": "*fp16", "key_scales": "*fp32", "value_scales": "*fp32", "partial": "*fp32",
    "lse": "*fp32", "factor": "fp32",
}  # fmt: skip
HEAD = dict(D=128, BLOCK_D=128, SPLITS=kernels.SPLITS)
HEADS = dict(HEADS=32, KV_HEADS=32, PAGE=16)


def cases(dot: bool):
    """(name, kernel, constants, warps, types that differ)."""
    for name, rows, n, k, silu, used in (
        ("qkv", 1, 12288, 4096, False, "norm"),
        ("gate_up", 32, 11008, 4096, True, "norm"),
        ("output", 1, 4096, 4096, False, "residual"),
        ("down", 32, 4096, 11008, False, "residual"),
        ("head", 32, 32001, 4096, False, "norm"),
    ):
        none = {key: None for key in ("norm", "bias", "residual") if key != used}
        sizes = kernels.linear_blocks(rows, n, k, dot)
        constants = dict(N=n, K=k, SILU=silu, DOT=dot, **sizes, **none)
        differ = {"out": "*fp32"} if name == "head" else {}
        yield name, kernels.linear_kernel, constants, 4, differ
    rotation = dict(HALF=64, BLOCK_D=64)
    tiles = dict(TILE=kernels.TILE, STEPS=2048 // kernels.TILE // kernels.SPLITS)
    floats, eight = dict(key_scales=None, value_scales=None), dict(keys="*i8", values="*i8")
    for bits, none, differ in ((16, floats, {}), (8, {}, eight)):
        yield f"rotate{bits}", kernels.rotate_and_store_kernel, HEADS | rotation | none, 1, differ
        yield f"attend{bits}", kernels.attend_kernel, HEADS | HEAD | tiles | none, 4, differ
    yield "combine", kernels.combine_kernel, HEAD, 1, {}
    yield "embed", kernels.embed_kernel, dict(K=4096, BLOCK_K=1024), 4, {}


def usage(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, spilled bytes), as NVIDIA's cuobjdump says."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def main() -> None:
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    for name, kernel, constants, warps, differ in cases(dot=target.arch >= 80):
        signature = {
            key: "constexpr" if key in constants else (TYPES | differ)[key]
            for key in kernel.arg_names
        }
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, kind in enumerate(signature.values())
            if kind.startswith("*")
        }
        source = ASTSource(kernel, signature, constants, aligned)
        options = {"num_warps": warps, "num_stages": 4}
        try:
            compiled = triton.compile(source, target=target, options=options)
        except (FileNotFoundError, RuntimeError) as error:
            if "ptxas" not in str(error):
                raise
            print("skip: Triton's assembler cannot run here:", error)
            return
        print(name, *usage(compiled.asm["cubin"]), compiled.metadata.shared)


if __name__ == "__main__":
    main()
