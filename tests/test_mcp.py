"""--mcp: the tool as a client of the Model Context Protocol sees it."""

import asyncio
from importlib.metadata import PackageNotFoundError

import httpx
import pytest

import app
from minigpt4.errors import UserError
from minigpt4.web.api import mcp
from tests.api_case import (
    MODEL,
    at_rest,
    client,
    data_url,
    engine_fixture,
    picture_file,
    question,
    served,
)

engine = engine_fixture()
PATH = "/gradio_api/mcp/"
TOOL = "ask_about_picture"
HEADERS = {"Authorization": "Bearer sesame", "Accept": "application/json, text/event-stream"}
PICTURE = data_url(picture_file("navy"))


@pytest.fixture(scope="module")
def address(engine):
    arguments = ("--mcp", "--api-key", "sesame", "--max-upload-mb", "20")
    with served(lambda: engine, engine, *arguments) as address:
        yield address


def session(address, act):
    """What `act` returns, which is given a client's session."""
    from mcp import ClientSession
    from mcp.client.streamable_http import streamablehttp_client

    async def run():
        async with (
            streamablehttp_client(address + PATH, headers=HEADERS) as (read, write, _),
            ClientSession(read, write) as client,
        ):
            await client.initialize()
            return await act(client)

    return asyncio.run(run())


def call(address, **arguments):
    """(the answer's text, whether it is an error)"""
    arguments = {"question": "What is this?", "image": PICTURE, **arguments}
    told = session(address, lambda client: client.call_tool(TOOL, arguments))
    return told.content[0].text, told.isError


def test_it_is_the_only_tool_and_says_what_it_takes(address):
    [tool] = session(address, lambda client: client.list_tools()).tools
    assert tool.name == TOOL and "picture" in tool.description
    properties = tool.inputSchema["properties"]
    assert sorted(properties) == ["image", "max_tokens", "question"]
    assert all(described["description"] for described in properties.values())
    assert sorted(tool.inputSchema["required"]) == ["image", "question"]


def test_it_asks_as_the_api_does(address, engine, monkeypatch):
    seen = []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda request: seen.append(request) or submit(request))
    text, wrong = call(address, max_tokens=5)
    assert text and not wrong
    asked = [question("What is this?", PICTURE)]
    client(address, "sesame").chat.completions.create(model=MODEL, messages=asked, max_tokens=5)
    assert seen[0].prompt == seen[1].prompt
    assert seen[0].sampling.max_new_tokens == 5


@pytest.mark.parametrize(
    ("says", "arguments"),
    [
        ("shorten", {"question": "a " * 90_000}),
        ("fetches no pictures from the web", {"image": "http://192.0.2.1/picture.png"}),
        ("must begin with data:", {"image": "/etc/passwd"}),
        ("not a picture", {"image": data_url(b"no picture")}),
        ("at least 1", {"max_tokens": 0}),
        ("not a picture", {"image": data_url(bytes(5 * 2**20))}),  # it arrives
    ],
)
def test_what_it_refuses(address, says, arguments):
    text, wrong = call(address, **arguments)
    assert wrong and says in text, text


def test_a_request_that_is_too_large(address):
    response = httpx.post(address + PATH, content=bytes(8 * 2**20), headers=HEADERS)
    assert response.status_code == 413 and "larger than 8 MB" in response.text


def test_a_full_queue_is_said(address, engine, monkeypatch):
    def refuse():
        raise UserError("Too many people are waiting.", "queue_full")

    monkeypatch.setattr(engine, "refuse_if_full", refuse)
    assert call(address) == ("Too many people are waiting.", True)


def test_a_client_that_goes_away_ends_its_question(address, engine, monkeypatch):
    monkeypatch.setattr(engine, "pace", 0.2)
    arguments = {"question": "What is this?", "image": PICTURE, "max_tokens": 500}
    call = {"name": TOOL, "arguments": arguments}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(address + PATH, json=body, headers=HEADERS, timeout=2)
    assert at_rest(engine, 5)  # it would have taken much longer


def test_a_clients_mistakes_are_not_logged(address, caplog):
    for asked in (
        {"id": 1, "method": "tools/none"},
        {"id": 1, "method": "tools/call", "params": {"name": 5}},
        {"id": 1, "method": "tools/call", "params": {"name": "none"}},
        {"id": 1},
        {"method": "notifications/none"},
        {"method": "notifications/progress", "params": 5},
        {"id": 1, "result": {}},
        {"id": "x", "result": {}},
    ):
        body = {"jsonrpc": "2.0", **asked}
        assert httpx.post(address + PATH, json=body, headers=HEADERS).status_code < 500, asked
    assert httpx.post(address + PATH, content=b"{", headers=HEADERS).status_code == 400
    assert not caplog.messages


def test_without_the_key(address):
    for headers in ({}, {"authorization": "Bearer wrong"}):
        response = httpx.post(address + PATH, json={}, headers=headers)
        assert response.status_code == 401 and "API key is missing or wrong" in response.text


def test_only_its_own_address_is_open(address):
    assert httpx.get(address + PATH).status_code == 405
    for path in ("sse", "schema", "messages/", "http"):
        assert httpx.post(address + PATH + path, headers=HEADERS).status_code == 404


def test_without_its_package(monkeypatch, capsys):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(mcp, "version", missing)
    assert app.main(["--mcp"]) == 2
    assert "pip install 'mcp>=1.30,<2'" in capsys.readouterr().err
