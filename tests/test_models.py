"""docs/models.md adds a model: what stands there works."""

import ast
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt4 import config
from minigpt4.conversation import Conversation, ask
from minigpt4.engine import Engine, Sampling
from minigpt4.model import image, minigpt4, vision
from minigpt4.model.parts import ConcatPatches, Maps, Patches, PooledMap
from minigpt4.weights import load
from minigpt4.weights.load import find_weights, load_model
from tests.parity_case import ParityCase

ROOT = Path(__file__).parent.parent


@pytest.fixture
def small(monkeypatch) -> config.ModelConfig:
    """The page's entry, executed as the end of config.py."""
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    models = {**config.MODELS}
    monkeypatch.setattr(config, "MODELS", models)
    exec(compile(code, "docs/models.md", "exec"), {**vars(config), "MODELS": models})
    return config.get_model("small")


@pytest.fixture
def folder(small, monkeypatch, tmp_path) -> Path:
    """A language model of that width, untrained and shallow, with the tokenizer of its family."""
    source = ROOT / "weights" / "nano-llm"
    if not source.exists():
        pytest.skip("nano's weights are missing: python -m minigpt4 download nano")
    torch.manual_seed(0)
    sizes = {"vocab_size": 49152, "hidden_size": small.llm_hidden_size, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 15, "num_key_value_heads": 5, "intermediate_size": 64}
    llm = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    llm.save_pretrained(tmp_path / "small-llm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path / "small-llm" / name)
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(tmp_path))
    return tmp_path


def test_an_entry_is_all_that_a_model_needs(small, folder):
    assert small.image_tokens == config.get_model("nano").image_tokens
    files = find_weights(small, new_projection=True)
    assert files.llm == folder / "small-llm" and files.projection is None
    model = load_model(small, files, seed=0)
    assert config.model_of_projection(*model.projection.weight.shape) == "small"
    engine = Engine(model)
    conversation = Conversation()
    picture = image.load(ROOT / "minigpt4" / "web" / "page" / "examples" / "tower.jpg")
    conversation.add_question("What is this?", [picture])
    answer = ask(engine, conversation, Sampling(temperature=0, max_new_tokens=4))
    "".join(answer)
    engine.close()
    assert len(answer.tokens) == 4 or answer.stop_reason == "stop"


def test_no_models_name_is_in_a_condition():
    """What is special about a model is a field of its configuration."""
    for path in [*(ROOT / "minigpt4").rglob("*.py"), ROOT / "app.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Compare, ast.MatchValue)):
                named = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                assert not named & {*config.MODELS}, f"{path}:{node.lineno}"


@dataclass(frozen=True)
class Mine:
    """The sizes of an encoder that somebody adds: a picture's quarters, three numbers each."""

    features: Patches | Maps
    image_size: int = 8
    large: ClassVar = False


class Quarters(nn.Module):
    def __init__(self, mine: Mine) -> None:
        super().__init__()
        self.maps = isinstance(mine.features, Maps)
        width = mine.features.channels[0] if self.maps else mine.features.width
        self.layer = nn.Conv2d(3, width, 4, 4)

    def forward(self, pixels):
        found = self.layer(pixels)
        if self.maps:
            return [found, pixels]
        return nn.functional.pad(found.flatten(2).transpose(1, 2), (0, 0, 1, 0))


@pytest.mark.parametrize(
    ("bridge", "features", "shape"),
    [
        (None, Patches(4, 48), None),  # the case's Q-Former
        (ConcatPatches(2), Patches(4, 6), (2, 12)),
        (PooledMap(2), Maps((6, 3), 5), (6, 14)),
    ],
)
def test_an_encoder_as_the_page_adds_it(bridge, features, shape, monkeypatch, tmp_path):
    """What stands for the `case`s that it needs is here; nothing else knows its class."""
    case = ParityCase(ROOT / "tests" / "parity" / "vicuna_qformer_a")
    mine = replace(case.config, vision=Mine(features), bridge=bridge or case.config.bridge)
    if shape:
        assert (mine.image_tokens, mine.projection_in) == shape

    def preprocess(rgb, _):
        return torch.tensor(vision.squash(rgb, 8).getdata()).float().T.view(3, 8, 8)

    def load_encoder(_, files, encoder, bridge, *rest):
        encoder.load_state_dict(load.read_checkpoint(files.vision), assign=True)
        if isinstance(features, Maps):
            bridge.classifier = nn.Linear(6, 5)
        return encoder

    monkeypatch.setattr(minigpt4, "preprocess", preprocess)
    monkeypatch.setattr(load, "build_encoder", Quarters)
    monkeypatch.setattr(load, "_load_encoder", load_encoder)
    save_file(Quarters(mine.vision).state_dict(), tmp_path / "mine.safetensors")
    files = replace(case.files, vision=tmp_path / "mine.safetensors", projection=None)
    model = load_model(mine, files, seed=0)
    assert set(load.projection_tensors(model)) == {"weight", "bias"}
    engine = Engine(model)
    conversation = Conversation.asking("What is this?", [image.load(case.image_paths[0])])
    answer = ask(engine, conversation, Sampling(temperature=0, max_new_tokens=4))
    assert "".join(answer) or answer.stats.tokens
    engine.close()


def test_what_lacks_a_case_or_does_not_fit_is_refused():
    mine = replace(config.get_model("nano"), vision=Mine(Patches(4, 6)))
    with pytest.raises(TypeError, match="nano: a PooledMap cannot read what Mine gives"):
        _ = mine.image_tokens
    with pytest.raises(TypeError, match="build_encoder has no case for a Mine"):
        vision.build_encoder(mine.vision)
    with pytest.raises(TypeError, match="preprocess has no case for a Mine"):
        vision.preprocess(image.Image.new("RGB", (8, 8)), mine.vision)
