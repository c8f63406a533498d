"""Turns of a conversation without a browser: with a tiny random model, and with none."""

import ast
import asyncio
import copy
import gc
import json
import pickle
import re
import threading
import time
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import gradio as gr
import pytest
from gradio.utils import get_upload_folder
from PIL import Image
from playwright.sync_api import expect

from minigpt4 import start
from minigpt4.conversation import ask as chat_ask
from minigpt4.engine import Engine, Sampling
from minigpt4.engine.stream import KINDS, failure
from minigpt4.errors import Kind, Step, UserError
from minigpt4.model import image
from minigpt4.web.guard import decoding
from minigpt4.web.guard.uploads import uploaded
from minigpt4.web.page import looks, render, transcript
from minigpt4.web.page import session as session_module
from minigpt4.web.page.answers import waiting
from minigpt4.web.page.examples import EXAMPLES
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.page import ChatPage
from minigpt4.web.page.render import literal, show, unescape, verbatim
from minigpt4.web.page.session import Session, too_many_pictures
from minigpt4.web.page.texts import PREFIX, TEXTS, explain, translate, translate_step
from minigpt4.web.page.turns import Turns
from minigpt4.web.page.uploads import Uploads
from minigpt4.weights.transfer import Progress
from tests.api_case import at_rest
from tests.fake_engine import FakeAnswer, FakeEngine
from tests.page_case import (
    WIDE,
    Visitors,
    answers,
    attach,
    done,
    open_settings,
    picture,
    served,
    status,
)
from tests.page_case import ask as page_ask
from tests.parity_case import ParityCase

SORRY = translate("sorry", None)
PICTURE_ERRORS = {  # file -> the error's name
    "empty": "picture_empty",
    "text": "not_a_picture",
    "large": "picture_too_large",
    "cut": "picture_damaged",
}


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
    return turns.ask({"text": text, "files": []}, session, None, tokens, seed, "", None)


def answered(steps) -> list:
    async def collect() -> list:
        return [step async for step in steps]

    return asyncio.run(collect())


def test_an_example_has_its_seed_and_caption(monkeypatch, tmp_path):
    """Unless the visitor has chosen a seed; trying again draws anew."""
    monkeypatch.setattr(session_module, "ask", FakeAnswer)
    engine, clicked = FakeEngine(0.0), SimpleNamespace(index=0)
    first, *_ = EXAMPLES.values()
    turns, session = Turns(Loading.done(engine), ["seed"]), Session()
    answered(turns.example(session, clicked, None, "", "", None))
    answered(turns.retry(session, None, "", "", None))
    answered(turns.example(Session(), clicked, None, "7", "", None))
    assert [sampling.seed for sampling in engine.samplings] == [first.seed, None, 7]
    key = session.conversation.messages[0].images[0].key
    assert looks.find(key).caption == first.caption


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


@pytest.mark.trust("Load and interruptions", "a tab that is closed")
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
    assert session.last_answer and session.can_continue


def test_a_question_that_cannot_be_asked_changes_nothing(engine, warnings):
    session = Session()
    answered(ask(engine, session, "word " * 5000))
    assert session == Session() and "too long" in warnings[0]


@pytest.mark.parametrize("seed", ["lucky", "-2", "9" * 19])
def test_a_seed_that_is_no_number(engine, warnings, seed):
    answered(ask(engine, Session(), "Hello?", seed=seed))
    assert "whole number" in warnings[0]


def test_a_seed_of_minus_one_is_a_new_one(engine, warnings):
    session = Session()
    answered(ask(engine, session, "Hello?", seed="-1"))
    assert session.last_answer and not warnings


def test_an_answer_goes_on_where_it_was_cut(engine):
    """Greedily, twice twelve tokens give the text that twenty-four do."""
    turns = Turns(Loading.done(engine), ["max_new_tokens", "temperature"])

    def run(tokens: int) -> Session:
        session = Session()
        value = {"text": "Hello?", "files": []}
        answered(turns.ask(value, session, None, tokens, 0.0, "", None))
        return session

    whole, cut = run(24), run(12)
    assert whole.last_answer.startswith(cut.last_answer) and cut.can_continue
    chosen = gr.SelectData(None, {"index": 0, "value": "continue"})
    answered(turns.option(cut, chosen, None, 12, 0.0, "", None))
    assert len(cut.last_answer) > len(whole.last_answer) / 2
    assert [m.role for m in cut.conversation.messages] == ["user", "assistant"]


def test_a_question_that_was_stopped_before_the_first_word(monkeypatch):
    """It can be answered now, or left as it is; the conversation can be opened again."""
    monkeypatch.setattr(session_module, "ask", FakeAnswer)
    engine = FakeEngine()

    async def stopped() -> Session:
        engine.ahead, session = 1, Session()
        async for _ in ask(engine, session, "Alpha again"):
            session.stop()
        engine.ahead = 0
        return session

    def reopened(session: Session) -> Session:
        value = {"data": {**transcript.to_data(session, "", None), "pictures": {}}}
        chosen = SimpleNamespace(value=value)
        return uploads_of_a_page().reopen(Session(), chosen, None)[0]

    for way in (lambda session: session, reopened):
        session = way(asyncio.run(stopped()))
        last = render.messages(session, None)[-1]
        assert "not been answered" in str(last) and last["options"]
        answered(ask(engine, session, "Beta again"))
        said = [bool(m.parts[0]) for m in session.conversation.messages]
        assert said == [True, False, True, True]
        assert reopened(session).last_answer

        session = way(asyncio.run(stopped()))
        chosen = SimpleNamespace(index=0, value="continue")
        answered(Turns(Loading.done(engine), []).option(session, chosen, None, "", None))
        assert session.last_answer.startswith("This is answer")
        assert [m.role for m in session.conversation.messages] == ["user", "assistant"]


def test_loading_is_said(warnings):
    loading = Loading(lambda report: report("Fetching everything …") or FakeEngine())
    answered(Turns(loading, []).ask({"text": "Hello?", "files": []}, Session(), None, "", None))
    assert "still loading" in warnings[0]
    loading.start()
    loading.wait()
    assert isinstance(loading.engine, FakeEngine) and loading.step == "Fetching everything …"

    short = UserError("Too little memory is free.", "memory")  # not for an answer
    for error, said, shown in (
        (UserError("There is no model."), "There is no model", "模型无法加载。.*There is no model"),
        (short, "memory is free", "模型无法加载。.*memory is free"),
        (OSError("I/O error"), "The model could not be loaded: the server", "服务器日志"),
    ):

        def fail(report, error=error):
            raise error

        engine = FakeEngine()
        loading = Loading(lambda report, engine=engine: engine, fail)
        loading.start()
        with pytest.raises(UserError, match=said):
            loading.wait()
        assert not loading.engines and engine.closed  # all, or none
        for request, pattern in ((chinese(), shown), (None, said)):
            answered(
                Turns(loading, []).ask({"text": "Hi", "files": []}, Session(), request, "", None)
            )
            assert re.search(pattern, warnings.pop())
            progress = ChatPage.show_progress(
                SimpleNamespace(_loading=loading), None, Session(), request
            )
            assert re.search(pattern, progress[0])


@pytest.mark.trust("Load and interruptions", "a question sent twice, two tabs")
def test_two_questions_at_once(monkeypatch, warnings):
    monkeypatch.setattr(session_module, "ask", FakeAnswer)
    engine, session = FakeEngine(), Session()

    async def both() -> None:
        first = ask(engine, session, "One?")
        await anext(first)
        assert [step async for step in ask(engine, session, "Two?")] == [(gr.skip(),) * 4]
        async for _ in first:
            pass

    asyncio.run(both())
    assert len(engine.asked) == 1 and "stop it first" in warnings[0]


def test_remarks_are_shown_but_not_sent(monkeypatch):
    monkeypatch.setattr(session_module, "ask", FakeAnswer)
    engine, session = FakeEngine(), Session()
    answered(ask(engine, session, "Forget!"))
    messages, places = show(session)
    assert "left out" in str(messages[1]["content"]) and places == [0, -1, 1]
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
    assert [messages for messages, *_ in shown] == [[]]
    assert session.successor.unrecorded == [session]


def test_an_answer_that_is_cancelled_between_two_awaits_ends(monkeypatch):
    """While the engine is asked, while pictures are scaled, while words come: it is closed."""
    given = []

    def slow(*arguments):
        time.sleep(0.2)
        given.append(FakeAnswer(*arguments))
        return given[-1]

    def scale(conversation):
        time.sleep(0.2)
        return {}

    monkeypatch.setattr(session_module, "ask", slow)
    monkeypatch.setattr(session_module, "_shrunk", scale)

    async def cancel(after: float) -> None:
        session = Session()
        run = session.run(FakeEngine(0.01), _asked("A long one, please."), Sampling())

        async def read() -> None:
            async with aclosing(run) as steps:
                async for _ in steps:
                    pass

        task = asyncio.create_task(read())
        await asyncio.sleep(after)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(1)  # a thread cannot be cancelled: it may only now have asked

    for after in (0.1, 0.3, 0.6):
        asyncio.run(cancel(after))
        assert given.pop()._closed.is_set(), after


def test_only_messages_that_changed_are_rendered(monkeypatch):
    """A long conversation costs no more at each update than a short one."""
    monkeypatch.setattr(session_module, "ask", FakeAnswer)
    rendered = []
    for name in ("literal", "verbatim"):
        real = getattr(render, name)
        monkeypatch.setattr(
            render, name, lambda text, real=real: rendered.append(text) or real(text)
        )
    engine, session = FakeEngine(), Session()
    for number in range(3):
        answered(ask(engine, session, f"Question {number}?"))
    rendered.clear()
    start = time.monotonic()
    steps = answered(ask(engine, session, "A long one, please.", 80))
    assert 3 < len(steps) < 5 + (time.monotonic() - start) / 0.15  # phones are slow
    questions = [text for text in rendered if "word" not in text]
    assert len([text for text in questions if text]) <= 1  # the new question, once
    shown, _ = show(session)
    assert len(shown) == 8 and shown[:6] == show(session)[0][:6]


def test_the_event_loop_neither_reads_nor_writes_files(monkeypatch):
    """Pictures are opened and thumbnails written in threads."""
    monkeypatch.setattr(session_module, "ask", FakeAnswer)
    threads = {}
    for module, name in ((render, "save_bytes_to_cache"), (session_module.decoding, "load")):
        real = getattr(module, name)

        def watched(*arguments, real=real, name=name):
            threads.setdefault(name, set()).add(threading.current_thread())
            return real(*arguments)

        monkeypatch.setattr(module, name, watched)
    path = str(picture(uploads_folder() / "watched.png", "#123456"))
    turns, session = Turns(Loading.done(FakeEngine()), []), Session()
    answered(turns.ask({"text": "What is this?", "files": [path]}, session, None, "", None))
    assert set(threads) == {"save_bytes_to_cache", "load"}
    assert threading.main_thread() not in set().union(*threads.values())


def test_an_answer_that_nobody_has_any_more_ends(engine):
    conversation = Session().with_question("Hello?", [])
    answer = chat_ask(engine, conversation, Sampling(max_new_tokens=400))
    stream = answer._stream
    del answer
    assert at_rest(engine) and stream.stop_reason == "closed"


def test_thin_strips_can_be_shown_and_kept():
    for size in ((5000, 1), (1, 1200)):
        session, path = Session(), uploads_folder() / f"{size[0]}.png"
        Image.new("RGB", size, "teal").save(path)
        session.replace_conversation(session.with_question("", [str(path)]))
        render.make_thumbnails(session.conversation)
        shown, _ = show(session)
        assert Path(shown[0]["content"][0]["file"]["path"]).is_file()
        attached(uploads_of_a_page(), [str(path)], session)
        (kept,) = session.uploads.values()
        assert sorted(kept.rgb.size) == [1, session_module.KEPT_SIDE]


def test_nothing_is_taken_back_from_under_an_answer(monkeypatch, warnings):
    monkeypatch.setattr(session_module, "ask", FakeAnswer)
    engine, session = FakeEngine(), Session()

    async def both() -> None:
        steps = ask(engine, session, "Hello?")
        await anext(steps)
        turns = Turns(Loading.done(engine), [])
        assert await turns.undo(None, session, None, None) == (gr.skip(),) * 4
        async for _ in steps:
            pass

    asyncio.run(both())
    assert session.last_answer and "stop it first" in warnings[0]


def test_a_conversation_that_is_left_at_a_turns_end_is_not_shown_again(monkeypatch, warnings):
    monkeypatch.setattr(session_module, "ask", FakeAnswer)
    engine = FakeEngine()
    turns = Turns(Loading.done(engine), [])

    async def left_at_the_end() -> list:
        shown, session = [], Session()
        async for messages, *_ in ask(engine, session, "Hello?"):
            shown.append(messages)
            if not session.busy and not session.successor:
                session.leave(Session())
        return shown

    async def left_while_a_thumbnail_is_written() -> tuple:
        session = Session()
        async with aclosing(ask(engine, session, "Hello?")) as steps:
            assert [step async for step in steps]
        monkeypatch.setattr(render, "make_thumbnails", lambda _: session.leave(Session()))
        return await turns.undo(None, session, None, None)

    assert asyncio.run(left_at_the_end())[-1] == []
    assert asyncio.run(left_while_a_thumbnail_is_written())[0] == []
    # An edit may come when what was edited is no longer shown.
    edited = SimpleNamespace(index=3, value="Hello!")
    assert answered(turns.edit(Session(), edited, None, "", None))[-1][0] == []
    assert warnings == ["Only a question can be edited."]


def uploads_of_a_page() -> Uploads:
    loading = Loading.done(FakeEngine())
    return Uploads(loading)


def uploads_folder() -> Path:
    folder = Path(get_upload_folder())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def attached(uploads: Uploads, paths: list[str], session: Session) -> tuple:
    """The last that the page is told: files to be taken out of the box, status."""
    *_, (refused, status, _) = uploads.attach({"text": "", "files": paths}, session, None)
    return refused, status


def test_pictures_taken_out_of_the_box_are_given_back(warnings):
    folder = uploads_folder()
    paths = [str(picture(folder / f"{n}.png", f"#0000{n:02x}")) for n in range(20)]
    files, session = uploads_of_a_page(), Session()
    attached(files, paths[:2], session)
    assert attached(files, paths[1:3], session) == ([], translate("looked", None))
    assert [*session.uploads] == paths[1:3]
    refused, _ = attached(files, paths, session)
    assert refused == paths[16:] and "at most 16" in warnings[0]


def test_a_bad_file_that_is_sent_at_once_is_told_once(warnings):
    """Not by both its look and its question, which says what became of the rest."""
    path, uploads, session = uploads_folder() / "bad.png", uploads_of_a_page(), Session()
    path.write_text("no picture")
    assert attached(uploads, [str(path)], session) == ([str(path)], "")
    value = {"text": "", "files": [str(path)]}
    answered(Turns(uploads._loading, []).ask(value, session, None, "", None))
    assert len(warnings) == 1
    session.warned = warnings[0], session.warned[1] - session_module.SECONDS_PER_WARNING
    attached(uploads, [str(path)], session)
    assert len(warnings) == 2
    answered(Turns(uploads._loading, []).ask(value | {"text": "What?"}, session, None, "", None))
    assert len(warnings) == 3 and warnings[2].startswith("Nothing was sent: the rest is still in")


@pytest.mark.trust("Pictures", "many large pictures at once")
def test_large_pictures_are_held_one_at_a_time(monkeypatch, warnings):
    """The engine sees them whole; neither what waits in the box nor a question that was refused
    keeps them so."""
    gc.collect()  # pictures of earlier tests
    area, before, seen = 2000 * 2000, image.held.pixels, []

    def encode(seeing) -> None:
        seen.append((seeing.rgb.size, image.held.pixels - before))

    files, session, paths = uploads_of_a_page(), Session(), []
    monkeypatch.setattr(files._loading.engine, "encode", encode)
    for number in range(4):
        paths.append(str(uploads_folder() / f"large-{number}.png"))
        Image.new("1", (2000, 2000), number % 2).save(paths[-1])
    attached(files, paths, session)
    small = session_module.KEPT_SIDE**2
    assert [size for size, _ in seen] == [(2000, 2000)] * 4
    assert [held for _, held in seen] == [area + n * small for n in range(4)]
    assert image.held.pixels - before == 4 * small
    monkeypatch.setattr(files._loading, "engines", [])
    attached(files, paths, session := Session())
    full = FakeEngine()
    full.full = True
    monkeypatch.setattr(session_module, "ask", FakeAnswer)
    turns = Turns(Loading.done(full), [])
    answered(turns.ask({"text": "", "files": paths}, session, None, "", None))
    assert "Too many people" in warnings[-1]
    assert image.held.pixels == before


def test_an_opened_conversation_keeps_its_system_prompt():
    conversation = Session().with_question("Hello?", [])
    conversation.system = "Answer in French."
    path = uploads_folder() / "kept.json"
    path.write_text(json.dumps(transcript.to_data(Session(conversation), side=64)))
    session, *_, system = uploads_of_a_page().open(str(path), Session(), None)
    assert system["value"] == "Answer in French."
    assert session.name  # what becomes of it has an entry of its own in the browser's list


def test_text_is_shown_as_it_was_written():
    text = "a <b> ![x](http://y) `<b>` <b>\n```html\n<b>"
    assert literal(text) == ("a &#0060;b> !&#0091;x](http://y) `<b>` &#0060;b>\n```html\n<b>")
    assert unescape(literal(text)) == text
    typed = "2*3*4 \\_ a\n    1. first\n# title &#0042; `x` <b>  $y$\n- ~"
    assert unescape(verbatim(typed)) == typed
    assert not set("*_\\<`$~") & set(verbatim(typed))


@pytest.mark.parametrize(
    "text",
    [
        "Look:\n\n    <b>\n\n    $x$ <i>\n\n",
        "~~~html\n<b>\n~~~",
        "````\n```\n<b>\n```\n````",
        "``a ` <b>``",
        "see `a\n<b>`",
        "see <https://example.org/a>",
        r"$\frac{1}{$ and $}x{$",
    ],
)
def test_code_and_addresses_are_left_as_they_are(text):
    assert literal(text) == text


@pytest.mark.parametrize(
    "text, shown",
    [
        ("1. one\n\n    <b>\n\n    `<i>`", "1. one\n\n    &#0060;b>\n\n    `<i>`"),
        ("a `\n\n<b> `", "a `\n\n&#0060;b> `"),
        ("- a `\n- <b> `", "- a `\n- &#0060;b> `"),
        (r"\`<b>\`", r"\`&#0060;b>\`"),
        ("<https://a <b>", "&#0060;https://a &#0060;b>"),
        (r"$\{x$ and $\frac{1}{2}$", r"\({}\{x\) and \({}\frac{1}{2}\)"),
    ],
)
def test_what_only_looks_like_code_is_text(text, shown):
    assert literal(text) == shown and unescape(shown) == text


def test_beams_say_that_they_take_their_time():
    session = Session()
    session.answer = FakeAnswer(FakeEngine(), _asked("Hello?"), Sampling())
    assert "several" in waiting(session, 3, None)


def _asked(text: str):
    return Session().with_question(text, [])


def test_every_language_says_everything():
    english, german = TEXTS["en"], TEXTS["de"]
    assert set(TEXTS) >= {"en", "de", "es", "zh"}
    assert {key for key in german if key not in english} == {
        key for key in german if re.match("page_(error|step)_", key) and key not in english
    }
    for name, texts in TEXTS.items():
        assert set(texts) == set(english if name == "en" else german), name
        for key, text in texts.items():
            fields = re.findall(r"{\w+}", german[key])
            assert sorted(re.findall(r"{\w+}", text)) == sorted(fields), (name, key)
            assert text.strip(), (name, key)


def chinese():
    return type("Request", (), {"headers": {"accept-language": "zh-CN,en;q=0.5"}})()


def raised(act) -> UserError:
    with pytest.raises(UserError) as info:
        act()
    return info.value


def test_errors_come_in_the_visitors_language(engine, tmp_path, monkeypatch):
    """Errors that a visitor can cause, raised where they arise, pictures' in their own process."""
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    Image.new("L", (9000, 9000)).save(tmp_path / "large.png")
    picture(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:300])
    session, opened = Session(), Session(Session().with_question("Hello?", []))
    errors = [raised(lambda n=n: decoding.load(tmp_path / f"{n}.png")) for n in PICTURE_ERRORS]
    assert [e.message_id for e in errors] == [*PICTURE_ERRORS.values()]
    errors += [
        raised(lambda: session.with_question(" ", [])),
        raised(session.to_retry),
        raised(lambda: opened.with_edit(1, "Hello!")),
        raised(lambda: transcript.from_data({})),
        raised(lambda: uploaded("/etc/passwd")),
        raised(lambda: chat_ask(engine, _asked("word " * 5000), Sampling())),
        too_many_pictures(),
        *map(failure, KINDS),
    ]
    for error in errors:
        said = explain(error, chinese())
        assert re.search("[\u4e00-\u9fff]", said) and "{" not in said, error
        assert explain(error, None) == str(error)
    assert "large.png" in explain(errors[2], chinese()) and "40" in explain(errors[2], chinese())
    assert explain(UserError("Nobody has translated this."), chinese()).startswith("Nobody")


def test_every_translated_error_is_raised_somewhere():
    """No key of the texts is left over, and no error's name is misspelt."""
    source = "".join(p.read_text() for p in Path(session_module.__file__).parents[2].rglob("*.py"))
    shown_by_scripts = {key for key in TEXTS["en"] if key.startswith(f"{PREFIX}error_")}
    named = set(re.findall(r'message_id="(\w+)"|_full", "(pictures_\w+)"', source))
    named = {a or b for a, b in named} | {"pictures_memory"} | {*get_args(Kind)} - {"request"}
    translated = {k for k in TEXTS["de"] if k.startswith(f"{PREFIX}error_")} - shown_by_scripts
    assert {f"{PREFIX}error_{name}" for name in named} - shown_by_scripts == translated


def test_steps_of_loading_come_in_the_visitors_language():
    """As they are reported where a model is fetched, converted and loaded."""
    lines = []
    encoder = Step("encoder", "the visual encoder")
    for what, doing in (("mini", "Fetching"), (encoder, "Converting")):
        progress = Progress(what, 4_000_000_000, start.say, doing)
        progress.add(1_000_000_000)
        lines.append(progress.line)
        progress._start -= 120  # two minutes ago
        lines.append(progress.line)
    for memory in ((None, None), (None, 3e9), (2e9, 3e9), (200e9, None)):
        config, why = start.choose(*memory)
        lines.append(Step("model", start.SELECTED, name=config.name, why=why))
    for line in lines:
        said = translate_step(line, chinese())
        names = r"mini|nano|vicuna-13b|GPU|MB|GB"
        assert not re.search("[A-Za-z]", re.sub(names, "", said)), said
        assert re.findall(r"[\d.:]*\d", line) == re.findall(r"[\d.:]*\d", said)
        assert translate_step(line, None) == line
        for same in (copy.copy(line), pickle.loads(pickle.dumps(line))):
            assert translate_step(same, chinese()) == said
    assert translate_step(lines[1], chinese()) == "正在下载 mini：1.0 GB / 4.0 GB，25 %，剩余 6:00"
    unknown = "No one knows this step: 3 of 4."
    assert translate_step(unknown, chinese()) == unknown


def test_every_translated_step_is_reported_somewhere():
    """With the values that the texts show."""
    folder = Path(session_module.__file__).parents[2]
    source = "".join(p.read_text() for p in (folder / "start.py", *folder.glob("weights/*.py")))
    values = dict.fromkeys(("fetching", "converting", "loading"), {"name", "count"})
    for call in ast.walk(ast.parse(source)):
        match call:
            case ast.Call(func=ast.Name("Step"), args=[ast.Constant(key), _]):
                values[key] = {keyword.arg for keyword in call.keywords}
    shown = {
        k: set(re.findall(r"{(\w+)}", text)) for k, text in TEXTS["de"].items() if "_step_" in k
    }
    assert shown == {f"{PREFIX}step_{key}": names for key, names in values.items()}


def test_an_error_keeps_its_kind_and_parameters_when_it_is_pickled():
    error = UserError("a.png is empty.", "memory", "picture_empty", {"name": "a.png"})
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.kind, again.message_id, again.values) == (
        "a.png is empty.",
        "memory",
        "picture_empty",
        {"name": "a.png"},
    )


def test_the_first_language_that_is_spoken_counts():
    def asks(header: str) -> str:
        request = type("Request", (), {"headers": {"accept-language": header}})()
        return translate("delete", request)

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
        open_settings(page)
        page.get_by_label("Maximum length, number").fill("20")
        page.get_by_label("Maximum length, number").press("Tab")
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
