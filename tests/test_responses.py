"""POST /v1/responses, asked by OpenAI's own client on a real server."""

import json

import httpx
import openai
import pytest
from pydantic import BaseModel

from minigpt4.config import get_model
from minigpt4.web.api.responses import read_response
from tests.api_case import MODEL, address_fixture, client, data_url, engine_fixture, picture_file

engine, address = engine_fixture(), address_fixture("--max-upload-mb", "1")
URL = data_url(picture_file())
ABOUT = [
    {
        "role": "user",
        "content": [
            {"type": "input_text", "text": "What is this?"},
            {"type": "input_image", "image_url": URL, "detail": "auto"},
        ],
    }
]


class Seen(BaseModel):
    red: bool


def ask(address, asked="Hello?", **settings):
    settings = {"model": MODEL, "max_output_tokens": 8, "temperature": 0, **settings}
    return client(address).responses.create(input=asked, **settings)


def post(address, **body) -> httpx.Response:
    return httpx.post(address + "/v1/responses", json=body, timeout=60)


def test_an_answer_about_a_picture(address):
    answer = ask(address, ABOUT, instructions="Be brief.")
    chat = client(address).chat.completions.create(
        model=MODEL,
        max_tokens=8,
        temperature=0,
        messages=[
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is this?"},
                    {"type": "image_url", "image_url": {"url": URL}},
                ],
            },
        ],
    )
    assert answer.output_text == chat.choices[0].message.content
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.output_tokens == 8 and answer.instructions == "Be brief."


def test_the_events_of_a_stream(address):
    whole = ask(address)
    events = list(ask(address, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert set(kinds[4:-4]) == {"output_text.delta"} and len(kinds) > 9
    assert "".join(event.delta for event in events[4:-4]) == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == 8


def test_openais_helper_for_streams(address):
    schema = {"input": "Hello?", "model": MODEL, "text_format": Seen, "max_output_tokens": 100}
    with client(address).responses.stream(**schema) as stream:
        kinds = {event.type for event in stream}
        assert isinstance(stream.get_final_response().output_parsed, Seen)
    assert "response.completed" in kinds


def test_a_conversation_goes_on(address):
    first = ask(address, ABOUT)
    second = ask(address, [*ABOUT, *first.output, {"role": "user", "content": "And now?"}])
    assert second.usage.input_tokens > first.usage.input_tokens
    assert second.usage.input_tokens_details.cached_tokens > 0


def test_an_answer_follows_a_json_schema(address):
    answer = client(address).responses.parse(
        model=MODEL, input=ABOUT, text_format=Seen, max_output_tokens=100
    )
    assert isinstance(answer.output_parsed, Seen) and answer.status == "completed"
    assert answer.text.format.type == "json_schema"


def test_logprobs(address):
    answer = ask(address, top_logprobs=2, include=["message.output_text.logprobs"])
    (part,) = answer.output[0].content
    assert len(part.logprobs) == 8 and {len(token.top_logprobs) for token in part.logprobs} == {2}
    assert not ask(address).output[0].content[0].logprobs


AS_JSON = {"type": "json_schema", "name": "a"}
NESTED = '{"type": "json_schema", "name": …, "schema": …}'  # as clients of chat completions do
HELLO = {"role": "user", "content": "Hello?"}
WRONG = {"type": "string", "pattern": "("}


@pytest.mark.parametrize(
    ("param", "sentence", "body"),
    [
        ("input", "input is missing", {}),
        ("input[0].role", "input[0].role must be", {"input": [{"role": "x", "content": "a"}]}),
        ("input[0].content", "is missing", {"input": [{"role": "user"}]}),
        ("input[0].type", "only messages", {"input": [{"type": "function_call", "name": "f"}]}),
        ("input[0]", "send the message itself", {"input": [{"type": "item_reference", "id": "a"}]}),
        ("input", "a string or a list of messages", {"input": 3}),
        ("input", "a string or a list of messages", {"input": HELLO}),
        ("input[0].images", "input_image", {"input": [{**HELLO, "images": ["AAAA"]}]}),
        ("max_output_tokens", "max_output_tokens must be", {"max_output_tokens": 0}),
        ("previous_response_id", "keeps nothing", {"previous_response_id": "resp_1"}),
        ("prompt", "no stored prompts", {"prompt": {"id": "pmpt_1"}}),
        ("input[0].role", "is missing: add it", {"input": [{"content": "a"}]}),
        ("conversation", "keeps nothing", {"conversation": "conv_1"}),
        ("tools", "calls no functions", {"tools": [{"type": "web_search"}]}),
        ("text.format.type", "text.format must be", {"text": {"format": {"type": "xml"}}}),
        ("text", "text must be an object", {"text": "x"}),
        ("text", "text must be an object", {"text": ["x"]}),
        ("include", "include must be a list", {"include": "message.output_text.logprobs"}),
        ("response_format", "response_format is called text.format", {"response_format": {}}),
        ("max_tokens", "max_tokens must be", {"max_tokens": 0, "max_output_tokens": None}),
        ("text.format.schema", NESTED, {"text": {"format": {**AS_JSON, "json_schema": {}}}}),
        ("text.format", "cannot be followed", {"text": {"format": {**AS_JSON, "schema": WRONG}}}),
        (
            "input[0].content[0].image_url",
            "image_url must be a string",
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": None}]}]},
        ),
        (
            "input[0].content[0].file_id",
            "send the picture in image_url",
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "x"}]}]},
        ),
        (
            "input[0].content[0]",
            '{"type": "input_text", "text": …} or {"type": "input_image", "image_url": …}',
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
        ),
        (
            "input[0].content[0].image_url",
            "base64 has a “*” in it",
            {
                "input": [
                    {
                        "role": "user",
                        "content": [{"type": "input_image", "image_url": "data:;base64,*"}],
                    }
                ]
            },
        ),
    ],
)
def test_what_cannot_be_asked(address, param, sentence, body):
    given = {"input": "Hello?"} if body and "input" not in body else {}
    response = post(address, **given, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert sentence in error["message"] and error["message"].endswith(".")


def test_what_is_ignored_is_named(address):
    body = {"input": "Hello?", "max_output_tokens": 2, "reasoning": {"effort": "low"}}
    response = post(address, **body, text={"verbosity": "low"})
    assert response.headers["x-ignored-fields"] == "text.verbosity, reasoning"
    item = {"role": "user", "content": "Hello?", "id": "msg_1", "status": "completed", "phase": "x"}
    asked = {"input": [item], "include": ["reasoning.encrypted_content"], "top_logprobs": 2}
    response = post(address, **asked, max_output_tokens=2, text={"colour": 1})
    named = response.headers["x-ignored-fields"]
    assert named == "text.colour, top_logprobs, include, input[0].phase"


@pytest.mark.parametrize(
    ("ignored", "body"),
    [
        (["n"], {"n": 0}),
        (["messages"], {"messages": [{"role": "user", "content": "Bye."}]}),
        (["max_tokens"], {"max_output_tokens": 2, "max_tokens": 3}),
        (["max_completion_tokens"], {"max_output_tokens": 2, "max_completion_tokens": 3}),
        (["text.verbosity"], {"text": {"verbosity": ""}}),
        (["text.format.colour"], {"text": {"format": {**AS_JSON, "schema": {}, "colour": 1}}}),
        ([], {"max_tokens": 2, "max_output_tokens": None}),
    ],
)
def test_rivals_of_its_fields_are_named(ignored, body):
    limit = {} if "max_output_tokens" in body else {"max_tokens": 2}
    request, named = read_response({"input": "Hello?", **limit, **body})
    assert (request.max_tokens, request.max_completion_tokens) == (2, None)
    assert request.messages[0].text == "Hello?"
    assert named == ignored


@pytest.mark.parametrize("most", [2**63, 10**20, 1e30])
def test_a_ceiling_may_be_any_number(most):
    request, _ = read_response({"input": "Hello?", "max_output_tokens": most})
    config = get_model("nano")
    assert request.max_tokens == 2**63 - 1  # which any client's integers hold
    assert request.sampling(config).max_new_tokens == config.context


def test_an_empty_object_of_php():
    assert not read_response({"input": "Hello?", "metadata": [], "text": []})[1]


def test_a_number_that_no_float_holds_is_not_echoed(address):
    body = b'{"input": "Hello?", "max_output_tokens": 2, "metadata": {"a": 1e999}}'
    response = httpx.post(address + "/v1/responses", content=body, timeout=60)
    assert response.status_code == 400 and response.json()["error"]["param"] == "metadata.a"


@pytest.mark.parametrize(
    ("sentence", "param", "body"),
    [
        (
            "text.format and guided_choice both constrain the answer: send one of them.",
            "guided_choice",
            {"text": {"format": {"type": "json_object"}}, "guided_choice": ["a"]},
        ),
        ("metadata must be an object of strings.", "metadata", {"metadata": {"a": {"b": "c"}}}),
        ("metadata must be an object of strings.", "metadata", {"metadata": ["a"]}),
        ("input is empty: write a question.", "input", {"input": " "}),
        ("input is empty: write a question.", "input", {"input": []}),
        (
            "input[0] is empty: write a question.",
            "input[0].content",
            {"input": [{"role": "user", "content": []}]},
        ),
        (
            "input[0].content[0].text must be a string.",
            "input[0].content[0].text",
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": []}]}]},
        ),
        (
            "background is not supported: leave it out, and wait for the answer or stream it.",
            "background",
            {"background": True},
        ),
        ("ebnf is not supported: use text.format, or leave it out.", "ebnf", {"ebnf": "x"}),
    ],
)
def test_what_a_body_may_not_hold(address, sentence, param, body):
    response = post(address, **{"input": "Hello?", "max_output_tokens": 2, **body})
    error = response.json()["error"]
    assert (response.status_code, error["message"], error["param"]) == (400, sentence, param)


def test_a_fault_ends_the_stream(address, engine, monkeypatch, caplog):
    def fail(_):
        raise RuntimeError("CUDA out of cheese")

    monkeypatch.setattr(engine.decoder, "forward", fail)
    last = list(ask(address, stream=True))[-1]
    assert last.type == "response.failed" and "went wrong" in last.response.error.message
    assert "cheese" in caplog.text and "cheese" not in json.dumps(last.model_dump())
    with pytest.raises(openai.InternalServerError, match="went wrong"):
        ask(address)
