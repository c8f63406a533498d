"""The chat page in a browser, with an engine that answers the same each time."""

import json
import re
import threading
import time
from functools import partial

import pytest
from playwright.sync_api import Page, expect

from minigpt4.web.page import turns
from minigpt4.web.page.feedback import Feedback
from minigpt4.web.page.page import build_page, serve
from minigpt4.web.page.session import Session
from tests import api_case
from tests.fake_engine import FakeAnswer
from tests.page_case import (
    SECONDS,
    WIDE,
    Visitors,
    answers,
    ask,
    attach,
    box,
    done,
    figures,
    inside,
    open_settings,
    picture,
    questions,
    say,
    status,
)
from tests.running import wait_for


def test_a_picture_is_encoded_while_its_question_is_typed(visit, engine, photo):
    page = visit(**WIDE)
    before = len(engine.pictures)
    attach(page, photo)
    wait_for(lambda: len(engine.pictures) == before + 1)
    expect(status(page)).to_have_text("Ready: ask away.")
    page.locator("#box .delete-button").click()
    expect(status(page)).to_have_text("")  # nothing is ready any more
    attach(page, photo.rename(photo.with_name("again.png")))
    expect(status(page)).to_have_text("Ready: ask away.")
    ask(page, "Describe this image in detail.")
    thumbnail = page.get_by_test_id("user").locator("img")
    wait_for(lambda: thumbnail.evaluate("image => image.naturalWidth") == 320)
    told = figures(page)
    expect(told).to_contain_text(re.compile(r"Answered in [\d.]+ s\.Length in tokens\d+"))
    ask(page, "And what is beside it?")
    expect(figures(page)).to_contain_text("Prompt tokens64of these, reused40")


def test_an_answer_without_a_picture_says_so(visit, photo):
    page = visit()
    say(page, "What is this?")
    expect(status(page)).to_have_text("There is no picture in this chat. Add one with +.")
    say(page, "And what is that?")  # once is enough
    done(page)
    expect(status(page)).to_have_text("")
    page.reload()
    attach(page, photo)
    say(page, "What is this?")
    done(page)
    expect(status(page)).to_have_text("")
    visit.expected("AbortError|Connection errored out")  # what the reloaded page listened to


def test_words_appear_one_after_another(visit, engine):
    engine.word_seconds = 0.03
    page = visit()
    say(page, "A long one, please.")
    expect(answers(page)).to_contain_text("word2")
    seen = {answers(page).inner_text() for _ in range(8) if not time.sleep(0.1)}
    assert len(seen) > 3
    shortest, longest = min(seen, key=len), max(seen, key=len)
    assert longest.startswith(shortest)
    compose(page, "Escape")  # puts a suggested word away
    count = len(answers(page).inner_text().split())
    expect(answers(page)).to_contain_text(f"word{count + 30}")
    page.keyboard.press("Escape")  # stops
    expect(page.get_by_label("Send", exact=True)).to_be_visible()
    expect(status(page)).to_contain_text("Stopped")
    count = len(answers(page).inner_text().split())
    time.sleep(0.3)
    assert len(answers(page).inner_text().split()) == count < 200


def compose(page: Page, key: str) -> None:
    """Press a key in the box while a word is being composed there."""
    page.evaluate(
        """(key) => document.querySelector("#box textarea").dispatchEvent(new KeyboardEvent(
        "keydown", { key, bubbles: true, cancelable: true, isComposing: true }))""",
        key,
    )


@pytest.mark.trust("Load and interruptions", "Stop while streaming and while queued")
def test_stop_and_continue(visit, engine):
    engine.word_seconds = 0.03
    page = visit()
    say(page, "A long one, please.")
    expect(answers(page)).to_contain_text("word5")
    page.get_by_label("Stop").click()
    expect(page.get_by_label("Send", exact=True)).to_be_visible()
    said = answers(page).inner_text().split()
    engine.word_seconds = 0.0
    page.get_by_role("button", name="Continue").click()
    expect(answers(page)).to_contain_text("word300")
    whole = answers(page).inner_text().split()
    assert whole[: len(said)] == said
    assert whole[:50] == [f"word{i}" for i in range(1, 51)]
    expect(questions(page)).to_have_count(1)


def test_an_answer_cut_at_its_length_goes_on(visit):
    page = visit(**WIDE)
    open_settings(page)
    page.get_by_label("Maximum length, number").fill("20")
    page.get_by_label("Maximum length, number").press("Tab")
    expect(page.get_by_label("custom")).to_be_checked()
    ask(page, "A long one, please.")
    expect(status(page)).to_contain_text("Stopped at the maximum length")
    page.get_by_role("button", name="Continue").click()
    expect(answers(page)).to_contain_text("word40")
    assert answers(page).inner_text().split() == [f"word{i}" for i in range(1, 41)]


def test_retry_edit_and_undo(visit, photo):
    page = visit(**WIDE)
    attach(page, photo)
    ask(page, "Say it again.")
    first = answers(page).inner_text()
    page.get_by_role("button", name="Retry").click()
    expect(answers(page)).not_to_contain_text(first.strip())
    done(page)
    ask(page, "Count them.")
    expect(answers(page)).to_have_count(2)

    # The first question is changed: its picture stays, what came after it is answered no more.
    page.get_by_role("button", name="Edit").first.click()
    page.locator("#chat textarea").fill("Count <b>everything</b>.")
    page.locator("#chat").get_by_label("Send", exact=True).click()
    expect(answers(page)).to_have_count(1)
    expect(answers(page)).to_contain_text("I see 1 pictures.")
    expect(questions(page).last).to_contain_text("Count <b>everything</b>.")
    expect(questions(page)).to_have_count(2)  # the picture, the text
    page.get_by_role("button", name="Edit").click()  # shown as it was written
    expect(page.locator("#chat textarea")).to_have_value("Count <b>everything</b>.")
    page.locator("#chat").get_by_label("Cancel").click()

    page.get_by_role("button", name="Undo").click()
    expect(answers(page)).to_have_count(0)
    expect(box(page)).to_have_value("Count <b>everything</b>.")
    expect(page.get_by_label("Added picture", exact=True)).to_have_count(1)
    box(page).press("Enter")
    expect(answers(page)).to_contain_text("I see 1 pictures.")


def test_several_pictures_and_later_ones(visit, tmp_path):
    page = visit()
    attach(page, picture(tmp_path / "a.png"), picture(tmp_path / "b.png", "navy"))
    ask(page, "Count them.")
    expect(answers(page)).to_contain_text("I see 2 pictures.")
    attach(page, picture(tmp_path / "c.png", "pink"))
    ask(page, "Count them now.")
    expect(answers(page).last).to_contain_text("I see 3 pictures.")


def test_paste_and_drop(visit, photo):
    page = visit()
    data = list(photo.read_bytes())
    for event, field in (("paste", "clipboardData"), ("drop", "dataTransfer")):
        page.evaluate(
            """([event, field, data]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([new Uint8Array(data)], event + ".png",
                    { type: "image/png" }));
                const target = document.querySelector("#box textarea");
                const made = new (event === "paste" ? ClipboardEvent : DragEvent)(event,
                    { [field]: transfer, bubbles: true, cancelable: true });
                target.dispatchEvent(made);
            }""",
            [event, field, data],
        )
        count = 1 if event == "paste" else 2
        expect(page.get_by_label("Added picture", exact=True)).to_have_count(count)


SLOW_CAMERA = """() => {
    window.asked = [];
    const streams = [];
    window.states = () => streams.map((stream) => stream.getTracks()[0].readyState);
    window.come = async (...numbers) => {
        for (const number of numbers) {
            streams.push(document.createElement("canvas").captureStream());
            asked[number].resolve(streams.at(-1));
        }
        await Promise.resolve();
        await Promise.resolve();
        return states();
    };
    navigator.mediaDevices.getUserMedia = () =>
        new Promise((resolve, reject) => asked.push({ resolve, reject }));
}"""


def test_camera(visit):
    page = visit(permissions=["camera"])
    for count in (1, 2):
        if count == 1:
            page.locator("#hello").get_by_role("button", name="Camera").click()
        else:
            page.get_by_role("button", name="Add a picture").click()
            page.get_by_role("menuitem", name="Camera").click()
        video = page.locator("#camera video")
        page.get_by_role("button", name="Take the picture").click()  # enabled once it is on
        expect(video).to_have_count(0)
        expect(page.get_by_label("Added picture", exact=True)).to_have_count(count)
    page.get_by_role("button", name="Add a picture").click()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")  # the menu's second entry
    expect(page.get_by_role("dialog", name="Camera")).to_be_visible()
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.locator("#camera").bounding_box()["x"] >= 12
    page.set_viewport_size(WIDE["viewport"])
    page.keyboard.press("Escape")
    expect(page.locator("#camera")).to_have_count(0)
    ask(page, "Count them.")
    expect(answers(page)).to_contain_text("I see 2 pictures.")

    page.evaluate(SLOW_CAMERA)  # no camera stays on that is not seen
    other = page.get_by_role("button", name="Use the other camera")
    page.evaluate("minigpt4.camera()")
    other.dblclick()
    assert page.evaluate("come(0, 1, 2)") == ["ended", "ended", "live"]
    page.keyboard.press("Escape")
    expect(page.locator("#camera")).to_have_count(0)
    assert page.evaluate("states()") == ["ended", "ended", "ended"]
    page.evaluate("minigpt4.camera()")
    page.keyboard.press("Escape")
    expect(page.locator("#camera")).to_have_count(0)
    assert page.evaluate("come(3)") == ["ended"] * 4
    page.evaluate("minigpt4.camera()")
    for number in (4, 5):
        page.evaluate("(number) => asked[number].reject(new Error('refused'))", number)
        expect(page.get_by_text("The camera is not available")).to_be_visible()
        other.click()
    assert page.evaluate("come(6)")[-1] == "live"
    expect(page.get_by_text("The camera is not available")).to_have_count(0)


def test_no_picture(visit, photo, tmp_path):
    page = visit()
    wrong = tmp_path / "holiday.png"
    wrong.write_text("This is no picture.")
    box(page).fill("What is this?")
    page.locator("#box input[type=file]").set_input_files(wrong)
    expect(page.get_by_text("holiday.png is damaged, or not a picture")).to_be_visible()
    expect(page.get_by_label("Added picture", exact=True)).to_have_count(0)
    expect(box(page)).to_have_value("What is this?")
    page.reload()
    expect(box(page)).to_have_value("What is this?")
    expect(page.get_by_label("Added picture", exact=True)).to_have_count(0)
    attach(page, photo)
    visit.expected("AbortError|Connection errored out")


def test_the_place_in_the_queue(visit, engine):
    page = visit()
    engine.ahead = 3
    say(page, "Hello?")
    expect(status(page)).to_contain_text("You are number 3 in the queue.")
    engine.ahead = 1
    expect(status(page)).to_contain_text("You are next.")
    engine.ahead = 0
    done(page)


@pytest.mark.trust(
    "Load and interruptions", "storms of connections, a full queue, probes meanwhile"
)
def test_a_full_queue_keeps_what_was_typed(visit, engine, photo):
    page = visit()
    attach(page, photo)
    engine.full = True
    say(page, "Is anyone there?")
    expect(page.get_by_text("Too many people are waiting")).to_be_visible()
    expect(box(page)).to_have_value("Is anyone there?")
    expect(page.get_by_label("Added picture", exact=True)).to_have_count(1)
    expect(answers(page)).to_have_count(0)
    engine.full = False
    done(page)
    page.wait_for_function("!minigpt4.unaccepted()")
    box(page).press("Enter")
    expect(answers(page)).to_have_count(1)
    done(page)


def test_failures_and_notices_are_said_in_the_conversation(visit, engine):
    page = visit()
    say(page, "Please fail.")
    expect(answers(page)).to_contain_text("The model ran out of memory: ask something shorter.")
    expect(page.get_by_role("button", name="Retry")).to_be_visible()
    for name in ("Like", "Dislike", "Read aloud"):
        expect(page.get_by_role("button", name=name, exact=True)).to_have_count(0)
    engine.failure = "The engine is away: wait a little."
    page.get_by_role("button", name="Retry").click()
    expect(answers(page)).to_contain_text(engine.failure)
    engine.failure = ""
    done(page)
    asked = [chat for chat in engine.asked if chat.messages[0].parts == ("Please fail.",)]
    assert len(asked) == 2
    expect(answers(page)).to_have_count(1)
    say(page, "Forget the first.")
    expect(page.get_by_text("and were left out")).to_be_visible()
    done(page)


@pytest.mark.trust("Text", "empty or too long")
def test_an_empty_message(visit):
    page = visit()
    say(page, " ")
    expect(page.get_by_text("The message is empty")).to_be_visible()


def test_settings_and_presets(visit, engine):
    page = visit(**WIDE)
    expect(page.get_by_label("Seed")).to_be_hidden()
    open_settings(page)
    page.get_by_label("precise").click()
    temperature = page.get_by_label("Temperature, number")
    expect(temperature).to_have_value("0")
    expect(page.get_by_label("custom")).to_be_hidden()
    temperature.fill("0.7")
    temperature.press("Tab")
    expect(page.get_by_label("custom")).to_be_checked()
    temperature.fill("0")
    temperature.press("Tab")
    expect(page.get_by_label("precise")).to_be_checked()
    expect(page.get_by_label("custom")).to_be_hidden()
    penalty = page.get_by_label("Repetition penalty, number")
    penalty.fill("1.5")
    penalty.press("Tab")
    expect(page.get_by_label("custom")).to_be_checked()
    page.get_by_label("precise").click()
    expect(penalty).to_have_value("1.1")
    page.get_by_label("Seed").fill("lucky")
    page.evaluate("minigpt4.ended = () => {}")  # the notice comes first, and can be acted on
    say(page, "Hello?")
    expect(page.get_by_text("The seed must be a whole number")).to_be_visible()
    expect(box(page)).to_have_value("Hello?")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("System prompt").fill("Answer in rhymes.")
    ask(page, "Hello?")
    assert engine.samplings[-1].temperature == 0 and engine.samplings[-1].seed == 7
    assert engine.asked[-1].system == "Answer in rhymes."
    page.get_by_label("creative").click()
    expect(temperature).to_have_value("0.8")
    page.get_by_label("balanced").click()
    expect(temperature).to_have_value("0.5")
    for fact in ("nano", "unquantized", "cpu", "Apache-2.0"):
        expect(page.locator("#model")).to_contain_text(fact)


def test_a_number_counts_once_it_is_typed_and_possible(visit):
    page = visit(**WIDE)
    open_settings(page)
    kept = "() => JSON.parse(localStorage.getItem('minigpt4:settings'))"
    length = page.get_by_label("Maximum length, number")
    length.select_text()
    page.keyboard.type("12")
    assert page.evaluate(kept) is None
    page.keyboard.type("0.4\n")
    expect(length).to_have_value("120")
    # "custom" is no preset that one could choose.
    expect(page.get_by_label("custom")).to_be_checked()
    page.get_by_label("creative").click()
    expect(page.get_by_label("custom")).to_be_hidden()
    expect(page.get_by_label("Top-p, number")).to_have_value("0.95")
    page.keyboard.press("ArrowDown")
    expect(page.get_by_label("Top-p, number")).to_have_value("1")
    expect(page.get_by_label("precise")).to_be_checked()
    temperature = page.get_by_label("Temperature, number")
    for field, typed, value in (
        (page.get_by_label("Beams, number"), "2.5", "3"),
        (page.get_by_label("Top-p, number"), "-1", "0.05"),
        (temperature, "99", "2"),
        (temperature, "0.7", "0.7"),
        (temperature, "", "0.7"),
    ):
        field.fill(typed)
        field.press("Tab")
        expect(field).to_have_value(value)
    values = {"preset": "precise", "num_beams": 3, "top_p": 0.05, "temperature": 0.7}
    wait_for(lambda: page.evaluate(kept) == values)
    expect(page.get_by_label("custom")).to_be_checked()
    assert page.get_by_label("Seed").get_attribute("maxlength") == "19"
    expect(page.get_by_test_id("toast-body")).to_have_count(0)


@pytest.mark.trust("Load and interruptions", "a question sent twice, two tabs")
def test_two_visitors(visit):
    ann, bob = visit(), visit()
    say(ann, "I am Ann.")
    say(bob, "I am Bob.")
    for page, name in ((ann, "Ann"), (bob, "Bob")):
        done(page)
        expect(questions(page)).to_have_count(1)
        expect(questions(page)).to_contain_text(name)


def test_enter_before_the_end_of_an_answer(visit, engine):
    """A second question is kept and the reason said; Enter pressed twice asks once."""
    engine.word_seconds = 0.03
    page = visit()
    box(page).fill("A long one, please.")
    for _ in range(3):
        box(page).press("Enter")
    expect(answers(page)).to_contain_text("word3")
    box(page).press("Enter")
    expect(answers(page)).to_contain_text("word30")
    expect(page.get_by_text("stop it first")).to_have_count(0)
    say(page, "And then?")
    expect(page.get_by_text("stop it first")).to_be_visible()
    page.get_by_label("Stop").click()
    done(page)
    expect(box(page)).to_have_value("And then?")
    expect(questions(page)).to_have_count(1)


def test_new_chat_in_the_middle_of_an_answer(visit, engine):
    engine.word_seconds = 0.03
    page = visit()
    say(page, "A long one, please.")
    expect(answers(page)).to_contain_text("word3")
    page.get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)
    expect(page.get_by_text("What's in your picture?")).to_be_visible()
    ask(page, "Hello?")
    expect(answers(page)).to_have_count(1)


def test_an_example_is_sent_at_once(visit, engine):
    page = visit()
    box(page).fill("What I was writing")
    page.get_by_text("Write an advertisement").click()
    expect(questions(page).last).to_contain_text("Write an advertisement for this product.")
    done(page)
    assert len(engine.asked[-1].pictures) == 1
    expect(box(page)).to_have_value("What I was writing")


@pytest.mark.trust("What the model writes", "HTML and scripts, in the chat and in the preview")
def test_nothing_written_runs_in_the_page(visit):
    page = visit()
    ask(page, "<script>window.stolen=1</script><img src=x onerror='window.stolen=1'> Attack!")
    expect(answers(page)).to_contain_text("<img src=x onerror='window.stolen=1'>")
    expect(questions(page)).to_contain_text("<script>window.stolen=1</script>")
    assert page.evaluate("window.stolen") is None
    assert page.locator("#chat .message img, #chat .message script").count() == 0


def test_copying_gives_what_was_written(visit):
    page = visit(permissions=["clipboard-read", "clipboard-write"])
    ask(page, "Attack!")
    page.locator("#chat").get_by_label("Copy message").last.click()
    wait_for(lambda: "onerror" in page.evaluate("navigator.clipboard.readText()"))
    copied = page.evaluate("navigator.clipboard.readText()")
    assert copied.startswith("<img src=x onerror=") and "![x](http" in copied


def test_likes_are_stored_with_a_reason(visit, folder, monkeypatch):
    page = visit()
    ask(page, "Describe it.")
    page.locator("#chat").get_by_role("button", name="Dislike", exact=True).click()
    page.get_by_label("Why? (optional)").fill("There is no boat.")
    page.get_by_label("Why? (optional)").press("Enter")
    expect(page.get_by_text("Thank you.")).to_be_visible()

    def lines() -> list[dict]:
        return [*map(json.loads, (folder / "feedback.jsonl").read_text().splitlines())]

    first, second = lines()[-2:]
    assert first["id"] == second["id"] and first["liked"] is second["liked"] is False
    assert (first["reason"], second["reason"]) == ("", "There is no boat.")
    assert [m["role"] for m in second["messages"]] == ["user", "assistant"]
    assert "red house" in second["messages"][1]["text"] and second["model"] == "nano"
    for button, liked in (("Disliked", None), ("Like", True)):  # the last line of an id counts
        page.locator("#chat").get_by_role("button", name=button, exact=True).click()
        wait_for(lambda liked=liked: lines()[-1]["liked"] is liked)
        assert lines()[-1]["id"] == first["id"] and not lines()[-1]["reason"]
    store = Feedback.store
    monkeypatch.setattr(Feedback, "store", lambda *given: (time.sleep(0.6), store(*given)))
    page.evaluate(  # a quick change of mind
        """() => ["Liked", "Dislike"].forEach((name, number) => setTimeout(
            () => document.querySelector(`#chat button[aria-label="${name}"]`).click(),
            300 * number,
        ))"""
    )
    wait_for(lambda: lines()[-1]["liked"] is False)


def test_a_reason_is_asked_for_beside_its_answer_only(visit):
    page = visit(locale="de-DE")
    reason = page.get_by_label("Warum? (optional)")
    disliked = page.locator("#chat").get_by_role("button", name="Gefällt mir nicht", exact=True)
    ways = [
        lambda: page.locator("#why").get_by_role("button", name="Schließen").click(),
        lambda: ask(page, "And this?"),
        lambda: page.get_by_role("button", name="Neuer Chat").click(),
    ]
    for leave in ways:
        ask(page, "And now?")
        disliked.last.click()
        reason.fill("No boat.")
        expect(page.get_by_role("button", name="Als schlecht bewertet").last).to_be_visible()
        expect(page.locator("#why").get_by_role("button", name="Senden")).to_be_visible()
        assert inside(page.locator("#why").get_by_role("button").last, page.locator("#why"))
        leave()
        expect(reason).to_be_hidden()


def test_enter_that_ends_a_composed_word_does_not_send(visit):
    page = visit()
    box(page).fill("你好")
    compose(page, "Enter")
    time.sleep(0.5)
    expect(questions(page)).to_have_count(0)
    box(page).press("Shift+Enter")
    expect(box(page)).to_have_value("你好\n")


def test_a_conversation_left_in_the_middle_of_an_answer_is_kept(visit, engine, address):
    """Or at its end, before the page has told the server to record it."""
    engine.word_seconds, held = 0.03, []
    page = visit(**WIDE)
    kept = """async (pattern) => RegExp(pattern).test(
        JSON.stringify(await (await minigpt4.store).all("talks")))"""
    say(page, "Tell me something long.")
    expect(answers(page)).to_contain_text("word3")
    page.get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)
    wait_for(lambda: page.evaluate(kept, "something long.*word3"))

    events = api_case.page_events(address).items()
    records = [number for name, number in events if re.fullmatch(r"record(_\d+)?", name)]

    def hold(route):
        recording = route.request.post_data_json["fn_index"] in records
        held.append(route) if recording else route.continue_()

    engine.word_seconds = 0.0
    page.route("**/gradio_api/queue/join*", hold)
    say(page, "Tell me a story.")
    while not held:
        page.wait_for_timeout(20)
    page.get_by_role("button", name="New chat").click()
    expect(answers(page)).to_have_count(0)
    wait_for(lambda: page.evaluate(kept, "a story.*summer afternoon"))


def test_a_conversation_is_not_kept_for_ever(engine, browser):
    """Gradio knows when to forget it from the first look at the page on."""
    page = build_page(engine)
    visitors = Visitors(browser, serve(page, api_case.options()))
    visitors(**WIDE)
    states = page.app.state_holder.session_data.values()
    wait_for(lambda: any(isinstance(v, Session) for s in states for _, v, _ in s.state_components))
    visitors.check()
    page.close(verbose=False)


def test_failures_come_in_the_visitors_language(visit, engine, tmp_path):
    """Those of pictures, of the engine, and of a connection that breaks."""
    page = visit(locale="de-DE")
    wrong = tmp_path / "holiday.png"
    wrong.write_text("This is no picture.")
    page.locator("#box input[type=file]").set_input_files(wrong)
    expect(page.get_by_text("holiday.png ist kein Bild in einem bekannten Format")).to_be_visible()
    say(page, " ")
    expect(page.get_by_text("Die Nachricht ist leer: Schreiben Sie eine Frage.")).to_be_visible()
    unknown = page.get_by_text("Diese Datei lässt sich hier nicht öffnen")
    for count, name in enumerate(["notes.txt", "notes.pdf"], 1):  # two messages in one notice
        (tmp_path / name).write_text("These are notes.")
        page.locator("#box input[type=file]").set_input_files(tmp_path / name)
        expect(unknown).to_have_count(count)
    page.context.set_offline(True)
    for _ in range(2):
        say(page, "Hallo?")
        expect(page.get_by_text("Die Verbindung zum Server ist abgebrochen.")).to_be_visible()
        expect(page.locator("html:not([data-sending])")).to_have_count(1)
    page.context.set_offline(False)
    visit.expected("ERR_INTERNET_DISCONNECTED|Failed to fetch|NetworkError|network|errored out")


def test_copying_without_https(visit):
    """There is no clipboard for scripts then: Gradio copies out of a box."""
    page = visit()
    page.context.add_init_script(
        "delete Navigator.prototype.clipboard;"
        "addEventListener('copy', (e) => { window.copied = e.clipboardData.getData('text/plain') })"
    )
    page.reload()
    ask(page, "What's <this>?")
    page.locator("#chat .user-row").hover()
    page.get_by_role("button", name="Copy message").first.click()
    wait_for(lambda: page.evaluate("window.copied") == "What's <this>?")
    visit.expected("AbortError|Connection errored out")  # what the reloaded page listened to


def test_what_comes_right_after_sending_or_undo_stays(visit, engine, photo):
    page, held = visit(), []
    join = "**/gradio_api/queue/join*"
    engine.word_seconds = 0.01  # the box is emptied before the answer ends
    page.route(join, lambda route: held.append(route))
    say(page, "Hello?")
    while not held:  # the question has left the page
        page.wait_for_timeout(20)
    page.keyboard.type(" And what else?")
    attach(page, photo)
    page.unroute(join)  # which lets it go on
    done(page)
    expect(questions(page)).to_have_text("Hello?")
    expect(box(page)).to_have_value(re.compile("^ ?And what else\\?$"))
    expect(page.locator("#box .thumbnail-wrapper")).to_have_count(1)

    held.clear()
    page.route(join, lambda route: held.append(route))
    page.get_by_role("button", name="Undo").click()
    while not held:
        page.wait_for_timeout(20)
    box(page).press("End")
    page.keyboard.type(" Now.")
    page.unroute(join)
    expect(box(page)).to_have_value(re.compile("^Hello\\?\n ?And what else\\? Now.$"))

    box(page).fill("Count them.")
    box(page).evaluate(
        """(field) => {
            const enter = { key: "Enter", bubbles: true, cancelable: true };
            field.dispatchEvent(new KeyboardEvent("keydown", enter));
            field.dispatchEvent(new KeyboardEvent("keypress", enter));
            field.value += " More.";
            field.dispatchEvent(new Event("input", { bubbles: true }));
        }"""
    )
    expect(answers(page)).to_have_count(1)
    done(page)
    expect(questions(page).last).to_have_text("Count them.")
    expect(box(page)).to_have_value("More.")


def test_what_is_typed_stays_if_the_box_is_emptied_late(visit, engine, photo, monkeypatch):
    """The update that empties the box is lost, as when a busy browser applies several at once."""
    box_update = turns.box
    monkeypatch.setattr(turns, "box", lambda answering, **_: box_update(answering))
    page, engine.word_seconds = visit(), 0.2
    attach(page, photo)
    say(page, "Hello?")
    expect(page.locator("#box .stop-button")).to_be_visible()
    page.keyboard.type(" And what else?")
    engine.word_seconds = 0.01
    done(page)
    expect(box(page)).to_have_value("And what else?")
    expect(page.locator("#box .thumbnail-wrapper")).to_have_count(0)
    monkeypatch.undo()

    engine.word_seconds = 0.2
    say(page, "Hello?")
    expect(box(page)).to_have_value("")
    page.keyboard.type("Hello?")  # the same again, for later
    engine.word_seconds = 0.01
    done(page)
    page.wait_for_timeout(500)
    expect(box(page)).to_have_value("Hello?")


def test_nothing_else_is_asked_until_a_question_is_accepted(visit, monkeypatch, tmp_path):
    page, gate = visit(**WIDE), threading.Event()

    def slow(*arguments):
        gate.wait(SECONDS / 1000)
        return FakeAnswer(*arguments)

    ask(page, "Hello?")
    monkeypatch.setattr("minigpt4.web.page.session.ask", slow)
    say(page, "Count them.")
    (tmp_path / "bad.png").write_bytes(b"none")
    page.locator("#box input[type=file]").set_input_files(tmp_path / "bad.png")
    expect(page.get_by_text("not a picture")).to_be_visible()
    page.keyboard.type(" And what else?")
    for act in (
        page.get_by_role("button", name="Retry").click,
        page.locator("#chat").get_by_role("button", name="Undo").click,
        partial(page.keyboard.press, "Enter"),
    ):
        box(page).focus()
        act()
        expect(page.get_by_text("stop it first")).to_be_visible()
        page.evaluate("document.querySelector('.notice').remove()")
    gate.set()
    expect(answers(page)).to_have_count(2)
    done(page)
    expect(questions(page)).to_have_text(["Hello?", "Count them."])
    expect(box(page)).to_have_value("And what else?")


def test_a_visitor_in_a_hurry(visit, engine, tmp_path):
    page, held = visit(**WIDE), []
    join, upload = "**/gradio_api/queue/join*", "**/gradio_api/upload*"
    for _ in range(5):  # Enter is held
        page.keyboard.down("Enter")
    page.keyboard.up("Enter")
    expect(page.get_by_text("The message is empty")).to_have_count(1)

    attach(page, picture(tmp_path / "a.png"), picture(tmp_path / "b.png", "navy"))
    page.get_by_label("Remove picture").first.click()
    expect(page.locator("#box .thumbnail-wrapper")).to_have_count(1)
    page.keyboard.type("A long one, please.")
    expect(box(page)).to_have_value("A long one, please.")
    expect(page.locator("#box .thumbnail-wrapper")).to_have_count(1)

    page.route(upload, lambda route: held.append(route))
    page.locator("#box input[type=file]").set_input_files(picture(tmp_path / "c.png", "pink"))
    box(page).press("Enter")
    expect(page.get_by_text("then it is sent")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_text("then it is sent")).to_have_count(0)
    page.unroute(upload)
    expect(page.locator("#box .thumbnail-wrapper")).to_have_count(2)
    expect(box(page)).to_have_value("A long one, please.")

    page.route(join, lambda route: held.append(route))
    page.get_by_role("button", name="Settings").dblclick()  # it stays open
    page.get_by_label("precise").click()
    box(page).press("Enter")
    page.evaluate("window.requestAnimationFrame = () => {}")  # as in a hidden tab
    page.wait_for_timeout(300)
    page.unroute(join)
    expect(answers(page)).to_contain_text("word299")
    done(page)
    assert engine.samplings[-1].temperature == 0

    engine.word_seconds = 0.03
    page.route(join, lambda route: held.append(route))
    page.get_by_role("button", name="Retry").click()
    expect(page.locator("html[data-sending]")).to_have_count(1)
    page.keyboard.press("Escape")
    page.unroute(join)
    done(page)
    expect(page.get_by_text("word20")).to_have_count(0)
