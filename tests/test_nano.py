"""The embedded model end to end, with its real weights (fetched by `make setup`'s download)."""

import json
import re
import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path

import pytest
import torch

from minigpt4 import start
from minigpt4.__main__ import main
from minigpt4.config import get_model
from minigpt4.conversation import Conversation, ask
from minigpt4.engine import Engine, Sampling
from minigpt4.model import image
from minigpt4.weights.load import find_weights, load_model
from tests.running import python

ROOT = Path(__file__).parent.parent
GREEDY = Sampling(temperature=0.0, max_new_tokens=60)


@pytest.fixture(scope="module")
def engine():
    """As users get it: the 4-bit blocks where there is a C compiler, else PyTorch."""
    config = get_model("nano")
    quantize = start.quantize_of("auto", config, torch.device("cpu"))
    return Engine(load_model(config, find_weights(config), quantize=quantize))


@pytest.fixture
def photo(tmp_path):
    """A portrait in the public domain that matplotlib brings: an admiral in uniform and hat."""
    source = resources.files("matplotlib") / "mpl-data" / "sample_data" / "grace_hopper.jpg"
    return Path(shutil.copy(str(source), tmp_path))


@pytest.fixture
def animal():
    """A big cat, photographed, that gradio brings."""
    return str(resources.files("gradio") / "media_assets" / "images" / "cheetah1.jpg")


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def answer(engine, question: str, *pictures, sampling: Sampling = GREEDY) -> str:
    return "".join(ask(engine, Conversation.asking(question, pictures), sampling))


def test_it_sees(engine, photo, animal):
    """A person is a person, and an animal an animal."""
    question = "Describe this image briefly."
    person = words(answer(engine, question, image.load(photo)))
    assert person & {"man", "woman", "person", "boy", "girl", "hat", "uniform"}, person
    beast = words(answer(engine, question, image.load(animal)))
    assert beast & {"lion", "cat", "dog", "animal", "bear", "leopard", "cow", "horse"}, beast
    assert not beast & {"man", "woman", "person"}, beast


def test_a_conversation_goes_on(engine, photo):
    conversation = Conversation.asking("Describe this image briefly.", [image.load(photo)])
    conversation.add_answer("".join(ask(engine, conversation, GREEDY)))
    conversation.add_question("Write a short poem about this image.")
    second = ask(engine, conversation, GREEDY)
    assert len("".join(second).split()) > 3
    assert (second.stop_reason == "length") == (second.stats.tokens == GREEDY.max_new_tokens)


@pytest.mark.parametrize("quantize", ["none", "w8a16", "int8", "nf4"])
def test_quantized(quantize, engine, photo):
    """In PyTorch, int8 and nf4 by bitsandbytes, on the CPU: all see the picture."""
    config = get_model("nano")
    model = load_model(config, find_weights(config), quantize=quantize)
    kinds = {"w8a16": "Int8Linear", "int8": "Linear8bitLt", "nf4": "Linear4bit", "none": "Linear"}
    assert kinds[quantize] in {type(m).__name__ for m in model.llm.modules()}
    assert model.encoder.net._conv_stem.weight.dtype == model.projection.weight.dtype
    question = "Describe this image briefly."
    asked, short = image.load(photo), replace(GREEDY, max_new_tokens=12)
    rough = set(answer(Engine(model), question, asked, sampling=short).lower().split())
    exact = set(answer(engine, question, asked, sampling=short).lower().split())
    assert len(rough & exact) >= 2, (rough, exact)


def test_ask_on_the_command_line(photo, tmp_path):
    asked = ["ask", str(photo), "What is this?", "--model", "nano", "--seed", "1"]
    done = python("-m", "minigpt4", *asked)
    assert len(done.stdout.split()) > 2 and "<|" not in done.stdout
    # A folder: good and bad files, one JSON line each.
    (tmp_path / "bad.png").write_text("no picture")
    out = tmp_path / "answers.jsonl"
    asked = ["ask", str(tmp_path), "What is this?", "--model", "nano", "--out", str(out)]
    python("-m", "minigpt4", *asked)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [("answer" in r, "error" in r) for r in records] == [(False, True), (True, False)]


def test_chat_on_the_command_line(photo):
    lines = "What is this?\n/image missing.jpg\nAnd where?\n/new\n/quit\n"
    options = ["--model", "nano", "--max-new-tokens", "12"]
    done = python("-m", "minigpt4", "chat", str(photo), *options, said=lines)
    assert done.stdout.count("> ") >= 4 and "missing.jpg" in done.stderr
    assert "Traceback" not in done.stderr


def test_mistakes_are_one_sentence(photo, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(tmp_path))  # nothing is there
    for arguments in (
        ["ask", "nowhere.jpg", "What?"],
        ["ask", str(photo)],
        ["ask", str(photo), "What?", "--model", "gpt-5"],
        ["ask", "https://example.org/a.jpg", "What?"],
        ["ask", str(photo), "What?", "--out", str(photo)],
        ["ask", str(photo), "What?", "--device", "cuda:77"],
        ["ask", str(photo), "What?", "--model", "vicuna-7b", "--projection", "nowhere.pth"],
        ["ask", str(photo), "What?", "--model", "vicuna-7b", "--vision", "nowhere.pth"],
        ["train", "--stage", "1", "--data", "nowhere.tar"],
        ["train", "--stage", "2", "--data", "nowhere"],
        ["evaluate", "nowhere.tar"],
        ["convert", "nowhere.pth", "out.safetensors"],
    ):
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("minigpt4: "), said


def test_evaluate_and_train_on_the_command_line(tmp_path):
    """Both stages and the scores, at the smallest size, by the commands in the docs."""
    from tests.training_case import write_descriptions, write_shard

    shard = write_shard(tmp_path / "train-00000.tar", 4)
    short = ["--steps", "2", "--batch-size", "2", "--device", "cpu"]
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["--stage", "1", "--data", str(shard), "--out", str(one)]
    python("-m", "minigpt4", "train", *options, *short)
    data = write_descriptions(tmp_path / "described", 4)
    options = ["--init", str(one / "nano.safetensors"), "--replay", str(shard), "--out", str(two)]
    assert main(["train", "--stage", "2", "--data", str(data), *options, *short]) == 0
    scores = tmp_path / "scores.json"
    options = ["--projection", str(two / "nano.safetensors"), "--json", str(scores), "--limit", "3"]
    assert main(["evaluate", str(shard), *options]) == 0
    result = json.loads(scores.read_text())
    assert {"bleu1", "bleu4", "cider", "repetition_rate", "fragment_rate"} <= result.keys()
    assert result["n"] == 3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_an_answer_takes_450_megabytes(photo):
    """At the peak, load included, beyond PyTorch: with CUDA's libraries, that alone takes 680."""
    # Each thread has buffers of its own, and by default there are as many as cores.
    variables = {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"}
    code = (
        "import sys, torch; from minigpt4.__main__ import main;"
        "peak = lambda: int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]);"
        "before = peak();"
        f"main(['ask', {str(photo)!r}, 'What is this?', '--model', 'nano', '--device', 'cpu']);"
        "print(peak() - before, file=sys.stderr)"
    )
    taken = int(python("-c", code, **variables).stderr.split()[-1])  # KiB
    assert taken < 450_000, f"{taken / 1e3:.0f} MB"
