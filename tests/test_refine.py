"""curate refine: against this project's own endpoint, against one with moods, and locally."""

import threading
import time

import pytest

from minigpt4 import start
from minigpt4.__main__ import main
from minigpt4.curation import filters
from minigpt4.curation.records import read_records, write_records
from minigpt4.curation.refine import estimate, tidy, useless
from tests.api_case import MODEL, served, tiny_engine
from tests.http_case import Handler, listening

TWICE = "A dog runs on the grass. It is brown. A dog runs on the grass. Behind it is a"
MENDED = "A dog runs on the grass. It is brown."
CLEAN = "Two cats sleep on a red sofa."


@pytest.fixture(autouse=True)
def no_endpoint(monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def given(tmp_path):
    path = tmp_path / "generated.jsonl"
    texts = [TWICE, CLEAN, TWICE.replace("dog", "cow"), CLEAN.replace("cats", "owls")]
    records = [{"image_id": str(i), "picture": "p", "text": t} for i, t in enumerate(texts)]
    records[0]["cut"] = True
    write_records(path, [*records, {"image_id": "x", "picture": "p", "error": "broken"}])
    return path


class Endpoint:
    """An OpenAI-compatible endpoint over HTTP that takes out what is said twice or breaks off.

    `moods`: what it does with the next requests instead: a status, or a text as the answer.
    `refused`: fields that it does not know, and says so with the status `refusal`.
    """

    def __init__(self) -> None:
        self.moods: list[int | str] = []
        self.refused: set[str] = set()
        self.refusal = 400
        self.retry_after = "2"
        self.bodies: list[dict] = []
        self.keys: set[str] = set()
        self.times: list[float] = []
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0

    def answer(self, body: dict) -> tuple[int, dict]:
        with self.lock:
            mood = self.moods.pop(0) if self.moods else ""
        if isinstance(mood, int):
            return mood, {"error": {"message": f"mood {mood}", "type": "x", "code": None}}
        for name in self.refused & body.keys():
            said = f"Unsupported parameter: '{name}' is not supported with this model."
            return self.refusal, {"error": {"message": said, "type": "x", "param": name}}
        text = body["messages"][0]["content"].split("\n\n", 1)[1]
        kept: list[str] = []
        for sentence in text.split(". "):
            whole = sentence.rstrip(".") + "."
            if whole not in kept and not whole.endswith(" a."):
                kept.append(whole)
        message = {"role": "assistant", "content": mood or " ".join(kept)}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
        common = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        return 200, common | {"choices": [choice], "usage": usage}

    def handler(endpoint):
        class Own(Handler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.read_json()
                with endpoint.lock:
                    endpoint.bodies.append(body)
                    endpoint.times.append(time.monotonic())
                    endpoint.keys.add(self.headers["Authorization"])
                    endpoint.at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint.at_once)
                time.sleep(0.05)
                status, answer = endpoint.answer(body)
                with endpoint.lock:
                    endpoint.at_once -= 1
                more = {"Retry_After": endpoint.retry_after} if status == 429 else {}
                self.reply(status, answer, **more)

        return Own


@pytest.fixture
def endpoint():
    return Endpoint()


@pytest.fixture
def refine(endpoint, given, tmp_path):
    """Runs the command against the endpoint; (exit status, what was written)."""
    with listening(endpoint.handler()) as server:

        def run(*options: str):
            out = tmp_path / "refined.jsonl"
            command = ["curate", "refine", str(given), "--out", str(out)]
            status = main([*command, "--url", f"{server.url}/v1", "--refiner", "mender", *options])
            return status, read_records(out) if out.exists() else {}

        yield run


def test_descriptions_are_mended(refine, endpoint, capsys, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    status, records = refine("--together", "2", "--price-in", "2.5", "--price-out", "10")
    assert status == 0
    assert records["0"]["text"] == MENDED and records["0"]["before"] == TWICE
    assert records["0"]["refined"] == "changed" and records["0"]["refiner"] == "mender"
    assert not records["0"]["cut"]
    assert records["1"]["text"] == CLEAN and records["1"]["refined"] == "same"
    assert records["x"] == {"image_id": "x", "picture": "p", "error": "broken"}
    said = capsys.readouterr().err
    assert "4 to refine: about" in said and "which cost about" in said
    assert "2 changed, 2 the same, 0 kept" in said
    assert endpoint.keys == {"Bearer secret"} and endpoint.most_at_once == 2
    body = endpoint.bodies[0]
    assert body["model"] == "mender" and body["temperature"] == 0 and body["max_tokens"] > 64
    assert body["messages"][0]["content"].endswith(("\n\n" + TWICE, "\n\n" + CLEAN))


def test_what_was_cut_and_still_breaks_off_stays_cut(refine, endpoint):
    """The answer changed the text, not its end: the filter must see that it is a fragment."""
    endpoint.moods = ["A dog runs on the green grass. It is brown. Behind it is a fence"]
    status, records = refine("--together", "1")
    assert status == 0 and records["0"]["refined"] == "changed" and records["0"]["cut"]
    assert "breaks_off" in filters.broken_rules(records["0"], filters.Thresholds())


def test_it_resumes(refine, endpoint, given, capsys):
    assert refine("--together", "1")[0] == 0
    asked = len(endpoint.bodies)
    status, records = refine("--together", "1")
    assert status == 0 and len(endpoint.bodies) == asked == 4
    again = read_records(given)
    again["1"]["text"] = "Two cats sleep on a blue sofa."  # described anew since
    write_records(given, again.values())
    status, records = refine()
    assert len(endpoint.bodies) == asked + 1 and "blue" in records["1"]["text"]


def test_the_file_that_is_refined_is_not_written(given, capsys):
    before = given.read_bytes()
    assert main(["curate", "refine", str(given), "--out", str(given), "--estimate"]) == 2
    assert "“--out” would overwrite" in capsys.readouterr().err and given.read_bytes() == before


def test_another_refiner_or_prompt_takes_another_file(refine, endpoint, capsys, monkeypatch):
    _, done = refine()
    asked = len(endpoint.bodies)
    status, records = refine("--refiner", "other")
    assert status == 2 and records == done
    assert "refined by mender, but this is other" in capsys.readouterr().err
    monkeypatch.setattr("minigpt4.curation.run.prompt_text", lambda name: "Mend it.")
    status, records = refine()
    assert status == 2 and records == done and len(endpoint.bodies) == asked
    assert "before prompts/refine.txt was changed" in capsys.readouterr().err


def test_what_is_of_no_use_leaves_the_text(refine, endpoint, capsys):
    endpoint.moods = [
        "I'm sorry, but I cannot help with that.",
        "A quiet harbour at dusk, gulls above.",
        "   ",
        "Two owls sleep on a red sofa. " * 9,
    ]
    status, records = refine("--together", "1")
    assert status == 0
    assert all(record.get("text") == record.get("before") for record in records.values())
    assert records["0"]["text"] == TWICE and records["0"]["cut"]
    said = capsys.readouterr().err
    assert "0 changed, 0 the same, 4 kept" in said
    for why in ("was a refusal", "said other things", "was empty", "was much longer"):
        assert f"1 × the answer {why}" in said, said


def test_it_waits_as_told_and_tries_again(refine, endpoint):
    """Retry-After: 2 is honoured; a server's error and a lost connection are tried again."""
    endpoint.moods = [429, 503]
    status, records = refine("--together", "1")
    assert status == 0 and records["0"]["text"] == MENDED
    assert len(endpoint.bodies) == 6
    first, second, third = endpoint.times[:3]
    assert second - first >= 2.0
    assert third - second >= 0.2


def test_it_does_not_wait_longer_than_two_minutes(refine, endpoint, capsys):
    endpoint.moods, endpoint.retry_after = [429], "121"
    status, records = refine("--together", "1")
    assert status == 2 and len(endpoint.bodies) == 4 and "0" not in records
    assert "1 got no answer" in capsys.readouterr().err


def test_what_fails_for_good_is_left_for_later(refine, endpoint, capsys):
    endpoint.moods = [500]
    status, records = refine("--together", "1", "--retries", "0")
    said = capsys.readouterr().err
    assert status == 2 and "1 got no answer" in said and "mood 500" in said
    assert set(records) == {"x", "1", "2", "3"}
    assert refine()[0] == 0
    assert set(refine()[1]) == {"x", "0", "1", "2", "3"}


@pytest.mark.parametrize(("mood", "said"), [(401, "key"), (404, "model or address"), (429, "429")])
def test_a_wrong_key_or_address_is_said(refine, endpoint, capsys, mood, said):
    endpoint.moods = [mood] * 4
    status, records = refine("--retries", "0")
    assert status == 2 and set(records) == {"x"}
    assert said in (err := capsys.readouterr().err) and "Traceback" not in err


@pytest.mark.parametrize("refusal", [400, 422])
def test_an_endpoint_that_knows_other_fields(refine, endpoint, refusal):
    endpoint.refused, endpoint.refusal = {"max_tokens", "temperature"}, refusal
    status, records = refine("--together", "1")
    assert status == 0 and records["0"]["text"] == MENDED
    assert len(endpoint.bodies) == 4 + 2  # the two refusals are not repeated
    assert "max_completion_tokens" in endpoint.bodies[-1]


@pytest.mark.parametrize("refusal", [400, 422])
def test_an_endpoint_that_refuses_one_text(refine, endpoint, refusal):
    endpoint.moods = [refusal]
    status, records = refine("--together", "1")
    assert status == 0 and len(records) == 5 and records["0"]["text"] == TWICE
    assert records["0"]["refined"] == f"kept: the endpoint refused it: mood {refusal}"


def test_estimates(refine, endpoint, capsys):
    found = estimate(["a" * 400, "b" * 40], "i" * 80)
    assert (found.requests, found.prompt_tokens, found.answer_tokens) == (2, 2 * 28 + 110, 110)
    assert found.cost(1.0, 10.0) == pytest.approx((166 + 1100) / 1e6)
    assert refine("--estimate")[0] == 0
    assert refine("--price-out", "1000000", "--max-cost", "1")[0] == 2
    assert "--max-cost 1" in capsys.readouterr().err and not endpoint.bodies


def test_nobody_at_the_address(given, tmp_path, capsys):
    out = str(tmp_path / "out.jsonl")
    command = ["curate", "refine", str(given), "--out", out, "--retries", "0"]
    assert main([*command, "--url", "http://127.0.0.1:9/v1", "--refiner", "x"]) == 2
    assert "No endpoint answers at http://127.0.0.1:9/v1: check" in capsys.readouterr().err
    assert main([*command, "--url", "http://127.0.0.1:9/v1"]) == 2
    assert "--refiner NAME" in capsys.readouterr().err


def test_our_own_endpoint_and_the_local_fallback(given, tmp_path, monkeypatch, capsys):
    """The same model behind our server and in this process mends alike."""
    engine = tiny_engine()
    far, near = tmp_path / "far.jsonl", tmp_path / "near.jsonl"
    with served(lambda: engine, engine) as address:
        monkeypatch.setenv("OPENAI_BASE_URL", address + "/v1")
        monkeypatch.setenv("OPENAI_MODEL", MODEL)
        assert main(["curate", "refine", str(given), "--out", str(far)]) == 0
        monkeypatch.delenv("OPENAI_BASE_URL")
        monkeypatch.setattr(start, "open_model", lambda options: engine.model)
        assert main(["curate", "refine", str(given), "--out", str(near)]) == 0
    engine.close()
    assert "No endpoint is named" in capsys.readouterr().err
    results = [{i: r.get("text") for i, r in read_records(p).items()} for p in (far, near)]
    assert results[0] == results[1]
    assert read_records(near)["0"]["refiner"].startswith(MODEL + "@")


def test_answers_are_tidied():
    assert tidy('"A dog."') == "A dog." and tidy("“A dog.”\n") == "A dog."
    assert tidy("Here is the text:\n\nA dog.") == "A dog."
    assert tidy('"Go" it says, and "stop".') == '"Go" it says, and "stop".'
    assert tidy("A sign that says:\nstop") == "A sign that says:\nstop"
    assert useless(TWICE, MENDED, cut=False) == ""
    assert "cut off" in useless(TWICE, MENDED, cut=True)
    assert "omitted too much" in useless(TWICE, "A dog.", cut=False)
