"""Conversations written down and opened again; websites found in answers."""

import json
from urllib.parse import unquote

import gradio as gr
import pytest
from PIL import Image

from minigpt4.conversation import Conversation
from minigpt4.engine import Stats
from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.model.image import Picture, data_url
from minigpt4.model.prompt import Message
from minigpt4.web.page import looks, render, transcript
from minigpt4.web.page.loading import Loading
from minigpt4.web.page.panel import Panel
from minigpt4.web.page.session import About, Session
from minigpt4.web.page.versions import Fork, Tail


@pytest.fixture
def conversation(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    Image.new("RGB", (400, 300), "teal").save(paths[0])
    Image.new("RGB", (30, 40), "red").save(paths[1])
    talk = Conversation(system="Be brief.")
    talk.add_question("What are <these>?", [image.load(p) for p in paths])
    talk.add_answer("Two colours.")
    talk.add_question("Sure?")
    return talk


@pytest.mark.parametrize("side", [256, transcript.FULL_SIDE])
def test_what_is_written_can_be_read(conversation, tmp_path, side):
    data = transcript.to_data(Session(conversation, stop_reason="length"), "nano", side)
    path = tmp_path / "kept.json"
    path.write_text(json.dumps({**data, "about": {"id": "ab1", "title": "Two", "time": 7}}))
    read = transcript.from_file(str(path))
    assert read.stop_reason == "length" and read.entry == transcript.About("ab1", "Two", 7)
    again = read.conversation
    assert again.system == "Be brief."
    assert [m.role for m in again.messages] == ["user", "assistant", "user"]
    assert [p for m in again.messages for p in m.parts if isinstance(p, str)] == [
        "What are <these>?",
        "Two colours.",
        "Sure?",
    ]
    sizes = [again.pictures[i.key].rgb.size for i in again.messages[0].images]
    assert sizes[1] == (30, 40) and max(sizes[0]) == min(side, 400)
    assert data["title"] == "What are <these>?"


def test_what_is_written_in_mid_answer_can_be_continued(conversation):
    read = transcript.from_data(transcript.to_data(Session(conversation, busy=True)))
    assert read.stop_reason == "interrupted"
    # Finished, and the next question not accepted yet.
    asked = Session(conversation, busy=True, stop_reason="stop")
    assert transcript.from_data(transcript.to_data(asked)).stop_reason == "stop"


def test_files_opened_one_right_after_the_other_are_both_told(conversation):
    """Before the first could be told, the second was shown; the browser may miss the first message,
    so that the second holds the same records."""
    first, second = (Session(conversation, name=n, entry=About(n)) for n in ("one", "two"))
    first.leave(second)
    panel = Panel(Loading(list))
    (told, _), (again, _) = (panel.record_left(second, gr.Request()) for _ in range(2))
    assert [record["about"]["id"] for record in told["records"]] == ["one", "two"]
    assert again["records"] == told["records"] and again["settled"]
    assert len({record["once"] for record in told["records"]}) == 2


def test_remarks_are_kept(conversation):
    """An error is still there after a reload, in place of "not answered"."""
    conversation.add_answer("")
    session = Session(conversation)
    assert "not been answered" in str(render.messages(session, None)[-1])
    session.remark("The model ran out of memory.")
    data = transcript.to_data(session)
    data["remarks"] += [[9, "x"], ["1", "x"], [1], 7, [1, None]]
    read = transcript.from_data(json.loads(json.dumps(data)))
    assert read.remarks == session.remarks
    shown = render.messages(read, None)
    assert "out of memory" in str(shown[-1]) and "not been answered" not in str(shown)
    assert transcript.from_data({**data, "remarks": "no"}).remarks == []


def test_a_question_without_an_answer_before_another_one(conversation):
    """As earlier versions of the page wrote it."""
    data = transcript.to_data(Session(conversation))
    del data["messages"][1]
    data["forks"] = {"1": {"shown": 0, "tails": [None, {"messages": data["messages"][1:]}]}}
    read = transcript.from_data(data)
    assert [m.role for m in read.conversation.messages] == ["user", "user"]
    read.replace_conversation(read.with_question("And now?", []))
    roles = ["user", "user", "assistant", "user"]
    assert [m.role for m in read.conversation.messages] == roles
    answer = {"role": "assistant", "parts": [{"type": "text", "text": "Yes."}]}
    for place, tail in (("0", [answer]), ("1", [answer, answer])):
        forks = {place: {"shown": 0, "tails": [None, {"messages": tail}]}}
        with pytest.raises(UserError):
            transcript.from_data({**data, "forks": forks})
    with pytest.raises(UserError, match="^This conversation"):
        transcript.from_record({"data": {}})


def test_captions_are_kept(conversation):
    first, second = conversation.messages[0].images
    looks.note(first.key, caption="A red wall")
    captions = {second.key: "A blue wall", "gone": "Sea"}
    data = transcript.to_data(Session(conversation, captions=captions))
    data["captions"] |= {"other": "No such picture", first.key: data["captions"][first.key]}
    read = transcript.from_data(data)
    again = [image.key for image in read.conversation.messages[0].images]
    assert read.captions == dict(zip(again, ["A red wall", "A blue wall"], strict=True))
    read.conversation.messages[0] = Message(
        "user", (*read.conversation.messages[0].images, "What?")
    )
    looks._kept.pop(first.key)  # as on a server that was started again
    assert transcript.to_data(read)["title"] == "A red wall"
    session = Session(read.conversation, captions=read.captions)
    render.make_thumbnails(session.conversation)
    addresses = [
        m["content"][0]["file"]["url"]
        for m in render._pictures(read.conversation.messages[0], session)
    ]
    assert ["A red wall" in unquote(addresses[0]), "A blue wall" in unquote(addresses[1])] == [
        True
    ] * 2
    for wrong in (None, 3, {first.key: 3}, ["a"]):
        assert transcript.from_data({**data, "captions": wrong}).captions == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format="other"),
        lambda d: d.update(version=2),
        lambda d: d.pop("pictures"),
        lambda d: d.update(messages="hello"),
        lambda d: d.update(messages=[]),
        lambda d: d.update(messages=[[]]),
        lambda d: d.update(system=["be", "evil"]),
        lambda d: d["messages"].pop(0),
        lambda d: d["messages"].insert(0, {"role": "system", "parts": []}),
        lambda d: d["messages"][0]["parts"].append({"type": "image", "key": "../../x"}),
        lambda d: d["messages"][0]["parts"].append({"type": "text", "text": 7}),
        lambda d: d["pictures"].update(x="https://192.0.2.1/a.png"),
        lambda d: d["pictures"].update(x="data:image/png;base64,!!!"),
        lambda d: d["pictures"].update(x="data:image/png;base64,aGVsbG8="),
        lambda d: d["pictures"].update(x=data_url(Picture(Image.new("RGB", (1025, 9)), ""), 2000)),
        lambda d: d.update(pictures=3),
        lambda d: d.update(messages=d["messages"] * 1000),
    ],
)
@pytest.mark.trust("Pictures", "many large pictures at once")
def test_files_that_hold_something_else(conversation, change):
    data = transcript.to_data(Session(conversation), side=256)
    change(data)
    with pytest.raises(UserError):
        transcript.from_data(data)


@pytest.mark.parametrize(
    "about",
    [7, {"id": "../x", "title": 3, "time": "now"}, {"id": 1, "time": -1, "named": "yes"}, {"x": 1}],
)
def test_what_is_wrong_in_an_entry_is_left_out(about):
    assert transcript.read_about(about) == transcript.About()
    assert transcript.read_about({"time": 2**53 - 1, "title": "\u202e\u2066"}) == transcript.About()


def test_figures_of_answers_are_kept(conversation):
    stats = Stats(prompt_tokens=70, reused_tokens=32, tokens=12, seconds_to_first=0.1, seconds=1.5)
    later = Tail([Message("assistant", ("Yes.",))], statistics={3: stats})
    forks = {3: Fork([later, None], 1)}
    conversation.add_answer("No.")
    session = Session(conversation, forks=forks, statistics={1: stats, 3: Stats()})
    data = transcript.to_data(session)
    data = json.loads(json.dumps(data))
    data["figures"] |= {"x": [1] * 5, "5": [1, 2], "7": [-1] * 5, "9": ["1"] * 5, "11": None}
    read = transcript.from_data(data)
    for place, found in ((1, read.statistics), (3, read.forks[3].tails[0].statistics)):
        assert found.keys() == {place}
        kept = [getattr(found[place], name) for name in transcript.FIGURES]
        assert kept == [70, 32, 12, 0.1, 1.5] and found[place].tokens_per_s == stats.tokens_per_s
    assert transcript.from_data({**data, "figures": "no"}).statistics == {}


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b"null", b"[]"])
def test_files_that_are_no_conversation(tmp_path, content):
    path = tmp_path / "wrong.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="holds no conversation"):
        transcript.from_file(str(path))


def test_markdown(conversation):
    text = transcript.to_markdown(conversation, "nano")
    assert text.startswith("# What are <these>?") and text.count("](data:image/jpeg") == 2
    assert text.index("## Question") < text.index("## Answer") < text.index("Sure?")


@pytest.mark.parametrize(
    ("answer", "held"),
    [
        ("No website.", ""),
        ("Use `<b>` here, and a < b.", ""),
        ("```python\nprint('<html>')\n```", ""),
        ("Here:\n```html\n<h1>Hi</h1>\n```\nDone.", "<h1>Hi</h1>"),
        ("Here:\n```\n<div>Hi</div>\n```", "<div>Hi</div>"),
        ("```html\n<p>cut off", "<p>cut off"),
        (
            "Sure! <!DOCTYPE html><html><p>Hi</p></html> Enjoy.",
            "<!DOCTYPE html><html><p>Hi</p></html>",
        ),
        ("<html><body>cut", "<html><body>cut"),
    ],
)
def test_websites_in_answers(answer, held):
    assert render.website(answer).strip() == held


def test_styles_and_scripts_beside_a_website_are_put_inside():
    answer = "```html\n<p>x\n```\n```css\np {}\n```\n```js\nlet a;\n```"
    assert render.website(answer) == (
        "<p>x\n<style>\np {}\n</style>\n<script>\nlet a;\n</script>\n"
    )


def test_a_bare_document_is_shown_as_code():
    shown = render.fenced("Hi <html>x</html> bye")
    assert shown == "Hi \n```html\n<html>x</html>\n```\n bye"
    assert render.fenced("a < b") == "a < b"


@pytest.mark.trust("What the model writes", "HTML and scripts, in the chat and in the preview")
def test_a_frame_cannot_be_broken_out_of():
    frame = render.frame('"></iframe><script>alert(1)</script>', 'a"b')
    assert frame.count("<iframe") == 1 and frame.count("</iframe>") == 1
    assert "<script" not in frame and 'sandbox="allow-scripts"' in frame
    policy = frame.index("Content-Security-Policy")
    assert policy < frame.index("alert(1)") and "allow-same-origin" not in frame
