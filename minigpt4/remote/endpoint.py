"""A model behind an OpenAI-compatible API, which judges answers or refines descriptions."""

import re
from importlib.util import find_spec
from typing import Any

from minigpt4.batch import Completion
from minigpt4.errors import UNUSABLE_PROXY, UserError

_PLAIN = re.compile(r"https?://(\w[\w.-]{0,250}|\[[\da-f:]+\])(:\d{1,5})?(/[!-~]{0,1000})?")
LIMITS = ("max_tokens", "max_completion_tokens")  # an answer's length, by its older and newer name


class Refused(ValueError):
    """An error message in place of an answer, with the status of a success."""


class Endpoint:
    """POST /chat/completions below `url`, through OpenAI's client; may be used by several threads.

    retries: of a failed request, after 0.5 to 8 seconds, or as Retry-After says, up to 120.
    seconds: for one answer. UserError if the library is missing, or if `url` or the environment's
    proxies cannot be used.

    Requests set temperature 0 and, if it is given, a maximum length. If the endpoint refuses one of
    these fields, later requests omit it or use its newer name.
    """

    def __init__(self, url: str, key: str, name: str, retries: int, seconds: float) -> None:
        if find_spec("openai") is None:
            raise UserError("Install openai first: pip install 'minigpt4[train]'.")
        import openai

        self.url, self.name = url, name
        try:
            self._client = openai.OpenAI(
                base_url=url, api_key=key or "none", max_retries=retries, timeout=seconds
            )
        except Exception as error:
            sentence = f"“{url}” is not an address: use http://HOST:PORT/v1."
            if _PLAIN.fullmatch(url):
                sentence = UNUSABLE_PROXY
            raise UserError(sentence) from error
        self._refused: set[str] = set()  # fields

    def ask(self, content: str | list[dict], max_tokens: int | None = None) -> Completion | None:
        """The answer to one message; None if the reply has none.

        Raises openai's errors, after all retries; `Refused`; ValueError if the reply is not a chat
        completion, for example because the address is that of a page.
        """
        import openai

        message: Any = {"role": "user", "content": content}
        while True:
            fields = self._fields(max_tokens)
            try:
                done = self._client.chat.completions.create(
                    model=self.name, messages=[message], **fields
                )
                break
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                refusal = f"{error.param} {said_by(error)}"
                refused = next((name for name in fields if name in refusal), None)
                if refused is None:
                    raise
                self._refused.add(refused)
        if said := getattr(done, "error", None):
            raise Refused(_short(said.get("message", said) if isinstance(said, dict) else said))
        if not hasattr(done, "choices"):
            raise ValueError("no chat completion")
        return _completion(done)

    def _fields(self, max_tokens: int | None) -> dict[str, Any]:
        limits = [name for name in LIMITS if name not in self._refused and max_tokens]
        fields: dict[str, Any] = dict.fromkeys(limits[:1], max_tokens)
        return fields if "temperature" in self._refused else fields | {"temperature": 0}

    def close(self) -> None:
        """Close the connections."""
        self._client.close()


def _completion(reply: Any) -> Completion | None:
    """The first answer in a reply, which may have any form; None if there is none. Its text may be
    in parts."""
    choice = reply.choices[0] if isinstance(reply.choices, list) and reply.choices else None
    message: Any = getattr(choice, "message", None)
    if not hasattr(message, "content"):
        return None
    content = message.content or ""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    if not isinstance(content, str):
        return None
    cut = getattr(choice, "finish_reason", None) == "length"
    return Completion(encodable(content), "length" if cut else "stop")


def encodable(text: str) -> str:
    """A text without lone surrogates, which JSON may hold, but UTF-8 cannot encode."""
    return text.encode("utf-8", "replace").decode("utf-8")


def said_by(error: Exception) -> str:
    """The endpoint's error message, in one short line."""
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    return _short(said or error)


def _short(said: object) -> str:
    line = " ".join(encodable(str(said)).split())
    return line if len(line) <= 200 else line[:200] + "…"
