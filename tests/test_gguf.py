"""GGUF files: what is read of them, and what is refused by name."""

import json

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from minigpt4.weights.gguf import INDEX, BlockLlama, BlockTensor, write_index
from tests.random_blocks import block_llama, random_tensor


def write_gguf(path, llama: BlockLlama, architecture: str, extra=(), tensors=()) -> None:
    """A file as llama.cpp writes it. extra: more fields; tensors: more, or others."""
    writer = GGUFWriter(str(path), architecture)
    writer.add_embedding_length(llama.hidden_size)
    writer.add_block_count(llama.layers)
    writer.add_head_count(llama.heads)
    writer.add_head_count_kv(llama.kv_heads)
    writer.add_feed_forward_length(llama.intermediate_size)
    writer.add_context_length(llama.context)
    writer.add_layer_norm_rms_eps(llama.norm_eps)
    writer.add_rope_freq_base(llama.rope_theta)
    writer.add_key_length(llama.head_dim)
    for name, value in dict(extra).items():
        kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        kinds[type(value)](f"{architecture}.{name}", value)
    for name, tensor in (llama.tensors | dict(tensors)).items():
        data = tensor.data.reshape(tensor.shape) if tensor.kind == "F32" else tensor.data
        writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType[tensor.kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("qwen", [False, True])
def test_a_file_is_read_as_it_was_written(tmp_path, qwen):
    llama = block_llama(qwen=qwen, tied=False, vocabulary=333, heads=3, head_dim=32)
    write_gguf(tmp_path / "model.gguf", llama, "qwen2" if qwen else "llama")
    write_index(tmp_path / "model.gguf")
    found = BlockLlama.open(tmp_path)
    for name in ("hidden_size", "layers", "heads", "kv_heads", "intermediate_size", "vocabulary"):
        assert getattr(found, name) == getattr(llama, name)
    assert (found.head_dim, found.rope_halves, found.rope_theta) == (32, qwen, llama.rope_theta)
    assert found.norm_eps == pytest.approx(llama.norm_eps)
    assert found.tensors.keys() == llama.tensors.keys()
    for name, tensor in llama.tensors.items():
        assert found.tensors[name].kind == tensor.kind
        assert np.array_equal(found.tensors[name].data.ravel(), tensor.data.ravel())
    found.release()  # it is read again when used
    assert np.array_equal(found.head.numbers(), llama.head.numbers())


@pytest.mark.parametrize(("scale", "kept"), [(1, 1), (1.05, 1), (1.15, 2)])
def test_one_matrix_quantized_twice_is_kept_once(tmp_path, scale, kept):
    llama = block_llama()
    numbers = (llama.head.numbers() * scale).astype(np.float16)
    again = BlockTensor("F16", llama.head.shape, numbers.view(np.uint8))
    write_gguf(tmp_path / "model.gguf", llama, "llama", tensors={"output.weight": again})
    write_index(tmp_path / "model.gguf")
    found = BlockLlama.open(tmp_path)
    assert len({id(found.embedding), id(found.head)}) == kept and found.head.kind == "F16"


@pytest.mark.parametrize(
    ("architecture", "extra", "tensors", "word"),
    [
        ("gemma2", {}, {}, "gemma2"),
        ("llama", {"expert_count": 8}, {}, "expert_count"),
        ("llama", {"rope.scaling.type": "yarn"}, {}, "yarn"),
        ("llama", {"rope.scaling.factor": 4.0}, {}, "rope.scaling.factor"),
        ("llama", {"rope.scale_linear": 4.0}, {}, "rope.scale_linear"),
        ("llama", {"rope.dimension_count": 16}, {}, "dimension_count"),
        ("llama", {}, {"blk.0.attn_q_norm.weight": random_tensor("F32", 1, 64)}, "attn_q_norm"),
        ("llama", {}, {"blk.1.ffn_up.weight": random_tensor("Q4_1", 64, 64)}, "blk.1.ffn_up"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, architecture, extra, tensors, word):
    write_gguf(tmp_path / "model.gguf", block_llama(), architecture, extra, tensors)
    with pytest.raises(ValueError, match=word):
        write_index(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    "extra",
    [
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {"rope.scaling.factor": 0.0, "rope.scale_linear": 1.0},
    ],
)
def test_positions_that_are_not_scaled(tmp_path, extra):
    write_gguf(tmp_path / "model.gguf", block_llama(), "llama", extra)
    write_index(tmp_path / "model.gguf")


def test_other_kinds_are_refused_by_name(tmp_path):
    llama = block_llama(hidden=256)
    data = np.zeros((96, 84), np.uint8)  # Q2_K has 84 bytes for 256 weights
    llama.tensors["blk.0.ffn_gate.weight"] = BlockTensor("Q2_K", (96, 256), data)
    write_gguf(tmp_path / "model.gguf", llama, "llama")
    with pytest.raises(ValueError, match="blk.0.ffn_gate.weight is of kind Q2_K"):
        write_index(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("sizes", "vocabulary"), 2**40),
        (("sizes", "vocabulary"), 321),
        (("sizes", "heads"), 0),
        (("sizes", "heads"), 3),
        (("sizes", "head_dim"), 31),
        (("sizes", "layers"), 3),
        (("sizes", "norm_eps"), float("nan")),
        (("tensors", "blk.0.ffn_up.weight"), ["Q4_1", [96, 64], 2**40]),
        (("tensors", "blk.0.ffn_up.weight"), ["Q4_1", [96, 64], -20]),
        (("tensors", "blk.0.ffn_up.weight"), ["Q4_1", [96, 65], 0]),
        (("tensors", "blk.0.ffn_up.weight"), ["Q4_1", [2**70, 64], 0]),
        (("tensors", "blk.0.ffn_up.weight"), ["IQ4_XS", [96, 64], 0]),
        (("tensors", "blk.0.ffn_norm.weight"), ["F16", [64], 0]),
    ],
)
def test_an_index_that_does_not_fit_is_refused(tmp_path, place, value):
    write_gguf(tmp_path / "model.gguf", block_llama(), "llama")
    index = json.loads(write_index(tmp_path / "model.gguf").read_text())
    index[place[0]][place[1]] = value
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError):
        BlockLlama.open(tmp_path)


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, block_llama(), "llama")
    write_index(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut short"):
        BlockLlama.open(tmp_path)
