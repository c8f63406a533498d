"""The paper's ablations on a tiny random model: every arm is really trained, and alone."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt4.config import get_model
from minigpt4.data.examples import read_shards
from minigpt4.weights.load import find_weights, load_model
from research import architecture, arms
from research.architecture import main, shortened
from tests.evaluation_case import use_tiny_model
from tests.training_case import (
    SCHEDULE,
    tiny_model,
    write_captioned,
    write_descriptions,
    write_shard,
)


def run(*arguments, out) -> tuple[dict, str]:
    """The figures and the report of the command."""
    files = ["--json", str(out / "out.json"), "--markdown", str(out / "out.md")]
    assert main([*map(str, arguments), *files]) == 0
    return json.loads((out / "out.json").read_text()), (out / "out.md").read_text()


@pytest.fixture
def shard(tmp_path):
    return write_shard(tmp_path / "train-00000.tar", 8)


def frozen(model) -> dict[str, torch.Tensor]:
    parts = {"encoder": model.encoder, "bridge": model.bridge, "llm": model.llm}
    return {
        f"{name}.{k}": v.clone()
        for name, part in parts.items()
        for k, v in part.state_dict().items()
    }


@pytest.mark.parametrize("kind", ["linear", "deeper", "bridge"])
def test_an_arm_learns_and_leaves_the_rest_alone(kind, shard):
    model = tiny_model()
    before = frozen(model)
    examples = read_shards(str(shard))
    corpus = arms.Corpus(examples, arms.encode(model, examples), ("Describe.",))
    made, groups = arms.variant(model, kind, seed=1)
    schedule = shortened(SCHEDULE, 30, 4)
    untrained = arms.held_out_loss(made, corpus, schedule)
    start = [p.detach().clone() for g in groups for p in g["params"]]
    notes = []
    arms.train(made, groups, corpus, schedule, 1, notes.append)
    assert arms.held_out_loss(made, corpus, schedule) < untrained - 0.05
    assert len(notes) == 30
    trained = [p for g in groups for p in g["params"]]
    assert all(not torch.equal(a, b) for a, b in zip(start, trained, strict=True))
    assert {id(p) for p in made.parameters() if p.requires_grad} == {id(p) for p in trained}
    after = frozen(model)
    assert all(torch.equal(before[k], after[k]) for k in before)
    layers = {"linear": 1, "deeper": 3, "bridge": 1}[kind]
    linears = [m for m in made.projection.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == layers


def test_a_tiny_q_former_takes_the_place_of_a_bridge_without_one(shard):
    model = tiny_model("llama2_patch_concat")
    examples = read_shards(str(shard))[:2]
    made, groups = arms.variant(model, "bridge", seed=1)
    encoded = arms.encode(model, examples).float()
    vectors = made.bridge(encoded)
    assert vectors.shape[:2] == (2, model.config.image_tokens)
    assert not torch.allclose(vectors[0], vectors[1])  # it looks at the picture
    assert {id(p) for p in made.bridge.parameters()} <= {id(p) for g in groups for p in g["params"]}
    # An arm begins alike whatever was made before it.
    again, _ = arms.variant(model, "bridge", seed=1)
    assert torch.equal(again.projection.weight, made.projection.weight)


@pytest.fixture(scope="module")
def nano():
    """Its own encoder, bridge and tokenizer; training through its language model takes longer."""
    config = get_model("nano")
    model = load_model(config, find_weights(config), quantize="none")
    size = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 2, "vocab_size": model.llm.config.vocab_size}
    model.llm = LlamaForCausalLM(LlamaConfig(**size)).requires_grad_(False)
    model.config = replace(config, llm_hidden_size=64)
    return model


@pytest.mark.parametrize("kind", ["linear", "deeper", "bridge"])
def test_nanos_feature_maps(kind, nano, shard):
    """An arm is trained on maps that were kept, and answers from pictures alike."""
    examples = read_shards(str(shard))[:3]
    maps = arms.encode(nano, examples)
    corpus = arms.Corpus(examples, maps, ("Describe.",))
    unseen = corpus.part(2, None)
    made, groups = arms.variant(nano, kind, seed=1)
    schedule = shortened(SCHEDULE, 1, 2)
    untrained = arms.held_out_loss(made, unseen, schedule)
    arms.train(made, groups, corpus.part(0, 2), schedule, 1, lambda _: None)
    assert arms.held_out_loss(made, unseen, schedule) != untrained
    kept = made.bridge(arms.on_each(maps, torch.Tensor.float))
    assert kept.shape == (3, nano.config.image_tokens, made.config.projection_in)
    seen = made.encode_features(made.pixel_values([e.picture() for e in examples]))
    torch.testing.assert_close(kept, seen, atol=1e-2, rtol=1e-2)
    assert (seen[0] - seen[2]).abs().max() > 0.05


def test_the_experiment(shard, tmp_path, monkeypatch):
    use_tiny_model(monkeypatch)
    monkeypatch.setattr(architecture, "CAPTION_TOKENS", 3)
    monkeypatch.setattr(architecture, "DETAIL_TOKENS", 3)
    described = write_descriptions(tmp_path / "described", 16)
    options = [shard, "--train", shard, "--described", described]
    options += ["--steps", 4, "--train-batch", 2, "--limit", 2, "--pictures", 4]
    result, page = run(*options, out=tmp_path)
    found = result["arms"]
    names = ["linear", "deeper", "bridge", "stage2", "stage2-quarter", "stage2-alone"]
    assert list(found) == names and not result["not_run"]
    assert (found["linear"]["steps"], found["stage2"]["steps"]) == (4, 2)
    pictures = [found[name]["pictures"] for name in names]
    assert pictures == [4, 4, 4, 14, 3, 14]
    assert len({found[name]["caption_loss"] for name in names}) == 6
    assert "without Q-Former" in page and page.count("| stage2") == 3
    result, page = run(*options, "--arms", "deeper", out=tmp_path)
    assert list(result["arms"]) == ["deeper"] and "Not run: linear, bridge" in page
    # The same seed gives the same arm, whichever ran before it.
    assert result["arms"]["deeper"]["caption_loss"] == found["deeper"]["caption_loss"]


def test_folders_with_tables_of_captions_and_damaged_pictures(tmp_path, monkeypatch):
    use_tiny_model(monkeypatch)
    monkeypatch.setattr(architecture, "CAPTION_TOKENS", 3)
    monkeypatch.setattr(architecture, "DETAIL_TOKENS", 3)
    shown, trained = (write_captioned(tmp_path / name) for name in ("shown", "trained"))
    for folder in (shown, trained):
        (folder / "1.jpg").write_bytes(b"no picture")
    options = ["--train", trained, "--arms", "linear"]
    result, _ = run(shown, *options, "--steps", 1, "--train-batch", 2, out=tmp_path)
    assert result["n"] == result["trained_on"] == 2


def test_mistakes(shard, capsys):
    for arguments in (
        ["--train", str(shard), "--arms", "wider"],
        ["--train", str(shard), "--arms", "linear,stage2"],
        ["--train", "nowhere.tar"],
        ["--train", str(shard), "--steps", "0"],
        ["--train", str(shard), "--described", "nowhere"],
        ["--train", str(shard), "--described", "nowhere", "--arms", "stage2"],
    ):
        assert main([str(shard), *arguments]) == 2, arguments
        said = capsys.readouterr().err
        *notices, sentence = said.splitlines()
        assert sentence.startswith("architecture: "), said
        assert all(notice.endswith("pictures read.") for notice in notices), said
