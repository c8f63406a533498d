"""Client libraries that build on OpenAI's. LiteLLM is too large for the test requirements: `pip
install litellm` to try it, else its test is skipped.
"""

import asyncio

import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tests.api_case import MODEL, address_fixture, data_url, engine_fixture, picture_file

engine, address = engine_fixture(), address_fixture()
PARTS = [
    {"type": "text", "text": "What is this?"},
    {"type": "image_url", "image_url": {"url": data_url(picture_file())}},
]


class Seen(BaseModel):
    red: bool


@pytest.fixture
def chat(address):
    return ChatOpenAI(
        model=MODEL, base_url=address + "/v1", api_key="none", max_tokens=6, temperature=0
    )


def test_langchain_asks_about_a_picture(chat):
    answer = chat.invoke([("system", "Be brief."), ("human", PARTS)])
    assert answer.content and answer.usage_metadata["output_tokens"] == 6
    streamed = "".join(part.content for part in chat.stream([("human", PARTS)]))
    assert streamed == chat.invoke([("human", PARTS)]).content
    assert streamed == asyncio.run(chat.ainvoke([("human", PARTS)])).content


def test_langchain_asks_for_an_object(chat):
    chat.max_tokens = 60
    found = chat.with_structured_output(Seen, method="json_schema").invoke([("human", PARTS)])
    assert isinstance(found, Seen)
    by_function = chat.with_structured_output(Seen, method="function_calling")
    with pytest.raises(openai.BadRequestError, match="calls no functions"):
        by_function.invoke([("human", PARTS)])


def test_langchain_uses_the_responses_api(chat):
    through = chat.model_copy(update={"use_responses_api": True})
    answer = through.invoke([("human", PARTS)])
    assert answer.text == chat.invoke([("human", PARTS)]).content


def test_litellm_asks_about_a_picture(address):
    litellm = pytest.importorskip("litellm", reason="litellm is not installed")
    asked = {
        "model": f"openai/{MODEL}",
        "api_base": address + "/v1",
        "api_key": "none",
        "messages": [{"role": "user", "content": PARTS}],
        "max_tokens": 6,
        "temperature": 0,
    }
    whole = litellm.completion(**asked)
    text = whole.choices[0].message.content
    assert text and whole.usage.completion_tokens == 6
    stream = litellm.completion(**asked, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
    response = litellm.responses(
        model=asked["model"],
        input="Hello?",
        max_output_tokens=16,  # LiteLLM asks for no less
        api_base=asked["api_base"],
        api_key="none",
    )
    assert response.usage.output_tokens == 16
