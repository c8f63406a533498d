"""The suite, its answers, a judge over the loopback address, people's ratings on a page."""

import base64
import json
import re
from collections import Counter
from contextlib import contextmanager

import pytest

from minigpt4.__main__ import main
from minigpt4.errors import UserError
from minigpt4.evaluation import abilities
from minigpt4.evaluation import judge as judging
from minigpt4.evaluation.judge import Judge, Verdict, fill, read_rubric, read_verdict
from minigpt4.evaluation.rating_page import read_ratings
from minigpt4.evaluation.suite import SUITE, read_suite
from minigpt4.model import image
from minigpt4.remote.endpoint import Endpoint
from tests.evaluation_case import run
from tests.http_case import Handler, listening
from tests.training_case import jpeg, picture

ABILITIES = ["--experiment", "abilities"]


@pytest.fixture
def suite(tmp_path):
    folder = tmp_path / "suite"
    folder.mkdir()
    lines = []
    for i, task in enumerate(("poem", "recipe", "riddle")):
        (folder / f"{i}.jpg").write_bytes(jpeg(picture(i)))
        lines.append({"id": f"{task}-{i}", "task": task, "image": f"{i}.jpg"})
        lines[-1] |= {"instruction": f"Write a {task}.", "about": f"Pattern {i}."}
    (folder / "suite.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


@pytest.fixture
def theirs(tmp_path):
    """Another model's answers, to two of the three requests."""
    path = tmp_path / "theirs.jsonl"
    answers = {"poem-0": "GOOD </script><b>verse</b>", "recipe-1": "BAD {answer} " * 3}
    lines = (json.dumps({"id": i, "answer": a}) + "\n" for i, a in answers.items())
    path.write_text("".join(lines))
    return path


@contextmanager
def judge_server(
    busy: int = 0, status: int = 200, after: int = 0, refused: str = "", always: list | None = None
):
    """A small OpenAI-compatible server: an answer with “GOOD” in it is fulfilled, one with “BAD” is
    not, of others it says nothing. `busy`: how many requests are first sent away with 429;
    `status`: of all replies, `after` so many; `refused`: a field it does not take; `always`: its
    last is what the server answers instead."""
    asked = []

    class Judge(Handler):
        def do_POST(self) -> None:
            body = self.read_json()
            asked.append((self.path, self.headers["authorization"], body))
            if always:
                return self.reply(200, always[-1])
            if len(asked) <= busy:
                return self.reply(429, {"error": {"message": "busy"}})
            if status != 200 and len(asked) > after:
                return self.reply(status, {"error": {"message": "no"}})
            if refused in body:
                return self.reply(400, {"error": {"message": "unsupported", "param": refused}})
            text = body["messages"][0]["content"][0]["text"].split("-" * 10)[1]
            verdict = {"fulfilled": "GOOD" in text, "score": 4 if "GOOD" in text else 2}
            said = (
                f"Well: {json.dumps(verdict)}" if "GOOD" in text or "BAD" in text else "Who knows?"
            )
            message = {"role": "assistant", "content": said}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            about = {"id": "1", "object": "chat.completion", "created": 1, "model": "judge"}
            self.reply(200, about | {"choices": [choice]})

        def reply(self, status: int, content: object) -> None:
            super().reply(status, content, retry_after_ms="5")

    with listening(Judge) as server:
        yield f"{server.url}/v1", asked


def test_the_project_s_own_suite():
    items = read_suite(SUITE)
    tasks = Counter(i.task for i in items)
    assert all(tasks[t] == 25 for t in ("recipe", "advertisement", "poem", "joke"))  # the paper's
    assert {"description", "story", "website"} <= set(tasks) <= set(read_rubric())
    for item in items:
        assert image.load(item.picture).rgb.size == (640, 480) and item.about
    assert len({(i.picture, i.instruction) for i in items}) == len(items)


def test_answers_are_stored_judged_and_compared(tiny, suite, theirs, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret")
    monkeypatch.setattr(abilities, "TOKENS", 20)
    answers = tmp_path / "own.jsonl"
    options = [suite, *ABILITIES, "--answers", answers, "--beside", f"theirs={theirs}"]
    with judge_server(busy=2) as (url, asked):
        result, page = run(*options, "--judge", url, "--judge-model", "j", out=tmp_path)
    own = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [x["id"] for x in own] == ["poem-0", "recipe-1", "riddle-2"]
    assert result["n"] == 3 and result["judge"] == "j"
    found = result["scores"]["theirs"]
    assert (found["poem"]["fulfilled"], found["poem"]["score"]) == (1.0, 4.0)
    assert (found["recipe"]["fulfilled"], found["recipe"]["score"]) == (0.0, 2.0)
    assert found["all"]["fulfilled"] == 0.5 and found["all"]["judged"] == 2
    assert found["riddle"]["answers"] == 0 and found["riddle"]["fulfilled"] is None
    assert found["recipe"]["repetition"] == 1.0
    mine = result["scores"][result["model"]]["all"]
    assert mine["answers"] == 3 and mine["judged"] == 0  # it said nothing of noise
    assert "| poem | theirs | 1 | 100.0 % | 4.0 | 1 |" in page and "a-secret" not in page
    # What the judge was sent: the key, the criterion, the picture, the answer as it is.
    assert len(asked) == 5 + 2 and {a[0] for a in asked} == {"/v1/chat/completions"}
    assert {a[1] for a in asked} == {"Bearer a-secret"}
    sent = [a[2]["messages"][0]["content"] for a in asked]
    poem = next(c for c in sent if "</script><b>verse</b>" in c[0]["text"])
    assert read_rubric()["poem"] in poem[0]["text"] and "Pattern 0." in poem[0]["text"]
    data = base64.b64decode(poem[1]["image_url"]["url"].split(",")[1])
    assert image.load(data).rgb.size == picture(0).size
    assert any("BAD {answer} BAD" in c[0]["text"] for c in sent)


@pytest.mark.parametrize("status", [400, 422, 401])
def test_a_refusal_does_not_lose_the_other_verdicts(suite, theirs, tmp_path, monkeypatch, status):
    monkeypatch.setattr(judging, "AT_ONCE", 1)
    options = [suite, *ABILITIES, "--reuse", "--answers", theirs, "--judge-blind"]
    with judge_server(status=status, after=1) as (url, _):
        result, _ = run(*options, "--judge", url, "--judge-model", "j", out=tmp_path)
    assert [v["fulfilled"] for v in result["verdicts"]] == [True, None]
    assert result["scores"]["nano"]["all"]["judged"] == 1


def test_verdicts_that_were_edited(suite, theirs, tmp_path, monkeypatch):
    kept = tmp_path / "kept.jsonl"
    options = [suite, *ABILITIES, "--reuse", "--answers", theirs, "--verdicts", kept]
    with judge_server() as (url, asked):
        options += ["--judge", url, "--judge-model", "j"]
        run(*options, out=tmp_path)
        kept.write_text(kept.read_text().replace('"score": 4', '"score": "5"'))
        odd = re.sub(r'"score": 2, "reason": "[^"]*"', '"score": [], "reason": 1', kept.read_text())
        assert odd != kept.read_text()
        kept.write_text(odd)
        result, _ = run(*options, out=tmp_path)
        assert len(asked) == 2 and result["scores"]["nano"]["all"]["score"] == 5


def test_a_judge_is_not_asked_again(suite, theirs, tmp_path, monkeypatch):
    """What was kept counts as it did; another answer, picture or judge is another question."""
    monkeypatch.setattr(judging, "AT_ONCE", 1)
    kept = tmp_path / "verdicts.jsonl"
    options = [suite, *ABILITIES, "--reuse", "--answers", theirs, "--verdicts", kept]

    def verdicts(model: str = "j", **behaviour) -> tuple[list, int]:
        with judge_server(**behaviour) as (url, asked):
            result, _ = run(*options, "--judge", url, "--judge-model", model, out=tmp_path)
        return [v["fulfilled"] for v in result["verdicts"]], len(asked)

    assert verdicts(status=401, after=1) == ([True, None], 2)
    assert len(kept.read_text().splitlines()) == 1
    assert verdicts() == ([True, False], 1)
    assert verdicts() == ([True, False], 0)
    kept.write_bytes(kept.read_bytes()[:-20])  # the second line, as a crash leaves it
    assert verdicts() == ([True, False], 1)
    assert verdicts() == ([True, False], 0)
    assert verdicts("another") == ([True, False], 2)
    (suite / "0.jpg").write_bytes(jpeg(picture(7)))
    assert verdicts() == ([True, False], 1)
    theirs.write_text(theirs.read_text().replace("BAD {answer}", "GOOD"))
    assert verdicts() == ([True, True], 1)


def test_a_proxy_that_cannot_be_used_is_no_fault_of_the_address(monkeypatch):
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")  # httpx would need another package
    for url, said in (("http://127.0.0.1:9/v1", "check HTTP_PROXY"), ("http://a:b", "address")):
        with pytest.raises(UserError, match=said):
            Endpoint(url, "", "j", 0, 9.0)


def test_endpoints_that_answer_nonsense():
    replies: list = []  # of which the server gives the last
    choice = {"index": 0, "finish_reason": "stop"}

    def ask(reply: object):
        replies.append(reply)
        return Endpoint(url, "", "j", 0, 9.0).ask("?")

    with judge_server(always=replies) as (url, _):
        for choices in ({"a": 1}, [], [None], ["x"], [choice | {"message": "hello"}]):
            assert ask({"choices": choices}) is None
        for content, text in (
            (7, None),
            ({"a": 1}, None),
            (None, ""),
            ([{"text": "A "}, 1, {"text": "dog."}, {"text": 1}], "A dog."),
            ("\ud800", "?"),
        ):
            found = ask({"choices": [choice | {"message": {"content": content}}]})
            assert text == (found and found.text)
        for reply in ("abc", [1], 7):
            with pytest.raises(ValueError):
                ask(reply)


def test_an_error_in_place_of_an_answer_is_told(suite, theirs, tmp_path, capsys):
    """Some endpoints send it with the status of a success."""
    records = tmp_path / "records.jsonl"
    records.write_text('{"image_id": "1", "picture": "p", "text": "A dog."}\n')
    with judge_server(always=[{"error": {"message": "quota exceeded"}}]) as (url, _):
        judge = [*ABILITIES, "--reuse", "--answers", theirs, "--judge", url, "--judge-model", "j"]
        out = tmp_path / "refined.jsonl"
        refine = ["refine", records, "--out", out, "--url", url, "--refiner", "j"]
        for command in (["evaluate", suite, *judge], ["curate", *refine]):
            assert main([*map(str, command)]) == 2
            assert "quota exceeded" in capsys.readouterr().err


def test_a_judge_that_takes_no_temperature(suite, theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "AT_ONCE", 1)
    options = [suite, *ABILITIES, "--reuse", "--answers", theirs, "--judge-blind"]
    with judge_server(refused="temperature") as (url, asked):
        result, _ = run(*options, "--judge", url, "--judge-model", "j", out=tmp_path)
    assert result["scores"]["nano"]["all"]["judged"] == 2
    assert [a[2].get("temperature") for a in asked] == [0, None, None]


def test_an_address_that_is_no_judge_s(suite, theirs, capsys):
    """A web page at it, as where /v1 was forgotten, or none that can be asked."""

    class Page(Handler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(b"<html>Welcome</html>")

    options = [suite, *ABILITIES, "--reuse", "--answers", theirs, "--judge-model", "j"]
    with listening(Page) as server:
        for url, said in ((server.url, "/v1"), ("http://h:x/v1", "PORT")):
            assert main(["evaluate", *map(str, [*options, "--judge", url])]) == 2
            assert said in capsys.readouterr().err


def test_stored_answers_say_whose_they_are_and_how_they_were_sampled(
    tiny, suite, theirs, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(abilities, "TOKENS", 5)
    options = [suite, *ABILITIES, "--answers", tmp_path / "own.jsonl"]
    drawn, _ = run(*options, "--drawn", out=tmp_path)
    assert drawn["sampling"] == "as in the chat" and drawn["model"] != "nano"
    again, page = run(*options, "--reuse", out=tmp_path)
    assert {k: again[k] for k in ("model", "sampling", "scores")} == {
        k: drawn[k] for k in ("model", "sampling", "scores")
    }
    assert "as in the chat" in page
    unsaid, page = run(*options[:-1], theirs, "--reuse", out=tmp_path)
    assert (unsaid["model"], unsaid["sampling"]) == ("nano", None) and "not recorded" in page
    # No other's answers take the place of its own, nor of one another.
    own = drawn["model"]
    for beside in ([own], ["theirs", "theirs"]):
        named = [x for name in beside for x in ("--beside", f"{name}={theirs}")]
        for reuse in (["--reuse"], []):
            assert main(["evaluate", *map(str, [*options, *named, *reuse])]) == 2
            assert "another name" in capsys.readouterr().err
    with (tmp_path / "own.jsonl").open("a") as file:
        file.write('{"id": "x", "answer": "y", "model": "vicuna-7b"}\n')
    assert main(["evaluate", *map(str, [*options, "--reuse"])]) == 2
    assert "vicuna-7b" in capsys.readouterr().err


def test_stored_answers_are_judged_by_people(suite, theirs, tmp_path):
    """Nothing is asked of a model: there is none."""
    ratings = []
    for rater, said in (("a", True), ("b", False)):
        ratings.append(tmp_path / f"{rater}.jsonl")
        rows = [("nano", "poem-0", said), ("nano", "recipe-1", False)]
        lines = (json.dumps({"model": m, "id": i, "fulfilled": f}) + "\n" for m, i, f in rows)
        ratings[-1].write_text("".join(lines))
    options = [suite, *ABILITIES, "--reuse", "--answers", theirs]
    options += [x for path in ratings for x in ("--ratings", path)]
    with judge_server() as (url, asked):
        options += ["--judge", url, "--judge-model", "j", "--judge-blind"]
        result, page = run(*options, out=tmp_path)
    found = result["scores"]["nano"]
    assert found["poem"]["fulfilled_people"] == 0.5 and found["poem"]["rated"] == 2
    assert found["all"]["fulfilled_people"] == 0.25
    assert found["all"]["judge_agrees_with_people"] == 0.75
    assert all(len(a[2]["messages"][0]["content"]) == 1 for a in asked)  # no picture


def test_ratings_of_other_answers_and_twice_do_not_count(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    rows = [("a", False), ("a", True), ("a", True), ("unknown", True)]
    lines = (json.dumps({"model": "m", "id": i, "fulfilled": f}) + "\n" for i, f in rows)
    path.write_text("".join(lines))
    assert read_ratings([str(path)], {("m", "a"): "x"}) == {("m", "a"): [Verdict(True, None)]}
    assert "are ignored: 1." in capsys.readouterr().err


def test_the_project_s_own_endpoint_is_a_judge(suite, theirs, tmp_path):
    """A real server and a real, if tiny and random, model: its replies are no verdicts."""
    from tests.api_case import served, tiny_engine

    engine = tiny_engine()
    with served(lambda: engine, engine) as address:
        options = [suite, *ABILITIES, "--reuse", "--answers", theirs]
        options += ["--judge", f"{address}/v1", "--judge-model", engine.model.config.name]
        result, page = run(*options, "--judge-blind", out=tmp_path)
        assert engine.totals.requests == 2
    assert result["scores"]["nano"]["all"]["judged"] == 0
    assert [v["fulfilled"] for v in result["verdicts"]] == [None, None]
    engine.close()


def test_people_judge_on_a_page(browser, suite, theirs, tmp_path, capsys):
    page_file = tmp_path / "review.html"
    options = [suite, *ABILITIES, "--reuse", "--answers", theirs, "--review", page_file]
    run(*options, out=tmp_path)
    context = browser.new_context(accept_downloads=True)
    page = context.new_page()
    faults = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.goto(page_file.as_uri())
    said = {}
    for _ in range(2):
        text = page.locator("#answer").inner_text()
        assert page.locator("#picture").evaluate("i => i.complete && i.naturalWidth > 0")
        said[text[:3]] = True
        page.keyboard.press("y" if text.startswith("GOOD") else "n")
    assert said.keys() == {"GOO", "BAD"} and "2 rated" in page.locator("#count").inner_text()
    page.reload()  # nothing is lost
    assert "2 rated" in page.locator("#count").inner_text()
    with page.expect_download() as download:
        page.click("#save")
    saved = tmp_path / "ratings.jsonl"
    download.value.save_as(saved)
    context.close()
    assert not faults
    result, _ = run(*options[:-2], "--ratings", saved, out=tmp_path)
    found = result["scores"]["nano"]
    assert (found["poem"]["fulfilled_people"], found["recipe"]["fulfilled_people"]) == (1.0, 0.0)
    # What was said of an answer does not count for the next one.
    lines = theirs.read_text().splitlines(keepends=True)
    theirs.write_text(json.dumps({"id": "poem-0", "answer": "Another verse."}) + "\n" + lines[1])
    result, _ = run(*options[:-2], "--ratings", saved, out=tmp_path)
    found = result["scores"]["nano"]
    assert (found["poem"]["rated"], found["recipe"]["rated"]) == (0, 1)
    assert f"answers in {saved} are ignored: 1." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ('{"fulfilled": true, "score": 5, "reason": "fine"}', Verdict(True, 5, "fine")),
        ('```json\n{"fulfilled": false, "score": 9}\n```', Verdict(False, None)),
        ('{"a": 1} {"fulfilled": false} then', Verdict(False, None)),
        ('{"fulfilled": "yes"}', None),
        (
            '{"fulfilled": true, "reason": "{ margin: 0 }"} {"a": 1}',
            Verdict(True, None, "{ margin: 0 }"),
        ),
        ('{"fulfilled": true, "score": "4", "x": {"fulfilled": false}}', Verdict(True, 4)),
        ('{"v": {"fulfilled": true, "score": 4.0}}', Verdict(True, 4)),
        ('{"fulfilled": true, "score": 4.5, "reason": "\\ud800"}', Verdict(True, None, "?")),
        ("{broken", None),
        ("", None),
    ],
)
def test_verdicts_are_read(reply, verdict):
    assert read_verdict(reply) == verdict


def test_prompts_in_another_encoding(tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "PROMPTS", tmp_path)
    (tmp_path / "judge.txt").write_text("Jugez à la lettre.", encoding="latin-1")
    (tmp_path / "rubric.txt").write_text("poem: a des mètres.", encoding="latin-1")
    for read in (lambda: Judge("http://127.0.0.1:9/v1", "j"), read_rubric):
        with pytest.raises(UserError, match="UTF-8"):
            read()


def test_filling_in_looks_at_the_template_alone():
    assert fill("{a} {b} {c}", a="{b}", b="2") == "{b} 2 {c}"


def test_mistakes(suite, theirs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(judging, "RETRIES", 0)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": 1}\n')
    other = tmp_path / "other.jsonl"
    other.write_text('{"id": "x", "answer": "y"}\n')
    stored = [suite, *ABILITIES, "--reuse", "--answers"]
    with judge_server(status=401) as (url, _):
        for arguments in (
            [tmp_path, *ABILITIES],
            [suite, *ABILITIES, "--reuse"],
            [*stored, tmp_path / "none.jsonl"],
            [*stored, bad],
            [*stored, other],
            [*stored, theirs, "--beside", theirs],
            [*stored, theirs, "--judge", url],
            [*stored, theirs, "--judge", url, "--judge-model", "j"],
            [*stored, theirs, "--judge", "http://127.0.0.1:9/v1", "--judge-model", "j"],
            [*stored, theirs, "--ratings", bad],
            [*stored, theirs, "--judge", url, "--judge-model", "j", "--verdicts", bad],
        ):
            assert main(["evaluate", *map(str, arguments)]) == 2, arguments
            said = capsys.readouterr().err.replace("j judges 2 answers …\n", "")
            assert said.count("\n") == 1 and said.startswith("minigpt4: "), said
    assert not (tmp_path / "none.jsonl").exists()
    (suite / "1.jpg").unlink()
    assert main(["evaluate", *map(str, [*stored, theirs])]) == 2
