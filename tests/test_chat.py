"""Conversations on a tiny real model: trimming, stopping, several pictures, reproducible draws."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from queue import Queue
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from minigpt4 import conversation as chat
from minigpt4 import start
from minigpt4.__main__ import _typed, main
from minigpt4.conversation import Conversation, ask, fit
from minigpt4.engine import Engine, Sampling
from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.model.prompt import Message, stop_sequences
from minigpt4.model.text import TextStream
from tests.fake_engine import FakeAnswer, FakeEngine
from tests.parity_case import ParityCase

GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def case():
    return ParityCase(Path(__file__).parent / "parity" / "vicuna_qformer_a")


@pytest.fixture(scope="module")
def engine(case):
    return Engine(case.load(llm_dtype=torch.float32))


@pytest.fixture(scope="module")
def pictures(case):
    return [image.load(path) for path in case.image_paths]


def small_context(engine, context: int) -> Engine:
    """The same engine with room for fewer tokens."""
    small = Engine(engine.model)
    small.model = _Shrunk(engine.model, context)
    return small


class _Shrunk:
    """A model that says its context is shorter; everything else is the model's."""

    def __init__(self, model, context: int) -> None:
        self._model = model
        self.config = replace(model.config, context=context)

    def __getattr__(self, name):
        return getattr(self._model, name)


def test_an_answer_streams_and_is_the_same_again(engine, pictures):
    conversation = Conversation.asking("Describe this image.", pictures[:1])
    first, second = (ask(engine, conversation, GREEDY) for _ in range(2))
    pieces = list(first)
    assert len(pieces) > 1 and "".join(pieces) == first.text == "".join(second)
    assert first.stats.tokens == 12 and first.stop_reason == "length"
    assert len(conversation.messages) == 1  # asking changes nothing


def test_seeds_reproduce_draws(engine, pictures):
    conversation = Conversation.asking("Describe this image.", pictures[:1])
    drawn = [
        "".join(ask(engine, conversation, Sampling(seed=seed, max_new_tokens=12)))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_other_pictures_other_answers(engine, pictures):
    asked = [Conversation.asking("Describe this image.", [picture]) for picture in pictures[:2]]
    first, second = ("".join(ask(engine, one, GREEDY)) for one in asked)
    assert first != second


def test_closing_ends_the_request(engine, pictures):
    conversation = Conversation.asking("Describe this image.", pictures[:1])
    answer = ask(engine, conversation, replace(GREEDY, max_new_tokens=500))
    next(iter(answer))
    answer.close()
    assert answer.stop_reason == "closed" and answer.stats.tokens < 10
    assert list(answer) == []


def test_old_turns_go_and_pictures_stay(engine, pictures):
    conversation = Conversation()
    for i in range(12):
        conversation.add_question(f"Question number {i} about it?", [pictures[i % 2]][: i < 2])
        conversation.add_answer("A fairly long answer that takes room.")
    conversation.add_question("And the last one?")
    small = small_context(engine, 300)
    prompt, dropped = fit(conversation, small, 20)
    assert 0 < dropped < 12 and len(prompt) <= 280
    assert [ref.key for _, ref in prompt.images] == [pictures[0].key, pictures[1].key]
    whole = fit(conversation, small_context(engine, 5000), 20)[0]
    assert prompt.ids[:60] == whole.ids[:60]  # the system text stands
    answer = ask(small, conversation, GREEDY)
    assert f"{dropped} turns were left out" in answer.notice
    assert "".join(answer)


def test_much_text_is_refused_before_it_is_counted(engine, monkeypatch):
    """A megabyte takes the tokenizer a second, in which nothing else runs."""
    encoded = []
    encode = chat.encode_chat
    monkeypatch.setattr(chat, "encode_chat", lambda *a: encoded.append(a[0]) or encode(*a))
    with pytest.raises(UserError, match="system prompt have more than 200000 characters"):
        fit(Conversation([Message("user", ("Hi",))], system="word " * 100_000), engine, 20)
    old = [Message(role, ("word " * 9000,)) for _ in range(20) for role in ("user", "assistant")]
    talk = Conversation([*old, Message("user", ("Hi",))])
    with pytest.raises(UserError, match="conversation has more"):
        fit(talk, engine, 20, trim=False)
    assert not encoded
    assert fit(talk, engine, 20)[1] == 20
    assert all(sum(map(len, (p for m in one for p in m.parts))) < 200_000 for one in encoded)


def test_a_question_too_long_alone_is_refused(engine, pictures):
    conversation = Conversation.asking("word " * 2000, pictures[:1])
    with pytest.raises(UserError, match="too long"):
        ask(engine, conversation, GREEDY)


def test_a_system_prompt_that_is_too_long_is_named(engine):
    conversation = Conversation(system="word " * 2000)
    conversation.add_question("Hi")
    before = engine.totals.errors["too_long"]
    with pytest.raises(UserError, match=r"system prompt is too long: with the question it .* fit"):
        ask(engine, conversation, GREEDY)
    assert engine.totals.errors["too_long"] == before + 1


def test_an_empty_question_is_refused():
    with pytest.raises(UserError, match="empty"):
        Conversation().add_question("  \n")


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"max_new_tokens": 0},
        {"num_beams": 10**9},
        {"seed": 1.5},
        {"seed": -2},
        {"repetition_penalty": True},
        {"temperature": 1e-40},
        {"repetition_penalty": 1e-40},
    ],
)
@pytest.mark.trust("Protocol", "unknown fields, wrong types, numbers beyond any float")
def test_senseless_parameters_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_a_beam_search_can_be_stopped_and_lets_others_in(engine, pictures):
    """While a long search runs in another thread, a short answer comes and the search is ended."""
    conversation = Conversation.asking("Describe this image.", pictures[:1])
    search = ask(engine, conversation, Sampling(num_beams=8, max_new_tokens=1500))
    with ThreadPoolExecutor() as pool:
        result = pool.submit(lambda: "".join(search))
        assert "".join(ask(engine, conversation, GREEDY))
        assert not result.done()
        search.close()
        assert result.result(timeout=30) == ""
    assert search.stop_reason == "closed"


def test_stop_strings_end_beams(engine):
    """Beams end where the template's plain stop string is spelled, however tokens spell it."""
    template, tokenizer = engine.model.config.template, engine.model.tokenizer
    sequences = stop_sequences(template, tokenizer)
    assert sequences and all("###" in tokenizer.decode(s) for s in sequences)
    alone = tuple(tokenizer.encode("###", add_special_tokens=False))
    assert alone in sequences


def test_answers_stream_as_they_are_decoded_whole(engine):
    """Pieces joined are the whole text: sentencepiece's spaces and byte tokens included."""
    tokenizer = engine.model.tokenizer

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    for text in ("A cat, a  dog.\n\nTwo naïve 猫 and 😀!", "  leading", "x", "don't | <b> 1,000"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        stream = TextStream(decode)
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.finish() == decode(ids)


def test_a_failed_answer_in_the_terminal_takes_its_question_back(tmp_path, monkeypatch, capsys):
    engine, photo = FakeEngine(0.0), tmp_path / "a.png"
    Image.new("RGB", (30, 20), "teal").save(photo)
    monkeypatch.setattr(start, "open_engine", lambda options: engine)
    monkeypatch.setattr(chat, "ask", FakeAnswer)
    lines = iter(["Please fail.", "What is it?", "And now?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", str(photo)]) == 0
    assert "ran out of memory" in capsys.readouterr().err
    roles = [[m.role for m in conversation.messages] for conversation in engine.asked]
    assert roles[1:] == [["user", "assistant"], ["user", "assistant"] * 2]
    assert len(engine.asked[1].messages[0].images) == 1  # the photo goes with the next question


def test_what_is_typed_in_the_terminal(monkeypatch, capsys):
    """No question: commands that are misspelt. A question: one that begins with a path."""
    engine = FakeEngine(0.0)
    monkeypatch.setattr(start, "open_engine", lambda options: engine)
    monkeypatch.setattr(chat, "ask", FakeAnswer)
    monkeypatch.delitem(sys.modules, "readline", raising=False)
    wrong = ["/iamge x.jpg", "/new chat", "/help", "/"]
    lines = iter([*wrong, "/home/x is what?"])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise RuntimeError("input(): lost sys.stdin") from None  # as with <&-

    monkeypatch.setattr("builtins.input", typed)
    assert main(["chat"]) == 0
    said = capsys.readouterr().err
    assert all(f"There is no command “{line}”." in said for line in wrong)
    assert [c.messages[0].parts for c in engine.asked] == [("/home/x is what?",)]
    assert ("readline" in sys.modules) == (find_spec("readline") is not None)


def test_paths_in_the_terminal_as_people_write_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    Image.new("RGB", (30, 20), "teal").save(tmp_path / "my photo.png")
    for path in ("~/my photo.png", f"'{tmp_path}/my photo.png'", f"{tmp_path}/my\\ photo.png"):
        image.load(_typed(path))
    assert _typed("Ann's.png") == "Ann's.png"
    for arguments, said in (
        (["ask", "~/gone.png", "What?"], f"{tmp_path}/gone.png does not exist"),
        (["ask", "~/my photo.png", " "], "The question is empty"),
        (["ask", "~/my photo.png", "What", "is", "it"], "What does not exist: check the path and "),
        (["ask", "-", "What?"], "A picture is not read from standard input"),
        (["chat", "~/my photo.png", "What is it?"], "What is it? is no picture file: ask when "),
    ):
        assert main(arguments) == 2
        assert said in capsys.readouterr().err


def test_a_folder_that_was_deleted(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["ask", "/a.png", "What?"]) == 2
    assert capsys.readouterr().err == (
        "minigpt4: The current folder is gone: change to another one.\n"
    )


def test_closed_outputs(monkeypatch, capsys):
    """Python has None for them: what is printed to it goes to the other one."""
    monkeypatch.setattr("sys.stdout", None)
    assert main(["chat"]) == 2
    assert "Standard output is closed" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("sys.stderr", None)
    assert main(["ask", "gone.png", "What?"]) == 2
    assert capsys.readouterr().out == ""
    full = SimpleNamespace(write=Mock(side_effect=OSError), flush=Mock(side_effect=OSError))
    monkeypatch.setattr("sys.stderr", full)  # as 2>/dev/full
    assert main(["ask", "gone.png", "What?"]) == 2 and full.write.called


def test_pictures_are_encoded_while_the_user_types(tmp_path, monkeypatch):
    """In the terminal, too: those of the command line and those added later."""
    engine, seen = FakeEngine(0.0), Queue[str]()
    for name in "ab":
        Image.new("RGB", (30, 20), "teal").save(tmp_path / f"{name}.png")
    monkeypatch.setattr(engine, "encode", lambda picture: seen.put(picture.key), raising=False)
    monkeypatch.setattr(start, "open_engine", lambda options: engine)

    def typed(prompt: str) -> str:
        seen.get(timeout=60)  # before anything is sent
        return next(lines)

    lines = iter([f"/image {tmp_path / 'b.png'}", "/quit"])
    monkeypatch.setattr("builtins.input", typed)
    assert main(["chat", str(tmp_path / "a.png")]) == 0


def test_two_answers_at_once_are_as_alone(engine, pictures):
    """Two streams read in turn give what each gives alone."""
    conversations = [Conversation.asking("Describe this image.", [one]) for one in pictures[:2]]
    alone = ["".join(ask(engine, c, GREEDY)) for c in conversations]
    streams = [iter(ask(engine, c, GREEDY)) for c in conversations]
    together = ["", ""]
    for _ in range(GREEDY.max_new_tokens + 1):
        for i, stream in enumerate(streams):
            together[i] += next(stream, "")
    assert together == alone
