"""GGUF's kinds of blocks, through the compiled kernels: nothing of a weight is lost."""

import ctypes

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from minigpt4.engine.kernels.build import library
from minigpt4.engine.native import PackedMatrices
from minigpt4.weights.gguf import BLOCKS, BlockTensor
from tests.random_blocks import random_tensor

ROWS, COLUMNS = 83, 768  # no whole number of panels; three blocks of the K kinds

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler: install gcc")


def packed(tensor: BlockTensor, variant: str, group: int | None = None) -> PackedMatrices:
    matrices = PackedMatrices(library(variant))
    matrices.add("it", tensor, group)
    matrices.pack(1)
    return matrices


def unpacked(matrices: PackedMatrices, variant: str) -> np.ndarray:
    matrix = matrices["it"]
    found = np.empty((matrix.rows, matrix.columns), np.float32)
    for row in range(matrix.rows):
        library(variant).minigpt4_unpack(ctypes.byref(matrix), row, found[row].ctypes.data)
    return found


def times(matrices: PackedMatrices, variant: str, x: np.ndarray) -> np.ndarray:
    matrix = matrices["it"]
    found = np.empty((len(x), matrix.rows), np.float32)
    assert library(variant).minigpt4_multiply(
        ctypes.byref(matrix), x.ctypes.data, len(x), found.ctypes.data
    )
    return found


@pytest.fixture(params=["native", "avx2", "plain"])
def variant(request) -> str:
    if library(request.param) is None or not runs_here(request.param):
        pytest.skip(f"{request.param}: not on this processor")
    return request.param


def runs_here(variant: str) -> bool:
    if variant != "avx2":
        return True
    import torch

    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


@pytest.mark.parametrize("kind", BLOCKS)
def test_weights_are_what_gguf_says(kind, variant):
    tensor = random_tensor(kind, ROWS, COLUMNS)
    expected = tensor.data
    if kind != "F32":
        expected = dequantize(tensor.data, GGMLQuantizationType[kind])
    assert np.array_equal(tensor.numbers(), expected.reshape(ROWS, COLUMNS))
    found = unpacked(packed(tensor, variant), variant)
    assert np.array_equal(found[:ROWS], tensor.numbers())
    assert not found[ROWS:].any()


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 23])
def test_products_are_those_of_floats(kind, count, variant):
    """Numbers are rounded to 16 bits in blocks of 32, so each is off by at most 1/65534 of its
    block's largest: with random signs, 40 standard deviations are never seen."""
    tensor = random_tensor(kind, ROWS, COLUMNS, seed=1)
    x = np.random.default_rng(2).normal(size=(count, COLUMNS)).astype(np.float32)
    found = times(packed(tensor, variant), variant, x)
    weights = tensor.numbers().astype(np.float64)
    largest = np.abs(x).reshape(count, -1, 32).max(-1).repeat(32, -1)
    bound = 40 / 65534 * np.sqrt(largest**2 @ (weights.T**2) / 3) + 1e-6 * (
        np.abs(x) @ np.abs(weights.T)
    )
    assert (np.abs(found[:, :ROWS] - x @ weights.T) <= bound).all()
    assert not found[:, ROWS:].any()


@pytest.mark.parametrize("kind", BLOCKS)
def test_company_changes_no_bit(kind, variant):
    matrices = packed(random_tensor(kind, ROWS, COLUMNS, seed=3), variant)
    x = np.random.default_rng(4).normal(size=(23, COLUMNS)).astype(np.float32)
    together = times(matrices, variant, x)
    alone = np.concatenate([times(matrices, variant, x[i : i + 1]) for i in range(23)])
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("kind", BLOCKS)
def test_builds_agree(kind, variant):
    """The sums of integers are exact; what is added as floats is rounded in one order, once or
    (without fused multiplication) twice a block."""
    tensor = random_tensor(kind, ROWS, COLUMNS, seed=5)
    x = np.random.default_rng(6).normal(size=(9, COLUMNS)).astype(np.float32)
    ours = times(packed(tensor, "native"), "native", x)
    theirs = times(packed(tensor, variant), variant, x)
    assert np.abs(ours - theirs).max() <= 2e-5 * np.abs(ours).max()


def test_heads_are_filled_up(variant):
    """Rows in groups of 20, as the heads of a model with such heads: each begins a panel."""
    tensor = random_tensor("Q4_0", rows=60, columns=96)
    found = unpacked(packed(tensor, variant, group=20), variant).reshape(3, 32, 96)
    assert np.array_equal(found[:, :20].reshape(60, 96), tensor.numbers())
    assert not found[:, 20:].any()


@pytest.mark.parametrize("kind", ["F16", "F32"])
def test_columns_are_filled_up(kind, variant):
    """Only these kinds can have rows of any length."""
    tensor = random_tensor(kind, rows=40, columns=50)
    found = unpacked(packed(tensor, variant), variant)
    assert np.array_equal(found[:40, :50], tensor.numbers())
    assert not found[:, 50:].any() and not found[40:].any()
