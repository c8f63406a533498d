"""Weight folders and files as other programs leave them: tokenizers, wrapped projections."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from minigpt4.errors import UserError
from minigpt4.weights.checkpoint import read_projection
from minigpt4.weights.tokenizer import PROBES, load_tokenizer

CASE = Path(__file__).parent / "parity" / "vicuna_qformer_a"
EMPTY = {"bos_token": "", "eos_token": "", "unk_token": ""}


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(CASE / "llm", tmp_path / "llm"))


@pytest.mark.parametrize(
    "content",
    [
        None,
        {},
        {"tokenizer_class": "LLaMATokenizer"},
        {"tokenizer_class": "LLaMATokenizer", **EMPTY},
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"},
        "{damaged",
    ],
)
def test_tokenizer_model_decides(folder, content):
    (folder / "special_tokens_map.json").unlink()
    config = folder / "tokenizer_config.json"
    config.unlink()
    if content is not None:
        config.write_text(content if isinstance(content, str) else json.dumps(content))
    pieces = SentencePieceProcessor(str(folder / "tokenizer.model"))
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:  # a file that nothing can read
        assert isinstance(content, str) and "tokenizer_config.json" in str(error)
        return
    for text in (*PROBES, "###Human: Describe it.", "Ünïcode ###"):
        assert tokenizer.encode(text, add_special_tokens=False) == pieces.encode(text)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_a_tokenizer_json_that_disagrees_is_refused(folder):
    fast = load_tokenizer(folder)
    fast.save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][: len(content["model"]["merges"]) // 2]
    path.write_text(json.dumps(content), encoding="utf-8")
    pieces = SentencePieceProcessor(str(folder / "tokenizer.model"))
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:
        assert "does not split text as its tokenizer.model does" in str(error)
    else:
        assert all(
            tokenizer.encode(t, add_special_tokens=False) == pieces.encode(t) for t in PROBES
        )


def test_a_damaged_tokenizer_model_is_refused(folder):
    (folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        load_tokenizer(folder)


# --- projections --------------------------------------------------------------------------------


def projection() -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(4, 3), "bias": torch.randn(4)}


def prefixed(prefix: str, tensors: dict) -> dict:
    return {prefix + name: tensor for name, tensor in tensors.items()}


NAMED = "llama_proj."


@pytest.mark.parametrize(
    "wrap",
    [
        lambda p: {"model": prefixed(NAMED, p)},
        lambda p: {"model": prefixed("module." + NAMED, p)},
        lambda p: {"state_dict": prefixed("model." + NAMED, p), "epoch": 1},
        lambda p: {"state_dict": prefixed("model.module." + NAMED, p), "optimizer_states": []},
        lambda p: {"model_state_dict": {"model": prefixed("_orig_mod." + NAMED, p)}},
        lambda p: {"module": prefixed("base_model.model." + NAMED, p)},
        lambda p: prefixed("module.", p),
        lambda p: {"model": p},
        lambda p: {"net": prefixed(NAMED, p), "optimizer": {"state": {0: p}}},
        lambda p: {"params": prefixed(NAMED, p), "params_ema": prefixed(NAMED, p)},
        lambda p: {"checkpoint": {"model": prefixed(NAMED, p)}},
        lambda p: {"llama_proj": p},
        lambda p: p | {"ln_vision.weight": torch.ones(3), "ln_vision.bias": torch.zeros(3)},
        lambda p: prefixed("module." + NAMED, p) | {"module.ln_vision.weight": torch.ones(3)},
        lambda p: prefixed("a." + NAMED, p) | prefixed("b." + NAMED, p),
    ],
)
def test_wrapped_projections(tmp_path, wrap):
    path, wanted = tmp_path / "p.pth", projection()
    content = wrap(wanted)
    torch.save(content, path)
    found = read_projection(path)
    assert found["weight"].equal(wanted["weight"]) and found["bias"].equal(wanted["bias"])
    assert ("ln_vision.weight" in found) == any("ln_vision.weight" in name for name in content)


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda p: prefixed("model." + NAMED, p) | prefixed("ema." + NAMED, projection()),
            "several tensors for “llama_proj.weight” .model.llama_proj.weight and ema.",
        ),
        (
            lambda p: {"model": prefixed(NAMED, p), "ema": prefixed(NAMED, projection())},
            "several tensors for “llama_proj.weight” .llama_proj.weight and ema.llama",
        ),
        (
            lambda p: prefixed(NAMED, projection()) | {"model": prefixed(NAMED, p)},
            "several tensors for “llama_proj.weight”",
        ),
        (lambda p: {"epoch": 3}, "holds no named tensors"),
        (
            lambda p: prefixed("head.", p) | {"other.weight": torch.ones(2, 2)},
            "holds no projection",
        ),
        (lambda p: {NAMED + "weight": p["weight"]}, "holds no projection"),
        (
            lambda p: {
                f"layers.{i}.self_attn.q_proj.lora_A.weight": p["weight"] + i for i in (0, 1)
            },
            "an adapter .LoRA. for a language model and no projection",
        ),
    ],
)
def test_projections_that_are_not_clear_are_refused(tmp_path, wrap, message):
    path = tmp_path / "p.pth"
    torch.save(wrap(projection()), path)
    with pytest.raises(UserError, match=message):
        read_projection(path)
