"""The models that refine descriptions: behind an OpenAI-compatible endpoint, or on this machine."""

import json
from typing import TYPE_CHECKING, Protocol

from minigpt4.batch import Completion, complete, greedy
from minigpt4.conversation import Conversation, ask
from minigpt4.curation.generate import name_of
from minigpt4.errors import UserError
from minigpt4.evaluation.endpoint import Endpoint, said_by

if TYPE_CHECKING:
    from minigpt4.engine import Engine


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


class EndpointRefiner(Endpoint):
    """A model behind an OpenAI-compatible endpoint."""

    def __call__(self, request: str, max_tokens: int) -> Completion:
        import openai

        try:
            found = self.ask(request, max_tokens)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            raise UserError(f"the endpoint refused it: {said_by(error)}") from error
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise Failed(f"The endpoint refused the key ({said_by(error)}).") from error
        except openai.NotFoundError as error:
            raise Failed(f"There is no such model or address ({said_by(error)}).") from error
        except openai.APIStatusError as error:  # after the retries
            raise Failed(f"The endpoint answered {error.status_code}: {said_by(error)}") from error
        except openai.APIConnectionError as error:
            raise Failed("The endpoint does not answer at its address.") from error
        except (openai.OpenAIError, json.JSONDecodeError) as error:
            raise Failed("The endpoint did not answer with JSON.") from error
        except ValueError:  # a page
            found = None
        if found is None:
            raise Failed("The endpoint's answer contains no message: check its address (…/v1).")
        return found
