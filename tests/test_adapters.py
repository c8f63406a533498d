"""Adapters of the language model: trained, in the projection's file, added when it is loaded."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt4.__main__ import main
from minigpt4.config import get_model
from minigpt4.engine.kernels.build import library
from minigpt4.engine.native import quantize
from minigpt4.errors import UserError
from minigpt4.training.adapters import finished, insert, tensors_of
from minigpt4.training.int8 import replace_linears
from minigpt4.weights.adapters import adapted, named, read_adapters
from minigpt4.weights.checkpoint import read_projection
from minigpt4.weights.llm import TokenEmbedding
from tests.block_llama import as_transformers
from tests.random_blocks import HIDDEN, KV_HEADS, LAYERS, block_llama

CONFIG = replace(get_model("mini"), llm_hidden_size=HIDDEN, adapter_rank=4)
IDS = torch.arange(20)[None]


def trained(llm):
    """(names -> tensors of a projection's file, the language model with adapters in training)."""
    layers = llm.get_decoder().layers
    found = insert(layers, CONFIG.adapter_rank, 0, {})
    generator = torch.Generator().manual_seed(3)
    for module in found.values():
        module.b.data = 0.1 * torch.randn(module.b.shape, generator=generator)
    tensors = {n: t.detach().half().float() for n, t in tensors_of(found).items()}
    for name, parameter in tensors_of(found).items():
        parameter.data = tensors[name]
    projection = {"weight": torch.ones(HIDDEN, 8).half(), "bias": torch.zeros(HIDDEN).half()}
    return projection | named(finished(tensors)), llm


@pytest.fixture(params=[False, True], ids=["llama", "qwen2"])
def llama(request):
    return block_llama(qwen=request.param, kind="F16", tied=False)


def logits(llm) -> torch.Tensor:
    with torch.no_grad():
        return llm(IDS).logits


def test_what_is_loaded_computes_what_was_trained(llama, tmp_path):
    tensors, training = trained(as_transformers(llama))
    save_file(tensors, path := tmp_path / "p.safetensors")
    wanted, before = logits(training), logits(as_transformers(llama))
    assert (wanted - before).abs().max() > 0.1
    found = logits(adapted(as_transformers(llama), path, CONFIG))
    assert torch.allclose(wanted, found, atol=1e-4)
    assert read_projection(path)["weight"].shape == (HIDDEN, 8)  # it is a projection's file, too


@pytest.mark.parametrize(
    "quantizer",
    [
        None,
        pytest.param(
            quantize,
            marks=pytest.mark.skipif(library() is None, reason="no C compiler: install gcc"),
        ),
    ],
    ids=["gguf", "kernels"],
)
def test_blocks_hold_the_sum_in_8_bit(llama, quantizer, tmp_path):
    tensors, training = trained(as_transformers(llama))
    save_file(tensors, path := tmp_path / "p.safetensors")
    blocks = adapted(llama, path, CONFIG, quantizer)
    assert blocks.tensors["blk.0.attn_q.weight"].kind == "Q8_0"
    assert llama.tensors["blk.0.attn_q.weight"].kind == "F16"  # what was loaded stays
    wanted, found = logits(training), logits(as_transformers(blocks))
    before = logits(as_transformers(llama))
    assert (wanted - found).norm() < 0.05 * (wanted - before).norm()


def test_new_adapters_change_nothing_and_given_ones_go_on(llama, tmp_path):
    llm = as_transformers(llama)
    before = logits(llm)
    insert(llm.get_decoder().layers, 4, 0, {})
    assert torch.equal(before, logits(llm))
    tensors, training = trained(as_transformers(llama))
    save_file(tensors, path := tmp_path / "p.safetensors")
    again = as_transformers(llama)
    insert(again.get_decoder().layers, 4, 1, read_adapters(path))
    assert torch.allclose(logits(training), logits(again), atol=1e-5)


def test_they_learn_beside_8_bit_integers(llama):
    llm = as_transformers(llama).requires_grad_(False)
    replace_linears(llm.get_decoder().layers)
    found = tensors_of(insert(llm.get_decoder().layers, 4, 0, {}))
    assert len(found) == LAYERS * 4 * 2
    assert found["0.k_proj.b"].shape == (HIDDEN // 2 * KV_HEADS, 4)
    llm(IDS).logits.square().sum().backward()
    assert all(found[f"{i}.{m}_proj.b"].grad.any() for i in range(LAYERS) for m in "qkvo")


def test_a_file_of_others_is_refused(llama, tmp_path):
    tensors, _ = trained(as_transformers(llama))
    save_file(tensors, path := tmp_path / "p.safetensors")
    with pytest.raises(UserError, match="takes none"):
        adapted(llama, path, get_model("nano"))
    with pytest.raises(UserError, match="another language model's"):
        adapted(block_llama(hidden=128, heads=2, head_dim=64), path, CONFIG)
    with pytest.raises(UserError, match="on other machines"):
        adapted(TokenEmbedding(torch.ones(2, HIDDEN)), path, CONFIG)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    for change, said in (
        ({name: None}, "incomplete"),
        ({name: tensors[name][:, :2]}, "incomplete"),
        ({name: tensors[name] * float("inf")}, "not finite"),
        ({name.replace("v_proj", "gate_proj"): tensors[name]}, "not supported"),
    ):
        changed = {k: v for k, v in (tensors | change).items() if v is not None}
        save_file({k: v.clone() for k, v in changed.items()}, path)
        with pytest.raises(UserError, match=said):
            adapted(llama, path, CONFIG)


def test_converting_keeps_them(llama, tmp_path):
    tensors, _ = trained(as_transformers(llama))
    save_file(tensors | {"optimizer": torch.ones(3)}, path := tmp_path / "whole.safetensors")
    assert main(["convert", str(path), str(out := tmp_path / "small.safetensors")]) == 0
    kept = load_file(out)
    assert kept.keys() == tensors.keys() and all(torch.equal(kept[n], tensors[n]) for n in kept)


def test_converting_does_not_overwrite_its_input(llama, tmp_path, capsys):
    tensors, _ = trained(as_transformers(llama))
    save_file(tensors | {"optimizer": torch.ones(3)}, path := tmp_path / "whole.safetensors")
    before = path.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(path)
    (tmp_path / "folder").symlink_to(tmp_path)
    for out in ("whole", "link", "folder/whole"):
        assert main(["convert", str(path), f"{tmp_path}/{out}.safetensors"]) == 2
        assert capsys.readouterr().err.endswith("itself: name another file to write.\n")
        assert path.read_bytes() == before


def test_a_projection_without_adapters_leaves_the_model_alone(llama, tmp_path):
    tensors, _ = trained(as_transformers(llama))
    save_file(
        {k: v for k, v in tensors.items() if "lora" not in k},
        path := tmp_path / "plain.safetensors",
    )
    for config in (CONFIG, get_model("nano")):
        assert adapted(llama, path, config) is llama
