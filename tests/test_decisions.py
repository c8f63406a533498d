"""POST /v1/decisions, asked by OpenAI's own client on a real server."""

import math
import re
import time
from contextlib import suppress

import httpx
import pytest

from minigpt4.conversation import Conversation, ask
from minigpt4.engine import Sampling
from minigpt4.web.api import routes
from minigpt4.web.api.decisions import first_tokens, read_decisions
from minigpt4.web.api.errors import ApiError
from tests.api_case import MODEL, address_fixture, client, data_url, engine_fixture, picture_file

engine, address = engine_fixture(), address_fixture()
ABOUT = [
    {
        "role": "user",
        "content": [
            {"type": "input_image", "image_url": data_url(picture_file())},
            {"type": "input_text", "text": "Here is a photo."},
        ],
    }
]
QUESTIONS = [
    {"type": "predicate", "instructions": "There is a sky.", "name": "sky"},
    {
        "type": "choice",
        "instructions": "Which colour is it?",
        "choices": [{"value": "red", "description": "like fire"}, {"value": "blue"}],
    },
    {
        "type": "choice",
        "instructions": "Is it day?",
        "choices": [{"value": True}, {"value": False}],
    },
    {
        "type": "score",
        "instructions": "How sharp is it?",
        "levels": [{"label": "blurred"}, {"label": "fair"}, {"label": "sharp"}],
    },
]


def test_every_kind_of_question(address):
    decision = client(address).decisions.create(model=MODEL, input=ABOUT, questions=QUESTIONS)
    predicate, choice, typed, score = decision.answers
    assert (predicate.type, predicate.name) == ("predicate", "sky")
    assert 0 < predicate.probability < 1
    assert [p.value for p in choice.probabilities] == ["red", "blue"]
    assert [p.value for p in typed.probabilities] == [True, False]
    for answer in (choice, typed, score):
        shares = [p.probability for p in answer.probabilities]
        assert math.isclose(sum(shares), 1) and answer.confidence == max(shares)
    best = max(choice.probabilities, key=lambda p: p.probability)
    assert choice.choice == best.value
    assert [(p.value, p.label) for p in score.probabilities] == [
        (1, "blurred"),
        (2, "fair"),
        (3, "sharp"),
    ]
    assert math.isclose(score.score, sum(p.value * p.probability for p in score.probabilities))
    assert decision.usage.output_tokens == 4 and decision.usage.input_tokens_details.cached_tokens


def test_the_picture_is_encoded_once(address, engine, monkeypatch):
    encoded, encode = [], engine.model.encode_pictures
    monkeypatch.setattr(engine.model, "encode_pictures", lambda p: encoded.extend(p) or encode(p))
    url = data_url(picture_file("olive"))
    about = [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]
    client(address).decisions.create(model=MODEL, input=about, questions=QUESTIONS)
    assert len(encoded) == 1


def test_a_probability_is_the_models_own(address, engine):
    """Recomputed from the log-probabilities of all first tokens."""
    question = QUESTIONS[0]
    (answer,) = (
        client(address).decisions.create(model=MODEL, input="Hello.", questions=[question]).answers
    )
    asked = Conversation.asking("Hello.")
    asked.add_question("There is a sky.\nIs this true? Answer with Yes or No.")
    sampling = Sampling(temperature=0, max_new_tokens=1, repetition_penalty=1.0)
    width = engine.model.config and len(engine.model.tokenizer)
    found = ask(engine, asked, sampling, watched=range(width))
    list(found)
    yes, no = (
        sum(math.exp(found.watched[token]) for token in tokens)
        for tokens in first_tokens(engine.model.tokenizer, ["Yes", "No"])
    )
    assert math.isclose(answer.probability, yes / (yes + no), rel_tol=1e-4)


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("input", {"questions": QUESTIONS}),
        ("questions", {"input": "Hello."}),
        ("questions", {"input": "Hello.", "questions": []}),
        (
            "questions[0].type",
            {"input": "Hello.", "questions": [{"type": "x", "instructions": ""}]},
        ),
        (
            "questions[0].choices",
            {"input": "Hello.", "questions": [{"type": "choice", "instructions": "Which?"}]},
        ),
        ("input[0].role", {"input": [{"role": "x", "content": ""}], "questions": QUESTIONS}),
    ],
)
def test_what_cannot_be_asked(address, param, body):
    response = httpx.post(address + "/v1/decisions", json=body, timeout=60)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert error["message"].endswith(".")


def test_questions_end_when_the_client_goes_away(address, engine):
    engine.pace = 0.05
    try:
        asked = {"input": ABOUT, "questions": [QUESTIONS[0] | {"name": None}] * 100}
        before = engine.totals.requests
        with suppress(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/decisions", json=asked, timeout=1.5)
        time.sleep(1.0)
        come = engine.totals.requests
        assert come > before
        time.sleep(1.0)
        assert engine.totals.requests == come < before + 100
    finally:
        engine.pace = 0.0


def test_many_large_requests_wait_outside(address, monkeypatch):
    monkeypatch.setattr(routes, "MOST_LARGE", 0)
    ask = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "user": "u" * 60}
    assert httpx.post(f"{address}/v1/chat/completions", json=ask, timeout=60).status_code == 200
    monkeypatch.setattr(routes, "LARGE", 50)
    refused = httpx.post(f"{address}/v1/chat/completions", json=ask, timeout=60)
    assert refused.status_code == 429 and refused.headers["Retry-After"]
    assert "try again" in refused.json()["error"]["message"]
    monkeypatch.setattr(routes, "MOST_LARGE", 1)
    assert httpx.post(f"{address}/v1/chat/completions", json=ask, timeout=60).status_code == 200


def test_what_is_ignored_is_named(address):
    question = QUESTIONS[0] | {"colour": "red"}
    asked = {"input": "A dog.", "questions": [question], "temperature": 1}
    answer = httpx.post(f"{address}/v1/decisions", json=asked, timeout=60)
    assert answer.headers["x-ignored-fields"] == "temperature, questions[0].colour"


def asked(*questions, **more) -> dict:
    return {"input": "A dog.", "questions": list(questions), **more}


def predicate(instructions, **more) -> dict:
    return {"type": "predicate", "instructions": instructions, **more}


def choice(*choices, **more) -> dict:
    return {"type": "choice", "instructions": "Which?", "choices": list(choices), **more}


A, B = {"value": "a"}, {"value": "b"}
PICTURE = [{"type": "input_text", "text": "It barks."}, {"type": "input_image", "image_url": "x"}]
LEVELS = [{"label": "low"}, {"label": "low"}]


@pytest.mark.parametrize(
    ("param", "sentence", "body"),
    [
        ("questions", "is missing", {"input": "A dog."}),
        (
            "previous_response_id",
            "keeps nothing",
            asked(predicate("?"), previous_response_id="resp_1"),
        ),
        ("questions", "must be a list", {"input": "A dog.", "questions": {}}),
        ("questions", "at least 1 item.", asked()),
        ("questions", "at most 400 items.", asked(*[predicate("It barks.")] * 401)),
        ("questions[0]", "must be an object", asked("It barks.")),
        ("questions[0].type", "predicate, choice or score", asked({"type": "x"})),
        ("questions[0].instructions", "is missing", asked({"type": "predicate"})),
        ("questions[0].instructions", "a string or a list of parts", asked(predicate(5))),
        ("questions[0].instructions", "is empty", asked(predicate(" "))),
        ("questions[0].instructions", "is empty", asked(predicate([]))),
        ("questions[0].instructions[1].type", "belong into input", asked(predicate(PICTURE))),
        (
            "questions[0].instructions[0].text",
            "must be a string",
            asked(predicate([{"type": "input_text", "text": {"a": 1}}])),
        ),
        ("questions[0].choices", "at least 2 items.", asked(choice(A))),
        ("questions[0].choices", "at most 26 items.", asked(choice(*[A] * 27))),
        ("questions[0].choices[0]", "must be an object", asked(choice("a", "b"))),
        ("questions[0].choices[0].value", "true or false", asked(choice({"value": 1}, B))),
        ("questions[0].choices[1].value", "is empty", asked(choice(A, {"value": ""}))),
        ("questions[0].choices[1].value", "is given twice", asked(choice(A, A))),
        (
            "questions[0].levels[1].label",
            "is given twice",
            asked({"type": "score", "instructions": "How?", "levels": LEVELS}),
        ),
        (
            "questions[1].name",
            "is given twice",
            asked(predicate("It barks.", name="x"), predicate("It runs.", name="x")),
        ),
    ],
)
def test_what_is_wrong_with_a_question_is_said(param, sentence, body):
    with pytest.raises(ApiError, match=re.escape(sentence)) as refused:
        read_decisions(body)
    assert refused.value.param == param and str(refused.value).startswith(param)


LONG = "word " * 3000


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("questions[1].instructions", asked(predicate("It barks."), predicate(LONG))),
        ("questions[0].instructions", asked(predicate("x" * 200_001))),
        ("questions[0].choices[1].description", asked(choice(A, B | {"description": LONG}))),
        ("input", asked(predicate("It barks."), input=LONG)),
    ],
)
def test_the_text_that_is_too_long_is_named(address, param, body):
    response = httpx.post(address + "/v1/decisions", json=body, timeout=60)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert error["code"] == "context_length_exceeded" and "shorten it" in error["message"]


def test_everything_in_a_question_that_is_not_read_is_named():
    part = {"type": "input_text", "text": "It barks.", "colour": 1}
    questions = [
        predicate([part], choices=[A, B]),
        choice(A | {"x": 1}, B | {"y": None}, levels=[{"label": "low"}, {"label": "high"}]),
    ]
    assert read_decisions(asked(*questions)).ignored == [
        "questions[0].choices",
        "questions[0].instructions[0].colour",
        "questions[1].levels",
        "questions[1].choices[0].x",
    ]
