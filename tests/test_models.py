"""docs/models.md adds a model: what stands there works."""

import ast
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt4 import config
from minigpt4.conversation import Conversation, ask
from minigpt4.engine import Engine, Sampling
from minigpt4.model import image
from minigpt4.weights.load import find_weights, load_model

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
