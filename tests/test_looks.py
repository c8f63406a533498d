"""First looks at a picture, before anyone asks: captions, objects; titles of conversations."""

import asyncio

import gradio as gr
import pytest
import torch
from PIL import Image

from minigpt4.conversation import Conversation
from minigpt4.model.detector import OBJECTS, detections
from minigpt4.model.image import Picture
from minigpt4.web.page import looks, session
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.looks import FirstLook, first_sentence
from minigpt4.web.page.session import Session
from minigpt4.web.page.titles import title
from minigpt4.web.page.turns import Turns
from tests.fake_engine import CAPTION, FakeAnswer, FakeEngine


def a_picture(key: str) -> Picture:
    return Picture(Image.new("RGB", (8, 8)), key)


def peak(x: int, y: int, height: float, deviation: float) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(80.0), torch.arange(80.0), indexing="ij")
    return height * torch.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * deviation**2))


def test_objects_are_the_sure_peaks_of_the_heat_map():
    heat, edges = torch.zeros(len(OBJECTS), 80, 80), torch.zeros(4, 80, 80)
    dog, cat = OBJECTS.index("dog"), OBJECTS.index("cat")
    heat[dog] = torch.maximum(peak(20, 60, 0.9, 4), peak(60, 10, 0.6, 2))
    heat[cat] = peak(40, 40, 0.2, 3)  # too weak
    heat[dog, 62, 22] = 0.5  # a second peak of the first dog
    edges[:, 60, 20] = edges[:, 62, 22] = torch.tensor([40.0, 80.0, 60.0, 100.0])
    edges[:, 10, 60] = torch.tensor([8.0, 8.0, 8.0, 8.0])
    first, second = detections(heat, edges)
    assert (first.name, second.name) == ("dog", "dog")
    assert first[1:5] == (10 / 80, 40 / 80, 35 / 80, 1.0)  # no further than the picture
    assert second[1:5] == (58 / 80, 8 / 80, 62 / 80, 12 / 80)
    assert first.certainty == pytest.approx(0.9) and second.certainty == pytest.approx(0.6)
    assert detections(torch.zeros_like(heat), edges) == ()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("The image shows a red house. It stands by a lake.", "A red house"),
        ("In this picture, there are two dogs on a beach!", "Two dogs on a beach"),
        ("two dogs", "Two dogs"),
        ("A man " + "and a man " * 9 + "and a wom", "A man " + "and a man " * 9 + "and a…"),
        ("", ""),
    ],
)
def test_the_first_sentence(text, sentence):
    assert first_sentence(text) == sentence


def test_titles_say_what_is_in_the_picture():
    picture = a_picture("titled")
    conversation = Conversation.asking("Describe this image in detail.", [picture])
    assert title(conversation) == "Describe this image in detail."
    conversation.add_answer("The image shows a boat on a lake. It is small.")
    assert title(conversation) == "A boat on a lake"
    assert title(conversation, {picture.key: "A boat, an oar,"}) == "A boat, an oar"
    looks.note(picture.key, caption="A boat")
    assert title(conversation) == "A boat"

    for asked in (
        "Write a poem.",
        "Tell a short story about this.",
        "Beschreibe dieses Bild",
        "描述这张图片。",
    ):
        of_any = Conversation.asking(asked, [picture])
        assert title(of_any) == "A boat", asked

    telling = Conversation.asking("What is unusual about this image?", [picture])
    telling.add_answer("It sails in the sand.")
    assert title(telling) == "What is unusual about this image?"


@pytest.fixture
def look(monkeypatch):
    """Attach a picture, and have it captioned: the caption, "" where there is none."""
    monkeypatch.setattr(session, "ask", FakeAnswer)

    def caption(key: str, busy: bool = False, **state) -> str:
        engine = FakeEngine()
        for name, value in state.items():
            setattr(engine, name, value)
        visitor = Session(uploads={"photo.png": a_picture(key)}, busy=busy)
        first_look = FirstLook(Loading.done(engine))
        found = asyncio.run(first_look.caption({"files": ["photo.png", "gone.png"]}, visitor))
        assert found.keys() == {"photo.png"}
        return found["photo.png"]

    return caption


def test_a_picture_is_captioned_while_nothing_else_runs(look):
    assert look("alone") == CAPTION.rstrip(".")
    assert look("others run", running=1) == look("others wait", waiting=1) == ""
    assert look("a question was sent", busy=True) == ""
    assert look("the queue is full", full=True) == ""


def test_a_caption_gives_way_to_a_question(look, monkeypatch):
    """It is left unfinished as soon as another request runs beside it."""
    words = FakeAnswer.__aiter__

    async def joined(answer):
        async for word in words(answer):
            answer._engine.running = 2
            yield word

    monkeypatch.setattr(FakeAnswer, "__aiter__", joined)
    assert look("joined") == ""


def test_what_was_sent_at_once_is_captioned_after_its_answer(monkeypatch):
    monkeypatch.setattr(session, "ask", FakeAnswer)
    turns, visitor = Turns(Loading.done(FakeEngine()), []), Session()
    visitor.conversation.add_question("What is it?", [a_picture("sent at once")])
    visitor.rendered[0] = (visitor.conversation.messages[0], [])
    messages, kept = asyncio.run(turns.look(visitor, None))
    assert looks.find("sent at once").caption == CAPTION.rstrip(".")
    assert messages and kept["records"] and len(visitor.rendered) <= 1
    assert asyncio.run(turns.look(visitor, None)) == (gr.skip(), gr.skip())  # there is nothing new
