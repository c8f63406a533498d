"""What a conversation does, without a browser: with a tiny random model, and with none."""

import asyncio
import json
import re
import time
from pathlib import Path

import gradio as gr
import pytest
from gradio.utils import get_upload_folder
from PIL import Image
from playwright.sync_api import expect

from minigpt4.conversation import ask as chat_ask
from minigpt4.engine import Engine, Sampling
from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.web.page import session as session_module
from minigpt4.web.page import transcript
from minigpt4.web.page.files import Files
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.session import Session
from minigpt4.web.page.shown import literal, show, written
from minigpt4.web.page.texts import TEXTS, say
from minigpt4.web.page.turns import Turns, waiting
from tests.api_case import at_rest
from tests.fake_engine import FakeAnswer, FakeEngine
from tests.page_case import WIDE, Visitors, answers, attach, done, picture, served, status
from tests.page_case import ask as page_ask
from tests.parity_case import ParityCase

SORRY = say("sorry", None)


@pytest.fixture(scope="module")
def engine():
    """A tiny random model: it answers in gibberish, but it answers."""
    model = ParityCase(Path(__file__).parent / "parity" / "vicuna_qformer_a").load()
    engine = Engine(model)
    engine.eos_ids = frozenset()  # its answers never end before their time
    return engine


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(gr, "Warning", lambda text, **_: said.append(text))
    return said


def ask(engine, session: Session, text: str, tokens: int = 20, seed: str = ""):
    turns = Turns(Loading.done(engine), ["max_new_tokens", "seed"])
    return turns.ask({"text": text, "files": []}, session, None, tokens, seed, "")


def answered(steps) -> list:
    async def collect() -> list:
        return [step async for step in steps]

    return asyncio.run(collect())


def test_an_error_while_answering_is_one_sentence(engine, caplog, warnings, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA out of cheese")

    session = Session()
    answered(ask(engine, session, "Hello?"))
    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder, "forward", fail)
        steps = answered(ask(engine, session, "Still there?"))
    assert SORRY in str(steps[-1]) or SORRY in str(warnings)
    assert "cheese" not in str(steps) and "cheese" in caplog.text
    answered(ask(engine, session, "Now?"))
    roles = [m.role for m in session.conversation.messages]
    assert roles in (["user", "assistant"] * 2, ["user", "assistant"] * 3)
    assert SORRY not in str(session.conversation.messages)
    assert not session.busy


def test_a_visitor_who_leaves_ends_the_answer(engine, monkeypatch):
    session, real = Session(), engine.decoder.forward

    def slowly(rows):  # the answer to this seed has hundreds of tokens: seconds
        time.sleep(0.01)
        return real(rows)

    monkeypatch.setattr(engine.decoder, "forward", slowly)

    async def leave() -> None:
        steps = ask(engine, session, "Hello?", 1000, seed="4")
        for _ in range(4):
            await anext(steps)
        await steps.aclose()

    asyncio.run(leave())
    assert session.answer.stop_reason == "closed" and not session.busy
    assert session.last and session.can_continue


def test_a_question_that_cannot_be_asked_changes_nothing(engine, warnings):
    session = Session()
    answered(ask(engine, session, "word " * 5000))
    assert session == Session() and "too long" in warnings[0]


def test_a_seed_that_is_no_number(engine, warnings):
    answered(ask(engine, Session(), "Hello?", seed="lucky"))
    assert "whole number" in warnings[0]


def test_an_answer_goes_on_where_it_was_cut(engine):
    """Greedily, twice twelve tokens give the text that twenty-four do."""
    turns = Turns(Loading.done(engine), ["max_new_tokens", "temperature"])

    def run(tokens: int) -> Session:
        session = Session()
        value = {"text": "Hello?", "files": []}
        answered(turns.ask(value, session, None, tokens, 0.0, ""))
        return session

    whole, cut = run(24), run(12)
    assert whole.last.startswith(cut.last) and cut.can_continue
    chosen = gr.SelectData(None, {"index": 0, "value": "continue"})
    answered(turns.option(cut, chosen, None, 12, 0.0, ""))
    assert len(cut.last) > len(whole.last) / 2
    assert [m.role for m in cut.conversation.messages] == ["user", "assistant"]


def test_loading_is_said(warnings):
    loading = Loading(lambda report: report("Fetching everything …") or FakeEngine())
    answered(Turns(loading, []).ask({"text": "Hello?", "files": []}, Session(), None, ""))
    assert "still being loaded" in warnings[0]
    loading.start()
    assert isinstance(loading.wait(), FakeEngine) and loading.step == "Fetching everything …"

    def fail(report):
        raise UserError("There is no model.")

    loading = Loading(fail)
    loading.start()
    with pytest.raises(UserError, match="There is no model"):
        loading.wait()


def test_two_questions_at_once(monkeypatch, warnings):
    monkeypatch.setattr(session_module, "ask", FakeAnswer)
    engine, session = FakeEngine(), Session()

    async def both() -> None:
        first = ask(engine, session, "One?")
        await anext(first)
        assert [step async for step in ask(engine, session, "Two?")] == [(gr.skip(),) * 3]
        async for _ in first:
            pass

    asyncio.run(both())
    assert len(engine.asked) == 1 and "stop it first" in warnings[0]


def test_remarks_are_shown_but_not_sent(monkeypatch):
    monkeypatch.setattr(session_module, "ask", FakeAnswer)
    engine, session = FakeEngine(), Session()
    answered(ask(engine, session, "Forget!"))
    messages, places = show(session)
    assert "left out" in messages[1]["content"] and places == [0, -1, 1]
    answered(ask(engine, session, "Hello?"))
    assert "left out" not in str(engine.asked[-1].messages)
    session.undo()
    session.undo()
    assert show(session) == ([], [])


def test_a_conversation_that_is_left_before_its_answer_begins(monkeypatch):
    """New chat while the question is on its way: no answer is given, the new page stays empty."""
    given = []

    def slow(*arguments):
        time.sleep(0.3)
        given.append(FakeAnswer(*arguments))
        return given[0]

    monkeypatch.setattr(session_module, "ask", slow)
    engine, session = FakeEngine(), Session()

    async def leave() -> list:
        steps = ask(engine, session, "Tell me something long.")
        first = asyncio.ensure_future(anext(steps))
        await asyncio.sleep(0.1)
        session.leave(Session())
        return [await first] + [step async for step in steps]

    shown = asyncio.run(leave())
    assert given[0].stop_reason == "closed" and given[0].stats.tokens < 3
    assert [messages for messages, _, _ in shown] == [[]]
    assert session.successor.predecessor is session


def test_an_answer_that_nobody_has_any_more_ends(engine):
    conversation = Session().asking("Hello?", [])
    answer = chat_ask(engine, conversation, Sampling(max_new_tokens=400))
    stream = answer._stream
    del answer
    assert at_rest(engine) and stream.stop_reason == "closed"


def test_thin_strips_can_be_shown_and_kept():
    for size in ((5000, 1), (1, 1200)):
        session, path = Session(), uploads_folder() / f"{size[0]}.png"
        Image.new("RGB", size, "teal").save(path)
        session.keep(session.asking("", [str(path)]))
        shown, _ = show(session)
        assert Path(shown[0]["content"]["path"]).is_file()
        attached(files_of_a_page(), [str(path)], session)
        (kept,) = session.uploads.values()
        assert sorted(kept.rgb.size) == [1, session_module.KEPT_SIDE]


def test_nothing_is_taken_back_from_under_an_answer(monkeypatch, warnings):
    monkeypatch.setattr(session_module, "ask", FakeAnswer)
    engine, session = FakeEngine(), Session()

    async def both() -> None:
        steps = ask(engine, session, "Hello?")
        await anext(steps)
        assert Turns(Loading.done(engine), []).undo(session, None) == (gr.skip(),) * 3
        async for _ in steps:
            pass

    asyncio.run(both())
    assert session.last and "stop it first" in warnings[0]


def files_of_a_page() -> Files:
    loading = Loading.done(FakeEngine())
    return Files(loading, Turns(loading, []))


def uploads_folder() -> Path:
    folder = Path(get_upload_folder())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def attached(files: Files, paths: list[str], session: Session) -> tuple:
    """The last that the page is told: files to be taken out of the box, status."""
    *_, last = files.attach({"text": "", "files": paths}, session, None)
    return last


def test_pictures_taken_out_of_the_box_are_given_back(warnings):
    folder = uploads_folder()
    paths = [str(picture(folder / f"{n}.png", f"#0000{n:02x}")) for n in range(20)]
    files, session = files_of_a_page(), Session()
    attached(files, paths[:2], session)
    assert attached(files, paths[1:3], session) == ([], say("looked", None))
    assert [*session.uploads] == paths[1:3]
    refused, _ = attached(files, paths, session)
    assert refused == paths[16:] and "at most 16" in warnings[0]


def test_large_pictures_are_held_one_at_a_time(monkeypatch, warnings):
    """The engine sees them whole; neither what waits in the box nor a question that was refused
    keeps them so."""
    area, before, seen = 2000 * 2000, image.held.pixels, []

    def encode(seeing) -> None:
        seen.append((seeing.rgb.size, image.held.pixels - before))

    files, session, paths = files_of_a_page(), Session(), []
    monkeypatch.setattr(files._loading.engine, "encode", encode)
    for number in range(4):
        paths.append(str(uploads_folder() / f"large-{number}.png"))
        Image.new("1", (2000, 2000), number % 2).save(paths[-1])
    attached(files, paths, session)
    small = session_module.KEPT_SIDE**2
    assert [size for size, _ in seen] == [(2000, 2000)] * 4
    assert [held for _, held in seen] == [area + n * small for n in range(4)]
    assert image.held.pixels - before == 4 * small
    monkeypatch.setattr(files._loading, "engine", None)
    attached(files, paths, session := Session())
    full = FakeEngine()
    full.full = True
    monkeypatch.setattr(session_module, "ask", FakeAnswer)
    turns = Turns(Loading.done(full), [])
    answered(turns.ask({"text": "", "files": paths}, session, None, ""))
    assert "Too many people" in warnings[-1]
    assert image.held.pixels == before


def test_an_opened_conversation_keeps_its_system_prompt():
    conversation = Session().asking("Hello?", [])
    conversation.system = "Answer in French."
    path = uploads_folder() / "kept.json"
    path.write_text(json.dumps(transcript.to_data(conversation, 64)))
    session, *_, system = files_of_a_page().open(str(path), Session(), None)
    assert system["value"] == "Answer in French."
    assert session.name  # what becomes of it has an entry of its own in the browser's list


def test_text_is_shown_as_it_was_written():
    text = "a <b> ![x](http://y) `<b>` <b>\n```html\n<b>"
    assert literal(text) == ("a &#0060;b> !&#0091;x](http://y) `<b>` &#0060;b>\n```html\n<b>")
    assert written(literal(text)) == text


def test_beams_say_that_they_take_their_time():
    session = Session()
    session.answer = FakeAnswer(FakeEngine(), _asked("Hello?"), Sampling())
    assert "several" in waiting(session, 3, None)


def _asked(text: str):
    return Session().asking(text, [])


def test_every_language_says_everything():
    english = TEXTS["en"]
    assert set(TEXTS) >= {"en", "de", "es", "zh"}
    for name, texts in TEXTS.items():
        assert set(texts) == set(english), name
        for key, text in texts.items():
            fields = re.findall(r"{\w+}", english[key])
            assert sorted(re.findall(r"{\w+}", text)) == sorted(fields), (name, key)
            assert text.strip(), (name, key)


def test_the_first_language_that_is_spoken_counts():
    def asks(header: str) -> str:
        request = type("Request", (), {"headers": {"accept-language": header}})()
        return say("delete", request)

    assert asks("fr-FR,zh-CN;q=0.9,en;q=0.8") == "删除"
    assert asks("pt") == asks("") == "Delete"


def test_nano_answers_through_the_page(browser, tmp_path):
    """The real model: a picture, a question, a second one, from the file to the words."""
    import app
    from minigpt4.weights.sources import weights_folder

    if not (weights_folder() / "nano-llm").exists():
        pytest.skip("nano's weights are missing: python -m minigpt4 download nano")
    options = app.options(["--model", "nano", "--device", "cpu"])
    loading = Loading(lambda report: app.load(options, report))
    with served(loading) as address:
        loading.start()
        visitors = Visitors(browser, address)
        page = visitors(**WIDE)
        expect(status(page)).to_contain_text("The model is ready.")
        page.get_by_label("number input for Longest answer").fill("20")
        page.get_by_label("number input for Longest answer").press("Tab")
        page.get_by_label("precise").click()
        attach(page, picture(tmp_path / "meadow.png"))
        page_ask(page, "Describe this image briefly.")
        expect(answers(page)).to_contain_text(re.compile(r"\w{3,} \w+"))
        if page.get_by_role("button", name="Continue").count():
            before = answers(page).inner_text()
            page.get_by_role("button", name="Continue").click()
            expect(answers(page)).not_to_have_text(before)
            done(page)
            assert answers(page).inner_text().startswith(before.strip())
        page_ask(page, "What colours are there?")
        expect(answers(page)).to_have_count(2)
        visitors.check()
