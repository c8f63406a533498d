"""Users' own language models: computed as transformers computes them, or refused by name."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)
from transformers.utils import logging as transformers_logging

from minigpt4.config import get_model
from minigpt4.engine.kernels.build import library
from minigpt4.engine.native import NativeDecoder, quantize
from minigpt4.engine.torch_decoder import TorchDecoder
from minigpt4.errors import UserError
from minigpt4.weights import convert
from minigpt4.weights.folder import NORM
from minigpt4.weights.gguf import BlockLlama
from minigpt4.weights.llm import _unpack_weights, load_llm
from tests.test_decoder import whole

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler: install gcc")

CASE = Path(__file__).parent / "parity" / "vicuna_qformer_a"
CONFIG = replace(get_model("vicuna-7b"), llm_hidden_size=64, llm_vocabulary=0)
CPU = torch.device("cpu")
IDS = np.random.default_rng(0).integers(0, 1000, 40)
BLOCKS = [0, 1, 2]


@pytest.fixture
def plain_blocks(monkeypatch) -> None:
    """32-bit floats in place of 4-bit blocks."""
    monkeypatch.setattr(convert, "kind_of", lambda name, shape, layers: "F32")


def write_llm(folder: Path, kind: str = "llama", **settings) -> Path:
    """A folder with a tiny random model of this type, and a tokenizer."""
    shutil.copytree(CASE / "llm", folder, ignore=lambda *_: ["config.json", "model.safetensors"])
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 1000, "head_dim": 16}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes | {"tie_word_embeddings": False} | settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for tensor in model.parameters():
        if tensor.dim() > 1:
            torch.nn.init.normal_(tensor, std=0.25)
    model.save_pretrained(folder)
    return folder


def change(folder: Path, **changes) -> None:
    """Other settings in config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def expected(model: PreTrainedModel | Path) -> np.ndarray:
    """transformers' logits."""
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.from_numpy(IDS)[None]).logits[0].numpy()


def off(found: np.ndarray, logits: np.ndarray) -> float:
    return float(np.linalg.norm(found - logits) / np.linalg.norm(logits))


def load(folder: Path, quantize_to: str = "none"):
    """(language model, tokenizer)"""
    if quantize_to == "int4":
        folder = convert.make_blocks(CONFIG, folder, quantize, 1, lambda line, passing=False: None)
    return load_llm(CONFIG, folder, CPU, quantize_to, "float32")


def refusal(folder: Path, quantize_to: str = "none") -> str:
    with pytest.raises(UserError) as caught:
        load(folder, quantize_to)
    return str(caught.value)


# --- types of models ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": CONFIG.context}),
    ],
)
def test_types_that_are_computed_as_a_llama(tmp_path, kind, settings):
    folder = write_llm(tmp_path / "own", kind, **settings)
    llm, _ = load(folder)
    assert off(whole(TorchDecoder(llm, 4), IDS, BLOCKS), expected(folder)) < 1e-4


@pytest.mark.parametrize("quantize_to", ["none", "w8a16", "nf4", "remote"])
@pytest.mark.parametrize(
    ("kind", "settings", "word"),
    [
        ("qwen3", {}, "“qwen3”"),
        ("olmo2", {}, "“olmo2”"),
        ("mistral", {"sliding_window": 16}, "16 tokens"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}, "16 tokens"),
    ],
)
def test_types_that_are_computed_otherwise(tmp_path, quantize_to, kind, settings, word):
    folder = write_llm(tmp_path / "own", kind, **settings)
    assert word in refusal(folder, quantize_to)


# --- the tokenizer --------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize_to", ["none", "w8a16", "remote", "int4"])
def test_a_tokenizer_of_more_tokens_than_the_embedding(weights, tmp_path, quantize_to):
    """Every question would have ended in an index out of range."""
    folder = write_llm(tmp_path / "own", vocab_size=999)
    assert "has 1,000 tokens, but the language model's embedding has 999" in refusal(
        folder, quantize_to
    )


@pytest.mark.parametrize("quantize_to", ["none", "int4"])
def test_a_token_for_padding_needs_no_row(weights, tmp_path, quantize_to):
    """As in Llama-2's first folders."""
    folder = write_llm(tmp_path / "own")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "<pad>"}))
    _, tokenizer = load(folder, quantize_to)
    assert tokenizer.convert_tokens_to_ids("<pad>") == 1000
    assert (
        max(tokenizer.encode("<pad>", add_special_tokens=False, split_special_tokens=True)) < 1000
    )


# --- the head, and positions ----------------------------------------------------------------------


def logits_of(folder: Path, quantize_to: str) -> np.ndarray:
    llm, _ = load(folder, quantize_to)
    if isinstance(llm, BlockLlama):
        return whole(NativeDecoder(llm, 64, 4, 1), IDS, BLOCKS)
    return whole(TorchDecoder(llm, 4), IDS, BLOCKS)


@pytest.mark.parametrize("quantize_to", ["none", "w8a16", "int4"])
@pytest.mark.parametrize("case", ["another", "the same", "none"])
def test_a_head_beside_the_embedding_that_is_to_be_tied(
    weights, tmp_path, plain_blocks, quantize_to, case
):
    folder = write_llm(tmp_path / "own", tie_word_embeddings=case != "another")
    change(folder, tie_word_embeddings=True)
    if case == "the same":
        state = load_file(folder / "model.safetensors")
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    most = 0.1 if quantize_to == "w8a16" else 0.01
    assert off(logits_of(folder, quantize_to), expected(folder)) < most
    if quantize_to == "int4":
        assert ("output.weight" in load(folder, "int4")[0].tensors) == (case == "another")


@pytest.mark.parametrize("near", [0, 0.05, 0.15])
def test_a_head_that_is_near_the_embedding(weights, tmp_path, plain_blocks, near):
    folder = write_llm(tmp_path / "own")
    state = load_file(folder / "model.safetensors")
    embedding = state["model.embed_tokens.weight"]
    state["lm_head.weight"] = embedding + near * 0.25 * torch.randn(embedding.shape)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert off(logits_of(folder, "int4"), expected(folder)) < 0.01
    assert ("token_embd.weight" in load(folder, "int4")[0].tensors) == (near > 0)


@pytest.mark.parametrize("older", [{"rope_type": "default"}, {"type": "linear", "factor": 4.0}])
def test_positions_described_twice(weights, tmp_path, plain_blocks, older):
    folder = write_llm(tmp_path / "own", rope_parameters={"rope_theta": 500.0})
    change(folder, rope_scaling=older)
    if "factor" in older:
        assert "rope type is linear" in refusal(folder, "int4")
    else:
        assert off(logits_of(folder, "int4"), expected(folder)) < 0.01


# --- damaged folders ------------------------------------------------------------------------------


def with_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    state = load_file(folder / "model.safetensors") | {name: tensor}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("quantize_to", ["none", "w8a16"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: with_tensor(folder, NORM, torch.ones(63)),
            "“model.norm.weight” is missing",
        ),
        (
            lambda folder: change(folder, vocab_size=1001),
            "“lm_head.weight” is missing or has another",
        ),
        (
            lambda folder: os.truncate(folder / "model.safetensors", 9_999),
            "model.safetensors is damaged or cut short",
        ),
        (lambda folder: (folder / "config.json").write_text("\ufeff{}"), "config.json is damaged"),
        (lambda folder: change(folder, num_attention_heads=0), "could not be loaded"),
    ],
)
def test_damage_is_named(weights, tmp_path, quantize_to, damage, words):
    folder = write_llm(tmp_path / "own")
    damage(folder)
    text = refusal(folder, quantize_to)
    assert words in text and "\n" not in text
    assert "--quantize none" not in text or quantize_to != "none"


def test_a_setting_that_is_missing(weights, tmp_path):
    folder = write_llm(tmp_path / "own")
    settings = json.loads((folder / "config.json").read_text())
    del settings["hidden_size"]
    (folder / "config.json").write_text(json.dumps(settings))
    assert "('hidden_size' is missing in config.json)" in refusal(folder, "int4")


def test_unpacked_weights_may_be_read_by_those_who_read_the_rest(tmp_path, monkeypatch, capsys):
    """safetensors writes for the owner alone; and transformers draws bars in three places."""

    def save(folder, **_):
        assert [*transformers_logging.tqdm([1], desc="Writing")] == [1]
        Path(folder, "model.safetensors").touch(0o600)

    def load(*_, **__):
        for module in (modeling_gguf_pytorch_utils, transformers_logging):
            assert [*module.tqdm([1], desc="Reading")] == [1]
        return model, report

    model = SimpleNamespace(save_pretrained=save)
    report = {"missing_keys": [], "mismatched_keys": [], "error_msgs": []}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load)
    bar = modeling_gguf_pytorch_utils.tqdm
    beside = tmp_path / "a.gguf"
    beside.touch()
    _unpack_weights(tmp_path)
    assert modeling_gguf_pytorch_utils.tqdm is bar  # for other programs' code in this process
    assert (tmp_path / "model.safetensors").stat().st_mode == beside.stat().st_mode
    assert capsys.readouterr().err.count("\n") == 1
