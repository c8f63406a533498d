"""mini end to end, with its real weights: half a gigabyte, which is fetched once."""

import re
from importlib import resources

import pytest
import torch

from minigpt4 import start
from minigpt4.batch import greedy
from minigpt4.config import get_model
from minigpt4.conversation import Conversation, ask
from minigpt4.engine import Engine
from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.weights.load import download_weights, find_weights, load_model

MINI = get_model("mini")


@pytest.fixture(scope="module")
def engine():
    """As users get it: the file's own blocks where there is a C compiler, else PyTorch."""
    try:
        download_weights(MINI)
    except UserError as error:
        pytest.skip(f"mini's weights are not available: {error}")
    quantize = start.quantize_of("auto", MINI, torch.device("cpu"))
    with Engine(load_model(MINI, find_weights(MINI), quantize=quantize)) as engine:
        yield engine


@pytest.fixture(scope="module")
def admiral():
    """A portrait in the public domain that matplotlib brings."""
    source = resources.files("matplotlib") / "mpl-data" / "sample_data" / "grace_hopper.jpg"
    return image.load(source.read_bytes())


@pytest.fixture(scope="module")
def cheetah():
    """A big cat, photographed, that gradio brings."""
    source = resources.files("gradio") / "media_assets" / "images" / "cheetah1.jpg"
    return image.load(source.read_bytes())


def answer(engine, question: str, *pictures, tokens: int = 60) -> str:
    return "".join(ask(engine, Conversation.asking(question, pictures), greedy(tokens)))


def test_it_finds_words(engine, admiral, cheetah):
    found = engine.encode(admiral).words
    assert "woman" in found or "man" in found or "person" in found
    assert engine.encode(cheetah).words != found
    assert len(found.split(", ")) <= MINI.words.most


def test_it_does_what_is_asked(engine, admiral):
    """A caption is one sentence, details are several, a poem has lines; a question is answered with
    yes or no, a web page is HTML."""
    caption = answer(engine, MINI.short_instruction, admiral)
    assert re.search(r"\b(man|woman|person|girl|boy|lady)\b", caption), caption
    assert caption.count(".") == 1 and len(caption.split()) < 30
    yes_no = answer(engine, "Is there a person in the image? Answer yes or no.", admiral)
    assert yes_no.strip(" .").lower() == "yes"
    assert answer(engine, "Is there a bicycle in the image? Answer yes or no.", admiral)[:2] == "No"
    detail = answer(engine, MINI.detail_instruction, admiral, tokens=120)
    assert len(re.findall(r"[.!?](?:\s|$)", detail)) > 1, detail
    poem = answer(engine, "Write a four-line poem about this picture.", admiral, tokens=120)
    assert len([line for line in poem.splitlines() if line.strip()]) > 2, poem
    page = answer(engine, "Write the HTML of a web page about this person.", admiral)
    assert re.search(r"<(html|body|h1|p)\b", page) and "\n" in page, page


def test_it_tells_pictures_apart(engine, admiral, cheetah):
    """Two pictures of one message are both listed, each after its own embeddings."""
    first, second = (answer(engine, MINI.short_instruction, p) for p in (admiral, cheetah))
    assert first != second
    assert answer(engine, "What is in these two images?", admiral, cheetah)
