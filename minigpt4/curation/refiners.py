"""The models that refine descriptions: behind an OpenAI-compatible endpoint, or on this machine."""

import threading
from typing import TYPE_CHECKING, Any, Protocol

from minigpt4.batch import Completion, complete, greedy
from minigpt4.conversation import Conversation, ask
from minigpt4.curation.generate import name_of
from minigpt4.errors import UserError

if TYPE_CHECKING:
    from minigpt4.engine import Engine

RETRIES = 6  # after 0.5 to 8 seconds, or as Retry-After says, up to 120


class Failed(Exception):
    """No reply after all retries: one sentence. Asking again later may help."""


class Refiner(Protocol):
    """Answers one request; called from several threads at once."""

    name: str

    def __call__(self, request: str, max_tokens: int) -> Completion:
        """UserError if this request cannot be answered, Failed if none can at present."""


class LocalRefiner:
    """A model in this process; concurrent requests are answered together."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self.name = name_of(engine)

    def __call__(self, request: str, max_tokens: int) -> Completion:
        conversation = Conversation()
        conversation.add_question(request)
        return complete(ask(self._engine, conversation, greedy(max_tokens)))


class EndpointRefiner:
    """A model behind POST /chat/completions at `url`, through OpenAI's client.

    Requests set temperature 0 and a maximum length. If the endpoint refuses one of these fields,
    later requests omit it or use its newer name.
    """

    def __init__(
        self, url: str, key: str, name: str, retries: int = RETRIES, seconds: float = 120.0
    ) -> None:
        import openai

        self.name = name
        self._openai = openai
        try:
            self._client = openai.OpenAI(
                base_url=url, api_key=key or "none", max_retries=retries, timeout=seconds
            )
        except Exception as error:
            raise UserError(f"“{url}” is not an address: use http://HOST:PORT/v1.") from error
        self._lock = threading.Lock()
        self._temperature, self._limit = True, "max_tokens"

    def __call__(self, request: str, max_tokens: int) -> Completion:
        openai = self._openai
        for _ in range(3):  # one more attempt for each field that may have to change
            fields = self._fields(max_tokens)
            try:
                return self._ask(request, fields)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if not self._adapt(error, fields):
                    raise UserError(f"the endpoint refused it: {_message(error)}") from error
        raise UserError("the endpoint refuses every form of the request")

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _fields(self, max_tokens: int) -> dict[str, Any]:
        with self._lock:
            fields: dict[str, Any] = {"temperature": 0} if self._temperature else {}
            return fields | ({self._limit: max_tokens} if self._limit else {})

    def _adapt(self, error: Exception, fields: dict[str, Any]) -> bool:
        """Did the endpoint refuse a field? Then it is changed for the next attempt."""
        refusal = f"{getattr(error, 'param', '')} {_message(error)}"
        with self._lock:
            if "max_tokens" in refusal and "max_tokens" in fields:
                self._limit = "max_completion_tokens"
            elif "max_completion_tokens" in refusal and "max_completion_tokens" in fields:
                self._limit = ""
            elif "temperature" in refusal and "temperature" in fields:
                self._temperature = False
            else:
                return False
        return True

    def _ask(self, request: str, fields: dict[str, Any]) -> Completion:
        openai = self._openai
        try:
            done = self._client.chat.completions.create(
                model=self.name, messages=[{"role": "user", "content": request}], **fields
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise Failed(f"The endpoint refused the key ({_message(error)}).") from error
        except openai.NotFoundError as error:
            raise Failed(f"There is no such model or address ({_message(error)}).") from error
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            raise
        except openai.APIStatusError as error:  # after the retries
            raise Failed(f"The endpoint answered {error.status_code}: {_message(error)}") from error
        except openai.APIConnectionError as error:
            raise Failed("The endpoint does not answer at its address.") from error
        except (openai.OpenAIError, ValueError) as error:
            raise Failed("The endpoint did not answer with JSON.") from error
        choice = done.choices[0] if getattr(done, "choices", None) else None
        if choice is None or choice.message is None:
            raise Failed("The endpoint's answer contains no message: check its address (…/v1).")
        cut = choice.finish_reason == "length"
        return Completion(choice.message.content or "", "length" if cut else "stop")


def _message(error: Exception) -> str:
    """The endpoint's error message, in one short line."""
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    line = " ".join(str(said or error).split())
    return line if len(line) <= 200 else line[:200] + "…"
