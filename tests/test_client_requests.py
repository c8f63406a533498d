"""Requests of existing clients: read as they are meant, or named in a header or an error."""

import base64
import io
import json
import random
import re
from typing import Annotated, Literal

import httpx
import pytest
from PIL import Image
from pydantic import BaseModel, Field
from starlette.testclient import TestClient

from minigpt4.conversation import Conversation, ask
from minigpt4.engine import Sampling
from minigpt4.web.api.body import NAMED, read_chat
from minigpt4.web.api.errors import ApiError
from minigpt4.web.api.grammar import MAX_EXPRESSION, Format, constraints
from minigpt4.web.api.routes import application
from minigpt4.web.server import Server
from tests.api_case import (
    MODEL,
    address_fixture,
    client,
    data_url,
    engine_fixture,
    options,
    picture_file,
    question,
)

engine, address = engine_fixture(), address_fixture("--max-upload-mb", "1")
HELLO = [{"role": "user", "content": "Hello?"}]
URL = data_url(picture_file())
ABOUT = [question("What is this?", URL)]
SAID = {"role": "assistant", "content": "A red box."}
BRIEF = {"role": "system", "content": "Answer in one word."}


def post(address, messages=HELLO, status=200, **body) -> httpx.Response:
    body = {"messages": messages, "max_tokens": 4, "temperature": 0, **body}
    response = httpx.post(address + "/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == status, response.text
    return response


def text(response: httpx.Response) -> str:
    return response.json()["choices"][0]["message"]["content"]


# --- pictures ------------------------------------------------------------------------------------


def test_an_image_url_may_be_a_string(address):
    part = {"type": "image_url", "image_url": URL}
    words = {"type": "text", "text": "What is this?"}
    said = text(post(address, [{"role": "user", "content": [part, words]}]))
    assert said == text(post(address, ABOUT))
    # The Responses API's parts.
    part, words = {"type": "input_image", "image_url": URL}, words | {"type": "input_text"}
    assert text(post(address, [{"role": "user", "content": [part, words]}])) == said


def noise() -> bytes:
    """A picture whose base64 has every character."""
    file = io.BytesIO()
    Image.frombytes("RGB", (32, 32), random.Random(1).randbytes(3072)).save(file, "PNG")
    return file.getvalue()


def lines(encoded: str) -> str:
    return "\r\n".join(encoded[i : i + 76] for i in range(0, len(encoded), 76))


@pytest.mark.parametrize(
    "change",
    [
        lambda code: code.rstrip("="),
        lambda code: code.replace("+", "-").replace("/", "_"),
        lambda code: code.replace("+", "-").replace("/", "_").rstrip("="),
        lines,
        lambda code: code.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"),
        lambda code: code + "=",
        lambda code: code + "\n",
    ],
    ids=["unpadded", "for URLs", "for URLs, unpadded", "lines", "quoted", "padded", "newline"],
)
def test_every_usual_way_to_write_base64_is_read(address, change):
    file = noise()
    code = base64.b64encode(file).decode()
    asked = [question("What is this?", "data:image/png;base64," + change(code))]
    assert set("+/") <= set(code)
    assert text(post(address, asked)) == text(
        post(address, [question("What is this?", data_url(file))])
    )


def test_the_largest_picture_may_be_broken_into_lines(address):
    noise = picture_file() + bytes(2**20 - 2000)  # a viewer ignores what follows a picture
    url = "data:image/png;base64," + lines(base64.b64encode(noise).decode())
    assert post(address, [question("What is this?", url)])


# --- conversations -------------------------------------------------------------------------------


def test_system_messages_are_merged_wherever_they_stand(address):
    later = [*ABOUT, SAID, BRIEF, question("Which colour?")]
    first = [BRIEF, *ABOUT, SAID, question("Which colour?")]
    assert text(post(address, later)) == text(post(address, first))
    both = read_chat({"messages": [BRIEF, *HELLO, BRIEF | {"role": "developer"}, *HELLO]})[0]
    assert both.system == "Answer in one word.\nAnswer in one word."


def test_an_assistants_greeting_may_come_first(address):
    greeting = {"role": "assistant", "content": "Hello! What can I do?"}
    plain, greeted = post(address, ABOUT), post(address, [greeting, *ABOUT])
    sizes = [r.json()["usage"]["prompt_tokens"] for r in (plain, greeted)]
    assert sizes[1] > sizes[0]


@pytest.mark.parametrize("content", [None, "", []])
def test_an_answer_without_content_is_an_empty_one(address, content):
    empty = {"role": "assistant", "content": content}
    post(address, [*HELLO, empty, *HELLO])
    # As the last message, it begins the answer.
    assert text(post(address, [*HELLO, empty])) == text(post(address, HELLO))


def test_a_question_without_content_says_nothing_unless_it_is_the_last(address):
    """Clients leave such turns where a picture was, and cannot remove them."""
    empty, later = {"role": "user", "content": " "}, [SAID, *HELLO]
    assert text(post(address, [empty, *later])) == text(post(address, later))
    refused = post(address, [*HELLO, SAID, empty], 400).json()["error"]
    assert refused["param"] == "messages[2].content"


def test_an_answer_that_is_the_last_message_is_continued(address, engine):
    """As the page's Continue does it."""
    begun = Conversation.asking("Hello?")
    begun.add_answer("The box is")
    sampling = Sampling(temperature=0, max_new_tokens=6, repetition_penalty=1.0)
    continued = "".join(ask(engine, begun, sampling))
    asked = {"max_tokens": 6, "repetition_penalty": 1.0}
    answer = post(address, [*HELLO, SAID | {"content": "The box is"}], **asked)
    assert text(answer) == continued != text(post(address, **asked))
    # The space that the client has is not written again.
    spaced = post(address, [*HELLO, SAID | {"content": "The box is "}], **asked)
    assert text(spaced) == text(answer).lstrip()


def turns(count: int) -> list[dict]:
    long = {"role": "user", "content": "word " * 60}
    return [message for _ in range(count) for message in (long, SAID)]


def test_long_conversations_lose_their_oldest_turns_and_say_how_many(address, engine):
    answer = post(address, [*turns(40), *HELLO])
    dropped = int(answer.headers["x-dropped-turns"])
    assert 0 < dropped < 40 and text(answer)
    kept = post(address, [*turns(40)[2 * dropped :], *HELLO])
    assert text(kept) == text(answer) and "x-dropped-turns" not in kept.headers
    with httpx.stream(
        "POST",
        address + "/v1/chat/completions",
        json={"messages": [*turns(40), *HELLO], "max_tokens": 4, "stream": True},
    ) as stream:
        assert stream.headers["x-dropped-turns"] == str(dropped)


def test_a_program_may_refuse_to_lose_turns(address):
    refused = post(address, [*turns(40), *HELLO], 400, truncation="disabled").json()["error"]
    assert refused["code"] == "context_length_exceeded" and refused["param"] == "messages"
    post(address, [*turns(2), *HELLO], truncation="disabled")


def test_a_refusal_that_is_sent_back_is_an_answer():
    part = {"type": "refusal", "refusal": "I cannot."}
    request, ignored = read_chat({"messages": [*HELLO, SAID | {"content": [part]}, *HELLO]})
    assert request.messages[1].text == "I cannot." and not ignored
    apart = SAID | {"content": None, "refusal": "I cannot."}
    request, ignored = read_chat({"messages": [*HELLO, apart, *HELLO]})
    assert request.messages[1].text == "I cannot." and not ignored
    alone = {"role": "assistant", "refusal": "I cannot."}
    request, ignored = read_chat({"messages": [*HELLO, alone, {"role": "assistant"}, *HELLO]})
    assert [m.text for m in request.messages[1:3]] == ["I cannot.", ""] and not ignored
    for message, path in (
        (HELLO[0] | {"refusal": "No."}, "messages[0].refusal"),
        (HELLO[0] | {"content": [part]}, "messages[0].content"),
        (SAID | {"content": [part | {"refusal": 1}]}, "messages[0].content[0].refusal"),
    ):
        with pytest.raises(ApiError) as refused:
            read_chat({"messages": [message, *HELLO]})
        assert refused.value.param == path


# --- numbers -------------------------------------------------------------------------------------


def test_max_tokens_is_a_ceiling(address, engine):
    """Beyond what fits, -1 and none: the answer is as long as the context allows."""
    context = engine.model.config.context

    def asked(words: int) -> list[dict]:
        return [{"role": "user", "content": "word " * words}]

    few, more = (
        post(address, asked(words), max_tokens=1).json()["usage"]["prompt_tokens"]
        for words in (100, 200)
    )
    words = 100 + 100 * (context - 60 - few) // (more - few)
    for tokens in (context, 2**40, -1, None):
        usage = post(address, asked(words), max_tokens=tokens).json()["usage"]
        assert context - 70 < usage["prompt_tokens"] < context - 40
        assert usage["completion_tokens"] > 20 and usage["total_tokens"] <= context


def test_values_that_mean_not_set_or_nearly_zero():
    body = {"max_tokens": -1, "seed": -1, "top_k": -1, "temperature": 1e-8, "stop": ["", "a"]}
    request, ignored = read_chat({"messages": HELLO, **body, "n": 1.0, "top_p": 0})
    assert (request.max_tokens, request.seed, request.top_k) == (None, None, None)
    assert request.temperature == 0 and request.stop == ["a"] and request.n == 1 and not ignored
    assert 0 < request.top_p < 0.001
    assert not read_chat({"messages": HELLO, "logit_bias": {"5": 0, "6": 0.0}})[0].logit_bias
    php = {"logit_bias": [], "stream_options": [], "tools": []}
    assert not read_chat({"messages": HELLO, **php})[1]
    renamed, _ = read_chat({"messages": HELLO, "repeat_penalty": 1.2})
    assert renamed.repetition_penalty == 1.2


def test_several_answers(address):
    drawn = post(address, n=3, temperature=1.5, seed=5).json()
    texts = [choice["message"]["content"] for choice in drawn["choices"]]
    assert [choice["index"] for choice in drawn["choices"]] == [0, 1, 2] and len(set(texts)) > 1
    assert drawn["usage"]["completion_tokens"] == 12
    alone = post(address, temperature=1.5, seed=6)
    assert text(alone) == texts[1]
    stream = client(address).chat.completions.create(
        model=MODEL, messages=HELLO, n=3, temperature=1.5, seed=5, max_tokens=4, stream=True
    )
    streamed = ["", "", ""]
    for chunk in stream:
        (choice,) = chunk.choices
        streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts


def test_the_most_likely_tokens(address):
    answer = post(address, logprobs=True, top_logprobs=5).json()
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 4
    for token in content:
        top = token["top_logprobs"]
        assert len(top) == 5
        assert [t["logprob"] for t in top] == sorted((t["logprob"] for t in top), reverse=True)
        assert top[0]["token"] == token["token"] and top[0]["logprob"] == token["logprob"]
    none = post(address, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [token["top_logprobs"] for token in none] == [[]] * 4


def test_penalties_change_what_is_repeated(address):
    def distinct(**penalties) -> int:
        answer = post(
            address, max_tokens=30, repetition_penalty=1.0, logprobs=True, **penalties
        ).json()
        content = answer["choices"][0]["logprobs"]["content"]
        return len({token["token"] for token in content})

    rewarded, punished = distinct(frequency_penalty=-2.0), distinct(presence_penalty=2.0)
    assert rewarded < distinct() <= punished


# --- JSON ----------------------------------------------------------------------------------------


class Description(BaseModel, extra="forbid"):
    colour: Literal["red", "blue", "green"]
    count: Annotated[int, Field(ge=0, le=99)]
    words: Annotated[list[Literal["box", "sky"]], Field(max_length=2)]


class Seen(BaseModel):
    colour: Literal["red", "blue"]
    count: Annotated[int, Field(ge=0, le=9)]


@pytest.mark.parametrize("temperature", [0, 2.0])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_follows_a_json_schema(address, temperature, stream):
    """Of a model with random weights, which would never write JSON."""
    wanted = {
        "type": "json_schema",
        "json_schema": {"name": "seen", "schema": Description.model_json_schema()},
    }
    asked = {"response_format": wanted, "max_tokens": 200, "temperature": temperature, "seed": 3}
    answer = client(address).chat.completions.create(
        model=MODEL, messages=ABOUT, stream=stream, **asked
    )
    if stream:
        *chunks, last = answer
        said, reason = "".join(c.choices[0].delta.content for c in chunks), last
        reason = last.choices[0].finish_reason
    else:
        said, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    Description.model_validate_json(said)
    assert reason == "stop"


def test_openais_client_parses_an_answer(address):
    answer = client(address).chat.completions.parse(
        model=MODEL, messages=ABOUT, response_format=Seen, max_tokens=200, n=2, seed=1
    )
    assert all(isinstance(choice.message.parsed, Seen) for choice in answer.choices)


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "json_object", "schema": Seen.model_json_schema()}},
        {"response_format": {"type": "json_schema", "schema": Seen.model_json_schema()}},
        {"guided_json": Seen.model_json_schema()},
        {"structured_outputs": {"json": Seen.model_json_schema()}},
    ],
    ids=["llama.cpp", "flat", "vLLM, older", "vLLM"],
)
def test_schemas_as_other_servers_take_them(address, asked):
    answer = post(address, max_tokens=200, **{"temperature": 2.0, "seed": 1} | asked)
    Seen.model_validate_json(text(answer))
    assert "x-ignored-fields" not in answer.headers


CHOICES = ["yes", "no, a/b", "more (é?)"]


@pytest.mark.parametrize(
    ("asked", "answers"),
    [
        ({"structured_outputs": {"choice": CHOICES}}, "|".join(map(re.escape, CHOICES))),
        ({"guided_choice": CHOICES}, "|".join(map(re.escape, CHOICES))),
        ({"structured_outputs": {"regex": "[a-c]{3}/[0-9]"}}, "[a-c]{3}/[0-9]"),
        ({"guided_regex": "^(one|two) cats?$"}, "(one|two) cats?"),
        ({"response_format": {"type": "regex", "value": "[0-9]{2}"}}, "[0-9]{2}"),
    ],
    ids=["vLLM, choice", "vLLM, older, choice", "vLLM", "vLLM, older", "TGI"],
)
def test_choices_and_regular_expressions_as_other_servers_take_them(address, asked, answers):
    answer = post(address, max_tokens=40, **{"temperature": 2.0, "seed": 1} | asked)
    assert re.fullmatch(answers, text(answer))
    assert answer.json()["choices"][0]["finish_reason"] == "stop"
    assert "x-ignored-fields" not in answer.headers


@pytest.mark.parametrize(
    ("reason", "expression"),
    [
        ("it is damaged, or has what Rust", "["),
        ("look-around", "(?=a)b"),
        ("back references", r"(a)\1"),
        ("in the middle", "a$b"),
        ("ends in a backslash", "a" + "\\"),
        ("no text matches it", r"[^\s\S]"),
        (f"{MAX_EXPRESSION} characters", "a" * (MAX_EXPRESSION + 1)),
    ],
)
def test_an_expression_that_cannot_be_followed_is_refused(engine, reason, expression):
    with pytest.raises(ApiError, match=re.escape(reason)) as refused:
        constraints(engine, Format(expression=expression, param="guided_regex"), 1)
    words = r"This regular expression cannot be followed: [^\n:]+\."
    assert re.fullmatch(words, str(refused.value)) and refused.value.param == "guided_regex"


def test_spaces_of_a_choice_are_kept(address):
    for choice in (" yes", "\nno"):
        assert text(post(address, structured_outputs={"choice": [choice]})) == choice


UNBOUND = {
    "json_schema": {"type": "object"},
    "ebnf": "root ::= x",
    "format": "json",
    "response_schema": {"type": "object"},
    "allowed_token_ids": [1],
    "guided_choices": ["a"],
}


def test_what_binds_an_answer_is_followed_or_refused(address):
    both = {"response_format": {"type": "text"}, "guided_json": '{"type": "object"}'}
    request, ignored = read_chat({"messages": HELLO} | both)
    assert request.response_format.type == "json_schema" and not ignored
    tgis = {"response_format": {"type": "json", "value": {"type": "object"}}}
    assert read_chat({"messages": HELLO} | tgis)[0].response_format.type == "json_schema"
    name = "disable_additional_properties"
    asked = {"structured_outputs": {"json_object": True, name: True}}
    assert read_chat({"messages": HELLO, "regex": "a+"})[0].response_format.value == "a+"
    request, ignored = read_chat({"messages": HELLO} | asked)
    assert request.response_format.type == "json_object"
    assert ignored == [f"structured_outputs.{name}"]
    for param, wrong in (
        ("structured_outputs", {"structured_outputs": ["yes"]}),
        ("structured_outputs.grammar", {"structured_outputs": {"grammar": "root ::= x"}}),
        ("grammar", {"grammar": "root ::= x"}),
        ("guided_regex", {"guided_json": {"type": "object"}, "guided_regex": "a"}),
        ("response_format.value", {"response_format": {"type": "regex", "value": 5}}),
        ("structured_outputs.choice", {"structured_outputs": {"choice": ["x" * 10_001]}}),
        ("guided_json", {"guided_json": {"type": "colour"}}),
        *((name, {name: value}) for name, value in UNBOUND.items()),
        ("structured_outputs.choices", {"structured_outputs": {"choices": ["yes"]}}),
        ("guided_choice", {"response_format": {"type": "json_object"}, "guided_choice": ["a"]}),
        ("grammar", {"response_format": {"type": "regex", "value": "a"}, "grammar": "root ::= x"}),
    ):
        assert post(address, status=400, **wrong).json()["error"]["param"] == param


def test_an_answer_may_be_any_json_object(address):
    answer = text(post(address, response_format={"type": "json_object"}, max_tokens=30))
    assert answer.startswith("{")


STRING = {"type": "string"}
ENDLESS = {"type": "object", "properties": {"c": {"$ref": "#"}}, "required": ["c"]}
# Its states are too many only after some letters.
EXPLODING = {"type": "string", "pattern": "^((([a-z]{1,90}){1,90}){1,90}){1,90}$"}


def optional(count: int, **more) -> dict:
    return {"type": "object", "properties": {f"p{i}": STRING for i in range(count)}, **more}


def nested(depth: int) -> dict:
    inner = nested(depth - 1) if depth else STRING
    return {"type": "object", "properties": {"a": inner}, "required": ["a"]}


@pytest.mark.parametrize(
    ("reason", "schema"),
    [
        ("number beyond", {"type": "integer", "minimum": 10**30, "maximum": 10**31}),
        ("number beyond", {"type": "integer", "minimum": -1e30, "maximum": -1e29}),
        ("number beyond", {"const": -(2**63)}),  # ended the whole process
        ("number beyond", {"type": "object", "properties": {"a": {"enum": [1, [2**53]]}}}),
        ("x-guidance", {"x-guidance": {"lenient": True}, **STRING}),
        ("too large or too deep", nested(70)),
        ("too large or too deep", optional(700, additionalProperties=False)),
        ("too large or too deep", optional(1500)),
        ("too large or too deep", ENDLESS),
        ("too large or too deep", {"type": "array", "items": {"$ref": "#"}, "minItems": 1}),
        ("too large or too deep", STRING | {"pattern": "a?" * 3000}),
        ("too large or too deep", {"allOf": [STRING | {"pattern": f"{c}"} for c in "abcdefghij"]}),
        ("100000 characters", STRING | {"description": "a" * 100_000}),
        ("look-around", STRING | {"pattern": "^(?=a)b"}),
        ("look-around", STRING | {"pattern": r"\bfoo"}),
        ("back reference", STRING | {"pattern": r"(a)\1"}),
        ("regular expression", STRING | {"pattern": "("}),
        ("may overlap; use anyOf", {"oneOf": [{"type": "integer"}, {"type": "number"}]}),
        ("without an end", {"$ref": "#"}),
        ("leads nowhere", {"$ref": "#/$defs/a"}),
        ("leads outside", {"$schema": "foo"}),
        ("contradict", {"enum": []}),
        ("“not” is not supported", {"not": {}}),
        ("“propertyNames” is", {"type": "object", "propertyNames": {"minLength": 2}}),
        ("“propertyNames” is", {"$defs": {"a": {}}, "items": [], "propertyNames": {"enum": ["a"]}}),
        ("“if” and “then” are", {"if": {}, "then": {}}),
        ("a type that", {"type": "colour"}),
        ("a format that", STRING | {"format": "regex"}),
        ("wrong type", STRING | {"maxLength": "5"}),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_in_our_words(engine, reason, schema):
    with pytest.raises(ApiError, match=re.escape(reason)) as refused:
        constraints(engine, Format(schema), 1)
    assert re.fullmatch(r"This format cannot be followed: [^\n:]+\.", str(refused.value))
    assert (refused.value.status, refused.value.param) == (400, "response_format")


@pytest.mark.parametrize(
    "schema",
    [
        {"const": "日本語 🐕" * 500},
        optional(400, additionalProperties=False),
        {"const": 2**53 - 1},
        {"type": "array", "items": {"$ref": "#"}},
        {"type": "object", "propertyNames": STRING, "additionalProperties": STRING},
        {"type": "object", "properties": []},
    ],
)
def test_a_schema_that_is_only_large_or_says_nothing_is_not_refused(engine, schema):
    assert constraints(engine, Format(schema), 1)


def test_a_property_may_be_called_as_a_keyword(engine):
    schema = {"properties": {"propertyNames": STRING}, "required": ["propertyNames"]}
    schema |= {"type": "object", "additionalProperties": False}
    (constraint,) = constraints(engine, Format(schema), 1)
    matcher = constraint._matcher
    assert b"propertyNames" in matcher.compute_ff_bytes()


def test_a_schema_that_fails_on_the_way_ends_the_answer_with_the_same_sentence(address, caplog):
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": EXPLODING}}
    asked = {"response_format": wanted, "max_tokens": 100}
    whole = post(address, status=400, **asked).json()["error"]
    assert whole["param"] == "response_format" and "too large or too deep" in whole["message"]
    *_, last = post(address, stream=True, **asked).text.strip().split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"] == whole
    assert "Traceback" not in caplog.text


# --- fields --------------------------------------------------------------------------------------


def test_unknown_fields_are_ignored_and_named(address):
    messages = [HELLO[0] | {"name": "Ann", "audio": None}]
    answer = post(
        address, messages, colour="red", keep_alive="5m", nothing=None, stream_options={"x\r\ny": 1}
    )
    named = answer.headers["x-ignored-fields"].split(", ")
    assert named == ["colour", "keep_alive", "stream_options.x??y", "messages[0].name"]
    parts = [
        {"type": "text", "text": "Hi", "cache_control": {"type": "ephemeral"}},
        {
            "type": "image_url",
            "image_url": {"url": data_url(picture_file()), "detail": "low", "x": 1},
        },
    ]
    answer = post(address, [{"role": "user", "content": parts}])
    named = answer.headers["x-ignored-fields"].split(", ")
    assert named == ["messages[0].content[0].cache_control", "messages[0].content[1].image_url.x"]
    assert "x-ignored-fields" not in post(address).headers


def test_fields_that_change_no_answer_are_accepted():
    fields = {"user": "Ann", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}
    assert read_chat({"messages": HELLO, **fields})[1] == []


def test_only_the_first_unknown_fields_are_named():
    _, ignored = read_chat({"messages": HELLO} | {f"field {n}": 1 for n in range(10_000)})
    assert len(ignored) == NAMED


def test_tools_that_must_not_be_called_are_ignored(address):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    answer = post(address, tools=tools, tool_choice="none")
    assert answer.headers["x-ignored-fields"] == "tools"
    answer = post(address, functions=[{"name": "weather"}], function_call="none")
    assert answer.headers["x-ignored-fields"] == "functions"
    for choice in ("auto", None):
        error = post(address, HELLO, 400, tools=tools, tool_choice=choice).json()["error"]
        assert error["param"] == "tools" and "calls no functions" in error["message"]


def test_tools_are_ignored_where_the_server_is_told_to(engine):
    """As Open WebUI sends them, with every question."""
    client = TestClient(application(engine, ignore_tools=True))
    body = {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "recall"}}]}
    for path, fields in (("chat/completions", {}), ("responses", {"input": "Hello?"})):
        for choice in ({}, {"tool_choice": "auto"}):
            answer = client.post(f"/v1/{path}", json=body | fields | choice)
            assert answer.status_code == 200
            assert "tools" in answer.headers["x-ignored-fields"].split(", ")
    must = client.post("/v1/chat/completions", json=body | {"tool_choice": "required"})
    assert must.status_code == 400 and must.json()["error"]["param"] == "tools"
    assert Server(list, options("--ignore-tools")).chat_service.ignore_tools


def test_the_models_say_what_they_take(address, engine):
    (model,) = httpx.get(address + "/v1/models").json()["data"]
    assert model["max_model_len"] == model["context_length"] == engine.model.config.context
    assert model["architecture"]["input_modalities"] == ["text", "image"]
    assert model["owned_by"] == "minigpt4"


# --- as the documentation of other programs sends it ---------------------------------------------

OPEN_WEBUI = {
    "stream": True,
    "model": MODEL,
    "messages": ABOUT,
    "stream_options": {"include_usage": True},
    "metadata": {"chat_id": "1", "features": {"web_search": False}},
    "session_id": "a",
    "chat_id": "b",
    "background_tasks": {"title_generation": True},
}
LM_STUDIO = {
    "model": MODEL,
    "messages": [{"role": "system", "content": "Always answer in rhymes."}, *HELLO],
    "temperature": 0.7,
    "max_tokens": -1,
    "stream": False,
    "top_k": 40,
    "repeat_penalty": 1.1,
    "logit_bias": {},
    "seed": -1,
    "ttl": 300,
}
OLLAMA = {
    "model": MODEL,
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What's in this image?"},
                {"type": "image_url", "image_url": URL},
            ],
        }
    ],
    "max_tokens": 300,
}

LMMS_EVAL = {  # its model "openai"
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": URL}},
                {"type": "text", "text": "Is there a box? Answer with yes or no."},
            ],
        }
    ],
    "model": MODEL,
    "max_tokens": 128,
    "temperature": 0,
    "top_p": 1.0,
}
VLMEVALKIT = {  # its GPT and LMDeploy wrappers; the latter sends no detail
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "Answer briefly."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Is there a box?"},
                {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
            ],
        },
    ],
    "max_tokens": 64,
    "n": 1,
    "temperature": 0.0,
}
PROGRAMS = {
    "Open WebUI": OPEN_WEBUI,
    "LM Studio": LM_STUDIO,
    "Ollama": OLLAMA,
    "lmms-eval": LMMS_EVAL,
    "VLMEvalKit": VLMEVALKIT,
}


@pytest.mark.parametrize("body", PROGRAMS.values(), ids=PROGRAMS)
def test_requests_as_other_programs_send_them(address, body):
    stop = {"max_tokens": 5} if body.get("max_tokens") != -1 else {"truncation": "auto"}
    content = json.dumps(body | stop)
    headers = {"Authorization": "Bearer ollama", "Content-Type": "application/json"}
    response = httpx.post(
        address + "/v1/chat/completions", content=content, headers=headers, timeout=120
    )
    assert response.status_code == 200, response.text
    if body.get("stream"):
        assert response.text.endswith("data: [DONE]\n\n") and '"usage": {' in response.text
        assert "session_id" in response.headers["x-ignored-fields"]
    else:
        assert text(response)
