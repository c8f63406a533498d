"""Loading a model, at tiny sizes: its progress, quiet libraries, and 16-bit files that are gone."""

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from minigpt4 import config as configs
from minigpt4 import start
from minigpt4.config import ModelConfig
from minigpt4.conversation import Conversation, ask
from minigpt4.engine import Sampling
from minigpt4.engine.kernels.build import library
from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.weights import transfer
from minigpt4.weights.gguf import INDEX
from tests.parity_case import ParityCase

ROOT = Path(__file__).parent.parent
CASE = ROOT / "tests" / "parity" / "vicuna_qformer_a"

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler: install gcc")


def tiny_config() -> ModelConfig:
    """vicuna-7b at the case's sizes."""
    published = configs.get_model("vicuna-7b")
    sizes = ParityCase(CASE).config
    return replace(
        published,
        vision=sizes.vision,
        bridge=sizes.bridge,
        llm_hidden_size=sizes.llm_hidden_size,
    )


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    """A weights folder with a tiny vicuna-7b."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth"):
        (folder / name).symlink_to(CASE / name)
    (folder / "prerained_minigpt4_7b.pth").symlink_to(CASE / "pretrained_minigpt4.pth")
    shutil.copytree(CASE / "llm", folder / "vicuna-7b-llm")
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(configs.MODELS, "vicuna-7b", tiny_config())
    return folder


def options(**changes) -> argparse.Namespace:
    values = {"model": "vicuna-7b", "quantize": "auto", "device": "cpu", "llm_url": None}
    return argparse.Namespace(**values | changes)


def answer(said: list[tuple[str, bool]] | None = None, **changes) -> str:
    """Of the model that these options name, to a question about a picture."""

    def report(line: str, passing: bool = False) -> None:
        if said is not None:
            said.append((line, passing))

    engine = start.open_engine(options(**changes), report, 8)
    try:
        conversation = Conversation()
        picture = image.load(ParityCase(CASE).image_paths[0])
        conversation.add_question("What is this?", [picture])
        return "".join(ask(engine, conversation, Sampling(temperature=0, max_new_tokens=8)))
    finally:
        engine.close()


@pytest.mark.parametrize("quantize", ["none", "int8", "w8a16", "int4"])
def test_progress(weights, monkeypatch, quantize):
    """Bytes of bytes from nothing to everything, whoever reads the weights."""
    monkeypatch.setattr(transfer, "PASSING_SECONDS", 0.0)
    said: list[tuple[str, bool]] = []
    assert answer(said, quantize=quantize)
    assert [line for line, passing in said if not passing][-1] == "Loading vicuna-7b …"
    steps = [line for line, passing in said if passing and line.startswith("Loading vicuna-7b: ")]
    shares = [int(line.split(", ")[1].removesuffix(" %")) for line in steps]
    assert len(shares) > 20 and shares == sorted(shares) and shares[-1] == 100
    assert " MB of " in steps[0]


def test_without_the_16_bit_files(weights, monkeypatch):
    """A converted model works on; “auto” finds it; what needs these files says that they are
    gone."""
    said: list[tuple[str, bool]] = []
    expected = answer(said)
    advice = next(line for line, _ in said if "rm " in line)
    assert subprocess.run("rm " + advice.partition("rm ")[2], shell=True).returncode == 0
    assert not [*weights.glob("vicuna-7b-llm/*.safetensors")]
    said.clear()
    assert answer(said) == expected and not any("Converting" in line for line, _ in said)
    monkeypatch.setattr("minigpt4.weights.memory.free_memory", lambda mapped=0: 8 * 10**9)
    said.clear()
    assert answer(said, model="auto") == expected
    assert said[0][0].startswith("Model: vicuna-7b, because")
    with pytest.raises(UserError, match="its 16-bit files were deleted"):
        answer(quantize="none")


def test_a_users_own_folder_without_its_16_bit_files(weights, tmp_path):
    own = Path(shutil.move(weights / "vicuna-7b-llm", tmp_path / "my [model]"))
    expected = answer(llm=str(own))
    (own / "model.safetensors").touch()  # another version, which is converted anew
    assert answer(llm=str(own)) == expected
    made = {path.parent for path in weights.glob(f"*/{INDEX}")}
    assert len(made) == 2
    (own / "model.safetensors").unlink()
    assert answer(llm=str(own)) == expected
    assert {path.parent for path in weights.glob(f"*/{INDEX}")} == made


RUN = """
import sys
from minigpt4 import config
from minigpt4.__main__ import main
from tests.test_loading import CASE, ParityCase, tiny_config
config.MODELS["vicuna-7b"] = tiny_config()
for quantize in sys.argv[1:]:
    picture = str(ParityCase(CASE).image_paths[0])
    main(["ask", picture, "What is this?", "--model", "vicuna-7b", "--device", "cpu"]
         + ["--quantize", quantize, "--max-new-tokens", "4", "--temperature", "0"])
"""


def test_libraries_are_quiet(weights):
    """Only this program's own lines reach the terminal, whatever reads and runs the model."""
    kinds = ["none", "int8", "int4"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *kinds],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == len(kinds)
    own = "Loading vicuna-7b …", "Converting ", "The 4-bit model ", "Compiling "
    assert [line for line in done.stderr.splitlines() if not line.startswith(own)] == []
