"""The GPU's kernels in Triton's interpreter against PyTorch, and compiled without a GPU."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from minigpt4.engine.kvcache import BLOCK_SIZE
from minigpt4.weights.int8 import Int8Weight, quantize_rows

pytest.importorskip("triton", reason="Triton is not installed: it needs Linux on x86-64")
from minigpt4.engine.gpu import kernels  # noqa: E402
from tests.running import python

ROOT = Path(__file__).parent.parent


def weight(n: int, k: int, bias: bool = False) -> tuple[Int8Weight, torch.Tensor]:
    """A random layer, and its weight in float32."""
    numbers, scale = quantize_rows(torch.randn(n, k) * 0.05)
    layer = Int8Weight(numbers, scale, torch.randn(n) if bias else None)
    return layer, numbers.float() * scale[:, None]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the rounding of the kernel's 16-bit operands, or of float32."""
    bound = 4e-3 if found.dtype == torch.float16 else 1e-5
    error = (found.float() - expected.float()).abs().max().item()
    assert error <= bound * max(1.0, expected.abs().max().item()), error


def inputs_of(lengths: list[int], width: int, padding: int = 0) -> torch.Tensor:
    """A step's inputs for sequences of these lengths, with scattered blocks, then padding rows."""
    rows = len(lengths) + padding
    inputs = torch.zeros(rows, 2 + width, dtype=torch.int32)
    inputs[:, 1] = -1
    inputs[: len(lengths), 1] = torch.tensor(lengths) - 1
    blocks = torch.randperm(len(lengths) * width, dtype=torch.int32)
    inputs[: len(lengths), 2:] = blocks.view(len(lengths), width)
    return inputs


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rows", "n", "k", "dot"),
    [(1, 48, 64, True), (20, 33, 160, True), (1, 48, 64, False), (3, 33, 136, False)],
)
@pytest.mark.parametrize("kind", ["plain", "norm_bias", "residual", "norm_silu"])
def test_linear(kind, rows, n, k, dot, dtype):
    """Whole and partial blocks of rows, outputs and inputs."""
    torch.manual_seed(0)
    x = torch.randn(rows, k).to(dtype)
    silu = kind == "norm_silu"
    layer, full = weight(2 * n if silu else n, k, bias=kind == "norm_bias")
    norm = torch.rand(k).to(dtype) if "norm" in kind else None
    residual = torch.randn(rows, n).to(dtype) if kind == "residual" else None
    found = torch.full((rows, n), float("nan"), dtype=dtype)
    kernels.linear(x, layer, found, norm=norm, residual=residual, silu=silu, eps=1e-6, dot=dot)
    wide = x.float()
    if norm is not None:
        wide = F.rms_norm(wide, (k,), norm.float(), 1e-6)
    expected = F.linear(wide, full, layer.bias)
    if silu:
        gate, up = expected.chunk(2, 1)
        expected = F.silu(gate) * up
    if residual is not None:
        expected = expected + residual.float()
    close(found, expected)


def test_a_head_has_more_precise_outputs_than_inputs():
    torch.manual_seed(1)
    x, (layer, full) = torch.randn(2, 64).half(), weight(101, 64)
    found = torch.empty(2, 101)
    kernels.linear(x, layer, found)
    torch.testing.assert_close(found, x.float() @ full.T, atol=1e-4, rtol=1e-4)


def test_embedding():
    table, full = weight(50, 1100)
    inputs = inputs_of([3, 4, 5], 1)
    inputs[:, 0] = torch.tensor([49, 0, 7])
    found = torch.empty(3, 1100, dtype=torch.float16)
    kernels.embed(inputs, table, found)
    close(found, full[[49, 0, 7]])


HEADS = [(2, 2, 64), (3, 1, 80), (4, 2, 128)]


def in_8_bits(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[2, slots, kv_heads, head_dim] -> int8 numbers, and a scale for each slot and head."""
    numbers, scales = quantize_rows(cache.flatten(0, 2))
    return numbers.view_as(cache), scales.view(cache.shape[:3])


@pytest.mark.parametrize("kv_bits", [16, 8])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_rotation_and_the_write_of_keys_and_values(heads, kv_heads, head_dim, kv_bits):
    """Positions at both sides of a block's edge; a row of padding changes nothing."""
    torch.manual_seed(2)
    lengths, width, context = [1, BLOCK_SIZE, BLOCK_SIZE + 1, 37], 3, 48
    inputs = inputs_of(lengths, width, padding=1)
    qkv = torch.randn(5, heads + 2 * kv_heads, head_dim).half()
    before = qkv.float()
    cache = torch.zeros(2, len(lengths) * width * BLOCK_SIZE, kv_heads, head_dim).half()
    expected = cache.float()
    angles = torch.outer(torch.arange(context), 1e4 ** -torch.linspace(0, 1, head_dim // 2))
    scales = None
    if kv_bits == 8:
        cache, scales = in_8_bits(cache)
    kernels.rotate_and_store(qkv, inputs, (angles.cos(), angles.sin()), cache, scales)
    for row, length in enumerate(lengths):
        p = length - 1
        cosine, sine = (torch.cat([f(angles[p])] * 2) for f in (torch.cos, torch.sin))
        first, second = before[row].chunk(2, 1)
        turned = before[row] * cosine + torch.cat([-second, first], 1) * sine
        close(qkv[row, :heads], turned[:heads])
        slot = inputs[row, 2 + p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
        expected[0, slot] = turned[heads : heads + kv_heads]
        expected[1, slot] = before[row, heads + kv_heads :]
    if scales is None:
        close(cache, expected)
    else:
        error = (cache.float() * scales[..., None] - expected).abs()
        assert (error <= 0.51 * scales[..., None] + 4e-3).all()
        written = expected.abs().amax(-1) > 0
        assert (cache[written].abs().amax(-1) == 127).all() and not cache[~written].any()
    assert torch.equal(qkv[4].float(), before[4])


@pytest.mark.parametrize("kv_bits", [16, 8])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), HEADS)
def test_attention(heads, kv_heads, head_dim, kv_bits):
    """Lengths around the edges of blocks, tiles and splits; a row of padding gives zeros."""
    torch.manual_seed(3)
    edge = kernels.TILE * kernels.SPLITS
    lengths, width = [1, 16, 33, edge - 1, edge + 1], edge // BLOCK_SIZE + 2
    inputs = inputs_of(lengths, width, padding=1)
    qkv = torch.randn(6, heads + 2 * kv_heads, head_dim).half()
    cache = torch.randn(2, len(lengths) * width * BLOCK_SIZE, kv_heads, head_dim).half()
    out = torch.full((6, heads, head_dim), float("nan"), dtype=torch.float16)
    partial = torch.empty(6 * heads * kernels.SPLITS * (head_dim + 1))
    stored, scales = in_8_bits(cache) if kv_bits == 8 else (cache, None)
    if scales is not None:
        cache = stored * scales[..., None]
    kernels.attend(qkv, inputs, stored, scales, out, partial)
    for row, length in enumerate(lengths):
        t = torch.arange(length)
        slots = inputs[row, 2 + t // BLOCK_SIZE] * BLOCK_SIZE + t % BLOCK_SIZE
        key, value = cache[:, slots].float().transpose(1, 2)  # [kv_heads, length, head_dim]
        query = qkv[row, :heads, None].float()
        expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        close(out[row], expected[:, 0])
    assert not out[5].any()


@pytest.mark.parametrize("capability", [75, 80, 90])
def test_compiles_without_a_gpu(capability, tmp_path):
    """At the shapes of a 7B model: no spills, at most 168 registers a thread, so that three blocks
    of 128 threads fit on a multiprocessor, and at most 64 KB of shared memory."""
    variables = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = python("-m", "tests.gpu_compile", str(capability), **variables)
    if done.stdout.startswith("skip"):
        pytest.skip(done.stdout)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) >= 5
    for name, *numbers in lines:
        registers, spills, shared = map(int, numbers)
        assert registers <= 168 and spills == 0 and shared <= 64 * 1024, (name, numbers)
