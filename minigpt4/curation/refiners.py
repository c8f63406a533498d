"""Who mends a description: a model behind an OpenAI-compatible endpoint, or one on this machine."""

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from minigpt4.conversation import Conversation, ask
from minigpt4.curation.generate import name_of
from minigpt4.engine import Sampling
from minigpt4.errors import UserError

if TYPE_CHECKING:
    from minigpt4.engine import Engine

RETRIES = 6  # with back-off from half a second to eight, or as Retry-After says, 120 at most


@dataclass(frozen=True)
class Reply:
    """What came back; `cut`: a limit ended it. Tokens are 0 where they were not told."""

    text: str
    cut: bool
    prompt_tokens: int = 0
    tokens: int = 0


class Failed(Exception):
    """No reply, after all retries: one sentence. Asking again later may help."""


class Refiner(Protocol):
    """Answers one request; called from several threads at once."""

    name: str

    def __call__(self, request: str, max_tokens: int) -> Reply:
        """UserError where this request cannot be answered, Failed where none can at present."""


class LocalRefiner:
    """A model in this process; requests that come together are answered together."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self.name = name_of(engine)

    def __call__(self, request: str, max_tokens: int) -> Reply:
        conversation = Conversation()
        conversation.add_question(request)
        sampling = Sampling(0.0, 1.0, repetition_penalty=1.0, max_new_tokens=max_tokens)
        answer = ask(self._engine, conversation, sampling)
        text = "".join(answer)
        cut = answer.stop_reason != "stop"
        return Reply(text, cut, answer.stats.prompt_tokens, answer.stats.tokens)


class EndpointRefiner:
    """A model behind POST /chat/completions at `url`, by OpenAI's client.

    It asks for temperature 0 and bounds the answer; an endpoint that refuses one of these fields
    is asked without it, or by its newer name, from then on.
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
            raise UserError(f"“{url}” is no address: give one as http://HOST:PORT/v1.") from error
        self._lock = threading.Lock()
        self._temperature, self._limit = True, "max_tokens"

    def __call__(self, request: str, max_tokens: int) -> Reply:
        openai = self._openai
        for _ in range(3):  # once more for each field that may have to change
            fields = self._fields(max_tokens)
            try:
                return self._ask(request, fields)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                if not self._adapt(error, fields):
                    raise UserError(f"the endpoint refused it: {_message(error)}") from error
        raise UserError("the endpoint refuses every form of the request")

    def close(self) -> None:
        """Give the connections up."""
        self._client.close()

    def _fields(self, max_tokens: int) -> dict[str, Any]:
        with self._lock:
            fields: dict[str, Any] = {"temperature": 0} if self._temperature else {}
            return fields | ({self._limit: max_tokens} if self._limit else {})

    def _adapt(self, error: Exception, fields: dict[str, Any]) -> bool:
        """Whether the refusal is of a field that has been changed for the next try."""
        said = f"{getattr(error, 'param', '')} {_message(error)}"
        with self._lock:
            if "max_tokens" in said and "max_tokens" in fields:
                self._limit = "max_completion_tokens"
            elif "max_completion_tokens" in said and "max_completion_tokens" in fields:
                self._limit = ""
            elif "temperature" in said and "temperature" in fields:
                self._temperature = False
            else:
                return False
        return True

    def _ask(self, request: str, fields: dict[str, Any]) -> Reply:
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
            raise Failed("The endpoint answered something else than JSON.") from error
        choice = done.choices[0] if getattr(done, "choices", None) else None
        if choice is None or choice.message is None:
            raise Failed("The endpoint's answer holds no message: is its address right (…/v1)?")
        used = done.usage
        return Reply(
            choice.message.content or "",
            choice.finish_reason == "length",
            used.prompt_tokens if used else 0,
            used.completion_tokens if used else 0,
        )


def _message(error: Exception) -> str:
    """What the endpoint said, in one line that is not too long."""
    body = getattr(error, "body", None)
    said = body.get("message") if isinstance(body, dict) else None
    line = " ".join(str(said or error).split())
    return line if len(line) <= 200 else line[:200] + "…"
