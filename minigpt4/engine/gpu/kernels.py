"""Triton kernels of one decoding step: a row is the newest token of one sequence.

A step's `inputs` are int32 [rows, 2 + width]: token, position, then the sequence's blocks. A row
with position -1 is padding: it reads and writes no keys or values. The weights are int8 with one
float32 scale per output channel; sums are float32. Loop bounds are compile-time constants, which
Triton's interpreter needs. Keys and values are floats, or int8 with a float32 scale for each slot
and head: `scales` is None, or has those of the keys, then those of the values.
"""

import triton
import triton.language as tl
from torch import Tensor

from minigpt4.engine.kvcache import BLOCK_SIZE
from minigpt4.weights.int8 import Int8Weight

TILE = 32  # positions that one step of attention's loop reads
SPLITS = 8  # programs among which one head's positions are divided
NONE = (None, None)  # for a cache without scales


@triton.jit
def embed_kernel(inputs, stride, weight, scale, out, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """out[row] = the embedding of the row's token."""
    row = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    token = tl.load(inputs + row * stride).to(tl.int64)
    numbers = tl.load(weight + token * K + k, mask=k < K, other=0).to(tl.float32)
    embedding = numbers * tl.load(scale + token)
    tl.store(out + row * K + k, embedding.to(out.dtype.element_ty), mask=k < K)


@triton.jit
def multiply(x, numbers, sums, DOT: tl.constexpr):
    """sums + x [M, K] @ numbers [K, N], on tensor cores (DOT) or else in float32."""
    if DOT:
        return tl.dot(x, numbers.to(x.dtype), sums, input_precision="ieee")
    return sums + tl.sum(x.to(tl.float32)[:, :, None] * numbers.to(tl.float32)[None, :, :], 1)


@triton.jit
def linear_kernel(
    x, norm, weight, scale, bias, residual, out, rows, eps,
    N: tl.constexpr, K: tl.constexpr, SILU: tl.constexpr, DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = f(rms_norm(x) @ weight.T * scale + bias) + residual.

    `norm`, `bias` and `residual` may be None. SILU: the weight has 2 N outputs, and f is
    silu(first half) * second half; else f changes nothing. The norm's factor is one number per row,
    so it is applied to the sums: one pass over x is enough.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    in_n, in_m = n < N, m < rows
    w_at = weight + n.to(tl.int64)[None, :] * K + k[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    ups = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, K, BLOCK_K):
        in_k = start + k < K
        inside = in_m[:, None] & in_k[None, :]
        values = tl.load(x + m[:, None] * K + (start + k)[None, :], mask=inside, other=0.0)
        if norm is not None:
            wide = values.to(tl.float32)
            squares += tl.sum(wide * wide, 1)
            factor = tl.load(norm + start + k, mask=in_k, other=0.0).to(tl.float32)
            values = (wide * factor[None, :]).to(values.dtype)
        inside = in_k[:, None] & in_n[None, :]
        numbers = tl.load(w_at + start, mask=inside, other=0)
        sums = multiply(values, numbers, sums, DOT)
        if SILU:
            numbers = tl.load(w_at + N * K + start, mask=inside, other=0)
            ups = multiply(values, numbers, ups, DOT)
    sums *= tl.load(scale + n, mask=in_n, other=0.0)[None, :]
    if norm is not None:
        squares = tl.rsqrt(squares / K + eps)
        sums *= squares[:, None]
    if bias is not None:
        sums += tl.load(bias + n, mask=in_n, other=0.0).to(tl.float32)[None, :]
    if SILU:
        ups *= tl.load(scale + N + n, mask=in_n, other=0.0)[None, :]
        if norm is not None:
            ups *= squares[:, None]
        sums = sums / (1 + tl.exp(-sums)) * ups
    at = m[:, None] * N + n[None, :]
    inside = in_m[:, None] & in_n[None, :]
    if residual is not None:
        sums += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def store_head(cache, scales, place, first, second, d, HALF: tl.constexpr):
    """A head's two halves -> the cache, as int8 if it has scales."""
    inside = d < HALF
    if scales is not None:
        largest = tl.maximum(
            tl.max(tl.where(inside, tl.abs(first), 0.0), 0),
            tl.max(tl.where(inside, tl.abs(second), 0.0), 0),
        )
        scale = tl.maximum(largest, 1e-12) / 127
        tl.store(scales + place, scale)
        first = tl.floor(first / scale + 0.5)
        second = tl.floor(second / scale + 0.5)
    target = cache + place * 2 * HALF + d
    tl.store(target, first.to(cache.dtype.element_ty), mask=inside)
    tl.store(target + HALF, second.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def rotate_and_store_kernel(
    qkv, inputs, stride, cosines, sines, keys, values, key_scales, value_scales,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Rotate a row's queries in place, and write its rotated keys and its values to their slot."""
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(inputs + row * stride + 1)
    if position >= 0:
        d = tl.arange(0, BLOCK_D)
        inside = d < HALF
        source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF + d
        first = tl.load(source, mask=inside).to(tl.float32)
        second = tl.load(source + HALF, mask=inside).to(tl.float32)
        if head < HEADS + KV_HEADS:
            cosine = tl.load(cosines + position * HALF + d, mask=inside)
            sine = tl.load(sines + position * HALF + d, mask=inside)
            turned = first * cosine - second * sine
            second = second * cosine + first * sine
            first = turned
        block = tl.load(inputs + row * stride + 2 + position // PAGE).to(tl.int64)
        slot = (block * PAGE + position % PAGE) * KV_HEADS
        if head < HEADS:
            tl.store(source, first.to(qkv.dtype.element_ty), mask=inside)
            tl.store(source + HALF, second.to(qkv.dtype.element_ty), mask=inside)
        elif head < HEADS + KV_HEADS:
            store_head(keys, key_scales, slot + head - HEADS, first, second, d, HALF)
        else:
            store_head(values, value_scales, slot + head - HEADS - KV_HEADS, first, second, d, HALF)


@triton.jit
def attend_kernel(
    qkv, inputs, stride, keys, values, key_scales, value_scales, partial, lse, factor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, STEPS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One head's attention over every SPLITS-th tile of a row's positions, with a running maximum
    as in flash attention; `lse` is the logarithm of the sum of its weights."""
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(inputs + row * stride + 1) + 1
    d = tl.arange(0, BLOCK_D)
    in_d = d < D
    source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * D + d
    query = tl.load(source, mask=in_d, other=0.0).to(tl.float32) * factor
    largest = -float("inf")
    total = 0.0
    sums = tl.zeros((BLOCK_D,), tl.float32)
    for step in range(STEPS):
        start = (step * SPLITS + split) * TILE
        if start < length:
            t = start + tl.arange(0, TILE)
            valid = t < length
            block = tl.load(inputs + row * stride + 2 + t // PAGE, mask=valid, other=0)
            slot = (block.to(tl.int64) * PAGE + t % PAGE) * KV_HEADS + head // (HEADS // KV_HEADS)
            at = slot[:, None] * D + d[None, :]
            inside = valid[:, None] & in_d[None, :]
            key = tl.load(keys + at, mask=inside, other=0.0).to(tl.float32)
            score = tl.sum(key * query[None, :], 1)
            if key_scales is not None:
                score *= tl.load(key_scales + slot, mask=valid, other=0.0)
            score = tl.where(valid, score, -float("inf"))
            new = tl.maximum(largest, tl.max(score, 0))
            weight = tl.exp(score - new)
            value = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
            decay = tl.exp(largest - new)
            total = total * decay + tl.sum(weight, 0)
            if value_scales is not None:
                weight *= tl.load(value_scales + slot, mask=valid, other=0.0)
            sums = sums * decay + tl.sum(value * weight[:, None], 0)
            largest = new
    place = (row * HEADS + head) * SPLITS + split
    tl.store(partial + place * D + d, sums / tl.maximum(total, 1e-30), mask=in_d)
    tl.store(lse + place, largest + tl.log(tl.maximum(total, 1e-30)))


@triton.jit
def combine_kernel(
    partial, lse, out,
    D: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """out[row, head] = the splits' results, weighted by their share of the softmax."""
    place = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    s = tl.arange(0, SPLITS)
    logs = tl.load(lse + place * SPLITS + s)
    weight = tl.exp(logs - tl.maximum(tl.max(logs, 0), -1e30))  # padding has only -inf
    at = partial + (place * SPLITS + s)[:, None] * D + d[None, :]
    parts = tl.load(at, mask=(d < D)[None, :], other=0.0)
    total = tl.maximum(tl.sum(weight, 0), 1e-30)
    attended = tl.sum(parts * weight[:, None], 0) / total
    tl.store(out + place * D + d, attended.to(out.dtype.element_ty), mask=d < D)


# --- launches -----------------------------------------------------------------------------------


def embed(inputs: Tensor, table: Int8Weight, out: Tensor) -> None:
    """The tokens' embeddings -> out [rows, hidden_size]."""
    rows, width = out.shape
    block = min(1024, triton.next_power_of_2(width))
    grid = (rows, triton.cdiv(width, block))
    embed_kernel[grid](
        inputs, inputs.stride(0), table.numbers, table.scale, out, K=width, BLOCK_K=block
    )


def linear(
    x: Tensor,
    layer: Int8Weight,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    residual: Tensor | None = None,
    silu: bool = False,
    eps: float = 0.0,
    dot: bool = True,
) -> None:
    """x [rows, K] -> out [rows, N]; see `linear_kernel`. dot: use tensor cores."""
    rows, n = out.shape
    k = x.shape[1]
    blocks = linear_blocks(rows, n, k, dot)
    grid = (triton.cdiv(n, blocks["BLOCK_N"]), triton.cdiv(rows, blocks["BLOCK_M"]))
    linear_kernel[grid](
        x, norm, layer.numbers, layer.scale, layer.bias, residual, out, rows, eps,
        N=n, K=k, SILU=silu, DOT=dot, **blocks, num_warps=4, num_stages=4,
    )  # fmt: skip


def linear_blocks(rows: int, n: int, k: int, dot: bool) -> dict[str, int]:
    """The part of the product that one program computes. If there are few outputs, the parts are
    smaller, so that every multiprocessor reads weights."""
    block_k = max(16, min(128, triton.next_power_of_2(k)))
    if not dot:
        return {"BLOCK_M": 1, "BLOCK_N": 16, "BLOCK_K": block_k}
    block_n = 16 if n <= 8192 else 32
    if rows <= 16 and n <= 8192:  # there is room to load more bytes at once
        block_k = max(16, min(256, triton.next_power_of_2(k)))
    return {"BLOCK_M": 16 if rows <= 16 else 32, "BLOCK_N": block_n, "BLOCK_K": block_k}


def rotate_and_store(
    qkv: Tensor,
    inputs: Tensor,
    rotation: tuple[Tensor, Tensor],
    cache: Tensor,
    scales: Tensor | None,
) -> None:
    """Rotary embedding of qkv [rows, heads + 2 kv_heads, head_dim], and the write to the cache.

    rotation: cosines and sines, float32 [context, head_dim / 2]. cache: keys and values, [2, slots,
    kv_heads, head_dim]; scales: of an int8 cache, [2, slots, kv_heads].
    """
    rows, heads, head_dim = qkv.shape
    kv_heads = cache.shape[2]
    rotate_and_store_kernel[(rows, heads)](
        qkv, inputs, inputs.stride(0), *rotation, *cache, *(scales if scales is not None else NONE),
        HEADS=heads - 2 * kv_heads, KV_HEADS=kv_heads, HALF=head_dim // 2,
        BLOCK_D=triton.next_power_of_2(head_dim // 2), PAGE=BLOCK_SIZE, num_warps=1,
    )  # fmt: skip


def attend(
    qkv: Tensor, inputs: Tensor, cache: Tensor, scales: Tensor | None, out: Tensor, partial: Tensor
) -> None:
    """Attention of each row's queries over its keys and values -> out [rows, heads, head_dim].

    cache, scales: see `rotate_and_store`. partial: float32 [rows * heads * SPLITS * (head_dim + 1)]
    or more, for the results that the first kernel passes to the second.
    """
    rows, heads, head_dim = out.shape
    kv_heads = cache.shape[2]
    count = rows * heads * SPLITS
    partial, lse = partial[: count * head_dim], partial[count * head_dim :]
    block_d = triton.next_power_of_2(head_dim)
    context = (inputs.shape[1] - 2) * BLOCK_SIZE
    attend_kernel[(rows, heads, SPLITS)](
        qkv, inputs, inputs.stride(0), *cache, *(scales if scales is not None else NONE),
        partial, lse, head_dim**-0.5,
        HEADS=heads, KV_HEADS=kv_heads, D=head_dim, BLOCK_D=block_d, PAGE=BLOCK_SIZE,
        TILE=TILE, STEPS=triton.cdiv(context, TILE * SPLITS), SPLITS=SPLITS,
    )  # fmt: skip
    combine_kernel[(rows * heads,)](
        partial, lse, out, D=head_dim, BLOCK_D=block_d, SPLITS=SPLITS, num_warps=1
    )
