"""The OpenAI-compatible endpoints, asked by OpenAI's own client on a real server."""

import asyncio
import gzip
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from pydantic import ValidationError

from minigpt4 import conversation
from minigpt4.web.api import routes
from minigpt4.web.api.body import parse_body, read_chat
from minigpt4.web.api.errors import ApiError
from minigpt4.web.api.schemas import ChatRequest
from minigpt4.web.guard import decoding
from minigpt4.web.guard.image_url import ImageUrls
from tests.api_case import (
    GREEDY,
    MODEL,
    address_fixture,
    at_rest,
    client,
    data_url,
    engine_fixture,
    picture_file,
    question,
)

engine, address = engine_fixture(), address_fixture("--max-upload-mb", "1")


@pytest.fixture(autouse=True)
def quick(engine):
    engine.pace = 0.0
    yield
    assert at_rest(engine)


@pytest.fixture
def slow(engine):
    engine.pace = 0.05


def ask(address, *messages, **settings):
    settings = {"model": MODEL, "max_tokens": 12, **GREEDY, **settings}
    return client(address).chat.completions.create(messages=list(messages), **settings)


def post(address, body, **settings) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(address + "/v1/chat/completions", content=content, timeout=60, **settings)


# --- answers -------------------------------------------------------------------------------------


def test_models(address):
    (model,) = client(address).models.list()
    assert model.id == MODEL == client(address).models.retrieve(MODEL).id
    with pytest.raises(openai.NotFoundError, match=MODEL):
        client(address).models.retrieve("gpt-4o")


def test_an_answer_about_a_picture(address):
    asked = question("What is this?", data_url(picture_file()))
    system = {"role": "system", "content": "Be brief."}
    first = ask(address, system, asked)
    (choice,) = first.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.finish_reason == "length" and first.usage.completion_tokens == 12
    assert first.usage.total_tokens == first.usage.prompt_tokens + 12
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    said = {"role": "assistant", "content": choice.message.content}
    second = ask(address, system, asked, said, question("And now?"))
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert 0 < second.usage.prompt_tokens_details.cached_tokens <= second.usage.prompt_tokens
    other = ask(address, system, question("What is this?", data_url(picture_file("red"))))
    assert other.choices[0].message.content != choice.message.content


def test_the_same_seed_gives_the_same_answer(address):
    drawn = {"temperature": 1.0, "extra_body": {"top_k": 50, "min_p": 0.001}}
    one, same, other = (
        ask(address, question("Hello?"), seed=seed, **drawn).choices[0].message.content
        for seed in (1, 1, 2)
    )
    assert one == same != other


def test_beams(address):
    answer = ask(address, question("Hello?"), extra_body={"num_beams": 3})
    assert answer.usage.completion_tokens <= 12 and answer.choices[0].message.content


@pytest.mark.usefixtures("slow")
def test_pieces_arrive_before_the_end(address, engine):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    pieces, usage, running = [], None, []
    for chunk in ask(address, question("Hello?"), **options):
        if chunk.choices:
            pieces.append(chunk.choices[0].delta.content or "")
            running.append(engine.running)
            reason = chunk.choices[0].finish_reason
        usage = chunk.usage or usage
    # The first one, with the role alone, may come before the engine has begun.
    assert running[1:5] == [1] * 4 and reason == "length"
    assert usage.completion_tokens == 12
    whole = ask(address, question("Hello?"))
    assert "".join(pieces) == whole.choices[0].message.content


def test_a_stream_that_waits_says_so(address, engine, monkeypatch):
    monkeypatch.setattr("minigpt4.web.api.reply.HEARTBEAT_SECONDS", 0.05)
    engine.pace = 0.2
    text = post(address, {"messages": HELLO, "max_tokens": 4, "stream": True}).text
    assert text.count(": waiting\n\n") >= 4 and text.endswith("data: [DONE]\n\n")
    settings = {"max_tokens": 4, "stream": True}
    chunks = list(ask(address, question("Hello?"), **settings))
    assert chunks[-1].choices[0].finish_reason == "length"


def test_stop_strings(address):
    whole = ask(address, question("Hello?")).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    (choice,) = ask(address, question("Hello?"), stop=[stop, "never said"]).choices
    assert choice.finish_reason == "stop"
    assert choice.message.content == whole[: whole.index(stop)]
    stream = ask(address, question("Hello?"), stop=stop, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == choice.message.content


def test_logprobs(address):
    (choice,) = ask(address, question("Hello?"), logprobs=True).choices
    assert len(choice.logprobs.content) == 12
    assert all(token.logprob <= 0 for token in choice.logprobs.content)
    stream = ask(address, question("Hello?"), logprobs=True, stream=True)
    streamed = [chunk.choices[0].logprobs.content for chunk in stream]
    assert sum(streamed, []) == choice.logprobs.content


@pytest.mark.usefixtures("slow")
def test_two_clients_at_once(address, engine):
    questions = [question("What is it?", data_url(picture_file(c))) for c in ("red", "tan")]
    with ThreadPoolExecutor(2) as pool:
        begun = time.monotonic()
        together = list(pool.map(lambda q: ask(address, q), questions))
        lasted = time.monotonic() - begun
    alone = [ask(address, q) for q in questions]
    texts = [answer.choices[0].message.content for answer in together]
    assert texts == [answer.choices[0].message.content for answer in alone]
    assert texts[0] != texts[1]
    assert lasted < 2 * 12 * engine.pace + 2


def test_nothing_slow_runs_on_the_event_loop(address, monkeypatch):
    """Reading 20 MB of JSON or base64 and decoding a picture would stop every stream meanwhile."""
    on_loop = {}

    def watch(owner, name):
        real = getattr(owner, name)

        def watched(*arguments):
            try:
                asyncio.get_running_loop()
                on_loop[name] = True
            except RuntimeError:
                on_loop.setdefault(name, False)
            return real(*arguments)

        monkeypatch.setattr(owner, name, watched)

    watch(routes, "parse_body"), watch(routes, "read_chat")
    watch(ImageUrls, "_decode"), watch(decoding, "load"), watch(conversation, "encode_chat")
    assert ask(address, question("What is this?", data_url(picture_file()))).choices
    names = ("parse_body", "read_chat", "_decode", "load", "encode_chat")
    assert on_loop == dict.fromkeys(names, False)


# --- ending early --------------------------------------------------------------------------------


@pytest.mark.usefixtures("slow")
def test_closing_a_stream_ends_its_request(address, engine):
    stream = ask(address, question("Hello?"), stream=True, max_tokens=500)
    for _, _ in zip(range(3), stream, strict=False):
        pass
    assert engine.running == 1
    stream.close()
    assert at_rest(engine, 1.0)


@pytest.mark.usefixtures("slow")
def test_a_client_that_leaves_ends_its_request(address, engine):
    with pytest.raises(httpx.ReadTimeout):
        body = {"messages": [question("Hello?")], "max_tokens": 500}
        body |= {"temperature": 0, "repetition_penalty": 1}  # a drawn answer may end at once
        httpx.post(address + "/v1/chat/completions", json=body, timeout=0.5)
    assert at_rest(engine, 1.0)


# --- errors --------------------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "Hello?"}]
TEXT, IMAGE = {"type": "text"}, {"type": "image_url", "image_url": 1}
AS_JSON, OBJECT = {"type": "json_schema"}, {"type": "json_object"}
NO_SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "colour"}}}
BEGUN = [*HELLO, {"role": "assistant", "content": "It"}]
TOOL = {"role": "tool", "content": "4", "tool_call_id": "1"}


def image(url) -> dict:
    return {"messages": [question("What?", url)]}


def says(content) -> dict:
    return {"messages": [{"role": "user", "content": content}]}


PART = "messages[0].content[1].image_url.url"  # the picture in a `question`


@pytest.mark.parametrize(
    ("status", "param", "sentence", "body"),
    [
        (400, "n", "n must be an integer from 1 to 8", {"n": 9}),
        (400, "n", "n must be an integer", {"n": True}),
        (400, "temperature", "temperature must be a number", {"temperature": "hot"}),
        (400, "temperature", "temperature must be a number", {"temperature": True}),
        (400, "max_tokens", "max_tokens must be", {"max_tokens": 1.5}),
        (400, "max_completion_tokens", "max_completion_tokens must", {"max_completion_tokens": 0}),
        (400, "seed", "or -1 for a new one each time.", {"seed": -2}),
        (400, "top_k", "or -1", {"top_k": -2}),
        (400, "top_p", "from 0.0 up to 1.0", {"top_p": 2}),
        (400, "logit_bias", "not supported", {"logit_bias": {"5": 0, "6": 1}}),
        (400, "max_tokens", "at least 1, or -1", {"max_tokens": -2}),
        (400, "truncation", "must be auto or disabled", {"truncation": "middle"}),
        (400, "num_beams", "num_beams must be", {"num_beams": 99}),
        (400, "stop", "a list of up to 16", {"stop": ["a"] * 17}),
        (400, "stop", "stop must be a string of up to", {"stop": 3}),
        (400, "stop[1]", "stop must be a string of up to", {"stop": ["a", 1]}),
        (400, "stop[0]", "up to 200 characters", {"stop": "a" * 201}),
        (400, "stream", "stream must be true or false", {"stream": "yes"}),
        (400, "presence_penalty", "from -2.0 up to 2.0", {"presence_penalty": 2.5}),
        (400, "frequency_penalty", "from -2.0 up to 2.0", {"frequency_penalty": -3}),
        (400, "tools", "calls no functions", {"tools": [{"type": "function"}]}),
        (400, "tool_choice", "must be", {"tool_choice": "required"}),
        (400, "response_format.type", "must be", {"response_format": {"type": "xml"}}),
        (400, "response_format", "must be", {"response_format": "json"}),
        (400, "response_format.json_schema", "is missing", {"response_format": AS_JSON}),
        (400, "response_format", "cannot be followed: ", {"response_format": NO_SCHEMA}),
        (400, "num_beams", "beam search", {"response_format": OBJECT, "num_beams": 2}),
        (400, "response_format", "continued", {"response_format": OBJECT, "messages": BEGUN}),
        (400, "top_logprobs", "from 0 to 20", {"logprobs": True, "top_logprobs": 21}),
        (400, "top_logprobs", "set logprobs to true", {"top_logprobs": 3}),
        (400, "logprobs", "beam search", {"logprobs": True, "num_beams": 2}),
        (404, "model", "no such model", {"model": "gpt-4o"}),
        (400, "model", "model must be a string", {"model": ["a"]}),
        (400, "messages", "messages must be a list", {"messages": "Hello?"}),
        (400, "messages", "at least 1 item", {"messages": []}),
        (400, "messages", "at most 1000 items", {"messages": HELLO * 1001}),
        (400, "messages[0]", "must be an object", {"messages": ["Hello?"]}),
        (400, "messages[0].role", "must be", {"messages": [{"role": "tool", "content": "x"}]}),
        (400, "messages[0].content", "is missing", {"messages": [{"role": "user"}]}),
        (400, "messages[0].content", "a string or a list of parts", says(3)),
        (400, "messages[0].content[0]", "content[0] must be", says([{}])),
        (
            400,
            "messages[0].content[0]",
            "type “video_url”, which is",
            says([{"type": "video_url"}]),
        ),
        (400, "guided_json", "must be an object", {"guided_json": "[]"}),
        (400, "guided_regex", "must be a string", {"guided_regex": {}}),
        (400, "guided_choice", "must be a list of texts", {"guided_choice": []}),
        (400, "guided_choice", "must be a list of texts", {"guided_choice": ["yes", 1]}),
        (400, "response_format.value", "is missing", {"response_format": {"type": "regex"}}),
        (
            400,
            "structured_outputs.json",
            "must be an object",
            {"structured_outputs": {"json": "{"}},
        ),
        (400, "messages[0].content[0].text", "must be a string", says([{**TEXT, "text": 1}])),
        (400, "messages[0].content[0].image_url", "be a URL or an object", says([IMAGE])),
        (400, "messages[0].content[0].image_url", "be a URL", says([{**IMAGE, "image_url": []}])),
        (400, "messages[0].role", "role is missing: add it", {"messages": [{"content": "Hi"}]}),
        (400, "repeat_penalty", "repeat_penalty must be", {"repeat_penalty": 0}),
        (400, "messages[0].role", "tools are not supported", {"messages": [TOOL]}),
        (
            400,
            "messages[0].tool_calls",
            "supported",
            {"messages": [{**HELLO[0], "tool_calls": [1]}]},
        ),
        (400, "messages[0].content", "is empty", says(" ")),
        (400, "messages", "a user's message", {"messages": [{**HELLO[0], "role": "assistant"}]}),
        (400, "messages", "a user's message", {"messages": [{**HELLO[0], "role": "system"}]}),
        (400, "messages", "at most 16 pictures", {"messages": [question("?", *["data:"] * 17)]}),
        (400, "messages[0].images", "as a part", {"messages": [HELLO[0] | {"images": ["AAAA"]}]}),
        (400, "images", "as a part", {"images": "AAAA"}),
        (400, "image_data", "as a part", {"image_data": [{"data": "AAAA", "id": 10}]}),
        (400, "messages[0].image_url", "as a part", {"messages": [HELLO[0] | {"image_url": "x"}]}),
        (
            400,
            "messages[0].content[0].image_url",
            "as a part",
            says([{**TEXT, "text": "What?", "image_url": {"url": "data:"}}]),
        ),
        (400, "messages", "tokens, and at most 1999 fit; shorten it.", says("word " * 3000)),
        (400, "messages", "characters", says("x" * 200_001)),
        (400, PART, "fetches no pictures", image("http://127.0.0.1:9/a.png")),
        (400, PART, "must begin with data:", image("file:///etc/passwd")),
        (400, PART, "is base64 alone", image("iVBORw0KGgo" + "A" * 100_000)),
        (400, PART, "must read data:", image("data:image/png,abc")),
        (400, PART, "base64 has a “*” in it", image("data:image/png;base64,****")),
        (400, PART, "not a picture", image("data:image/png;base64,AAAA")),
        (413, PART, "larger than 1 MB", image("data:image/png;base64," + "A" * 1_400_000)),
        (413, None, "The request is larger", image("data:image/png;base64," + "A" * 4_000_000)),
    ],
)
@pytest.mark.trust("Text", "empty or too long")
@pytest.mark.trust("Protocol", "unknown fields, wrong types, numbers beyond any float")
def test_what_cannot_be_asked(address, status, param, sentence, body):
    response = post(address, {"messages": HELLO, "max_tokens": 5, **body})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param)
    assert sentence in error["message"] and error["message"].endswith((".", "}}."))
    assert error["type"] == "invalid_request_error" and error["message"].count("\n") == 0


def test_every_error_of_pydantic_has_a_sentence_of_ours():
    """Whatever is put in the place of whatever is sound."""
    sound = {"messages": [question("Hello?", "data:")], "stop": ["a"], "stream_options": {}}
    odd = [None, True, 0, -1, 1.5, 10**400, float("inf"), "", "x", "\ud800", b"x", [], [[]], {}]
    for path in paths(sound | dict.fromkeys(ChatRequest.model_fields.keys() - sound.keys())):
        for value in odd:
            body = changed(sound, path, value)
            try:
                read_chat(body)
            except ApiError as error:
                assert "wrong value" not in str(error), (path, value)
                assert not re.search("Input|valid|pydantic", str(error)), (path, value)


@pytest.mark.parametrize(
    "body",
    [
        says([{}] * 10_000),
        {"messages": [{}] * 1000},
        {"messages": HELLO, "stop": [1] * 10_000},
        {"messages": HELLO, "modalities": [1] * 10_000},
    ],
    ids=["parts", "messages", "stops", "modalities"],
)
def test_a_request_with_thousands_of_mistakes_is_refused_at_the_first_ones(body):
    """An object for each of millions of mistakes would take gigabytes."""
    with pytest.raises(ValidationError) as refused:
        ChatRequest.model_validate(body)
    assert refused.value.error_count() < 10


def paths(value, path=()) -> list[tuple]:
    """Where everything in JSON data stands."""
    if not isinstance(value, dict | list):
        return [path]
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    return [path] * bool(path) + [p for k, v in inner for p in paths(v, (*path, k))]


def changed(data, path, value):
    """A copy of the data with another value at that path."""
    if not path:
        return value
    copy = data.copy()
    old = data[path[0]] if isinstance(data, list) else data.get(path[0])
    copy[path[0]] = changed(old, path[1:], value)
    return copy


NUMBERS = [
    name
    for name, field in ChatRequest.model_fields.items()
    if field.annotation in (int | None, float | None, bool | None)
]


@pytest.mark.parametrize("digits", ["1" + "0" * 400, "1e400"])
@pytest.mark.parametrize("sign", ["", "-"])
@pytest.mark.trust("Protocol", "unknown fields, wrong types, numbers beyond any float")
def test_numbers_that_no_float_holds(address, sign, digits):
    fields = {name: f'"{name}": {sign}{digits}' for name in NUMBERS}
    fields["stream_options.include_usage"] = (
        f'"stream_options": {{"include_usage": {sign}{digits}}}'
    )
    ceilings = {
        name for name in fields if name.startswith("max_") and not sign and "e" not in digits
    }
    for name, field in fields.items():
        response = post(address, f'{{"messages": {json.dumps(HELLO)}, {field}}}'.encode())
        if name in ceilings:  # as many as fit
            assert response.status_code == 200, name
            continue
        assert response.status_code == 400, name
        assert response.json()["error"]["message"].startswith(name), name


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"seed": NaN}',
        b"1" * 9999,
    ],
    ids=lambda body: repr(body[:10]),
)
@pytest.mark.trust("Protocol", "deep JSON; too many parts and headers")
def test_bodies_that_are_no_json_object(address, body):
    response = post(address, body)
    assert response.status_code == 400 and "JSON" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("sentence", "body"),
    [
        ("is empty", b" "),
        ("is not UTF-8", '{"a": "é"}'.encode("latin-1")),
        ("is not UTF-8", b'{"a": "\xed\xa0\x80"}'),
        ("is compressed", gzip.compress(b"{}", mtime=0)),
        ("is form data", b"messages=Hello&n=1"),
        ("is form data", b"--boundary\r\nContent-Disposition: form-data"),
        ("has NaN", b'{"seed": NaN}'),
        ("has Infinity", b'{"seed": Infinity}'),
        ("too many digits", b'{"seed": ' + b"1" * 5000 + b"}"),
        ("too deeply", b'{"a":' * 50_000),
        ("line 2, column 2", b'{"a":\n x}'),
        ("a JSON object", b"[]"),
        ("a.b[1] is a number that is too large", b'{"a": {"b": [1, -1e999]}}'),
    ],
    ids=lambda value: repr(value[:20]),
)
def test_what_is_wrong_with_a_body_is_said(sentence, body):
    with pytest.raises(ApiError, match=re.escape(sentence)) as refused:
        parse_body(body)
    assert re.fullmatch(r"[^\n]+: [^\n]+\.|The body must be a JSON object\.", str(refused.value))


def test_the_last_of_two_fields_of_a_name_counts():
    assert parse_body(b'{"n": 1, "n": 2}') == {"n": 2}


def test_a_compressed_body_is_refused(address):
    body = gzip.compress(json.dumps({"messages": HELLO}).encode())
    response = post(address, body, headers={"Content-Encoding": "gzip"})
    assert response.status_code == 400 and "Content-Encoding" in response.json()["error"]["message"]
    assert post(address, {"messages": []}, headers={"Content-Encoding": ""}).json()["error"][
        "param"
    ]


@pytest.mark.trust("Text", "emoji, right-to-left text, lone surrogates, NUL, control characters")
def test_halves_of_characters_are_no_fault(address):
    body = {"messages": [{"role": "user", "content": "Hello \ud800?"}], "max_tokens": 3}
    assert post(address, body).status_code == 200
    assert post(address, body | {"\udfff": 1}).headers["x-ignored-fields"] == "?"


def test_unknown_endpoints_and_methods(address):
    for path, status in (("/v1/embeddings", 404), ("/v1", 404), ("/v1/chat/completions", 405)):
        response = httpx.get(address + path, follow_redirects=True)
        assert response.status_code == status and response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "sentence"),
    [
        ("POST", "/chat/completions", 404, "use /v1/chat/completions, with a base URL"),
        ("POST", "/v1/chat/completions/", 404, "use /v1/chat/completions."),
        ("POST", "/v1/v1/responses", 404, "use /v1/responses."),
        ("GET", "/v1/models/", 404, "use /v1/models."),
        ("GET", "//v1/models", 404, "use /v1/models,"),
        ("POST", "/api/chat", 404, "use /v1/chat/completions,"),
        ("GET", "/api/tags", 404, "use /v1/models,"),
        ("GET", "/health", 404, "use /healthz or /readyz."),
        ("GET", "/nothing", 404, "/v1/openapi.json lists"),
        ("POST", "/healthz", 405, "takes GET or HEAD only"),
        ("MAKE", "/v1/models", 405, "takes GET only"),
        ("POST", "/v1/models/Nano", 405, "takes GET only"),
        ("GET", "/v1/responses/resp_1", 404, "keeps no responses"),
        ("DELETE", "/v1/responses/resp_1", 404, "keeps no responses"),
        ("POST", "/v1/responses/resp_1/cancel", 404, "keeps no responses"),
        ("POST", "/v1/responses/input_tokens", 404, "openapi.json lists"),
        ("GET", "/v1/models/nope", 404, f"ask for “{MODEL}”."),
        ("POST", "/api/v1/chat/completions", 404, "use /v1/chat/completions, with a base URL"),
        ("POST", "/openai/v1/responses", 404, "use /v1/responses, with a base URL"),
        ("POST", "/v1/chat/completion", 404, "use /v1/chat/completions."),
        ("POST", "/v1/chat", 404, "use /v1/chat/completions."),
        ("GET", "/V1/Models", 404, "use /v1/models,"),
        ("GET", "/v1/chat/completions/models", 404, "use /v1/models, with a base URL that ends"),
        (
            "POST",
            "/openai/deployments/nano/chat/completions?api-version=1",
            404,
            "use /v1/chat/completions, with a base URL that ends in /v1.",
        ),
        ("POST", "/v1/messages", 404, "use /v1/chat/completions."),
    ],
)
def test_the_endpoint_that_is_meant_is_said(address, method, path, status, sentence):
    response = httpx.request(method, address + path)
    error = response.json()["error"]
    assert response.status_code == status and sentence in error["message"]
    assert status != 405 or "GET" in response.headers["allow"]


def test_the_pages_own_addresses_keep_gradios_errors(address):
    response = httpx.get(address + "/gradio_api/nothing")
    assert response.status_code == 404 and response.json() == {"detail": "Not Found"}


def test_programs_find_the_apis_description_at_the_root(address):
    found = [httpx.get(address + path).json() for path in ("/openapi.json", "/v1/openapi.json")]
    assert found[0] == found[1] and found[0]["info"]["title"] == "MiniGPT-4"


@pytest.mark.usefixtures("slow")
def test_a_full_queue(address, engine, monkeypatch):
    monkeypatch.setattr(engine, "max_running", 0)
    monkeypatch.setattr(engine, "max_waiting", 0)
    before = engine.totals.errors["queue_full"]
    with pytest.raises(openai.RateLimitError, match="waiting") as caught:
        ask(address, question("Hello?"))
    assert int(caught.value.response.headers["retry-after"]) > 0
    assert engine.totals.errors["queue_full"] == before + 1


def test_a_slash_after_a_models_name(address):
    assert httpx.get(f"{address}/v1/models/{MODEL}/").json()["id"] == MODEL


def test_more_answers_than_there_are_places(address, engine, monkeypatch):
    monkeypatch.setattr(engine, "max_running", 1)
    monkeypatch.setattr(engine, "max_waiting", 1)
    assert len(ask(address, question("Hello?"), n=2).choices) == 2
    with pytest.raises(openai.BadRequestError, match="ask for 2"):
        ask(address, question("Hello?"), n=3)


def test_a_fault_is_one_sentence(address, engine, monkeypatch, caplog):
    def fail(_):
        raise RuntimeError("CUDA out of cheese")

    monkeypatch.setattr(engine.decoder, "forward", fail)
    with pytest.raises(openai.InternalServerError, match="went wrong") as caught:
        ask(address, question("Hello?"))
    with pytest.raises(openai.APIError, match="went wrong"):
        list(ask(address, question("Hello?"), stream=True))
    assert "cheese" not in caught.value.response.text and "cheese" in caplog.text
    assert not re.search("Traceback|File ", caught.value.response.text)
