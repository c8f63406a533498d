"""Step 2, refine: another model corrects each description; unusable answers are discarded."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from minigpt4.batch import Completion, complete, greedy
from minigpt4.conversation import Conversation, ask
from minigpt4.curation.filters import refusal, words
from minigpt4.curation.generate import name_of
from minigpt4.errors import UserError
from minigpt4.evaluation.metrics import is_fragment
from minigpt4.remote.endpoint import Endpoint, Refused, said_by

if TYPE_CHECKING:
    from minigpt4.engine import Engine

MESSAGE_TOKENS = 8  # added by a chat format to each request, about
GIVE_UP_AFTER = 5  # consecutive requests that failed after all retries
MIN_SHARE, MAX_SHARE = 0.3, 1.3  # length of an answer, as a share of the description's words
NEW_WORDS = 0.3  # share of an answer's words that may be new


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
        return complete(ask(self._engine, Conversation.asking(request), greedy(max_tokens)))


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
            raise Failed(f"No endpoint answers at {self.url}: check “--url”.") from error
        except (openai.OpenAIError, json.JSONDecodeError) as error:
            raise Failed("The endpoint did not answer with JSON.") from error
        except Refused as error:
            raise Failed(f"The endpoint answered with an error ({error}).") from error
        except ValueError:  # a page
            found = None
        if found is None:
            raise Failed("The endpoint's answer contains no message: check its address (…/v1).")
        return found


@dataclass(frozen=True)
class Estimate:
    """The estimated work of refining. Four bytes of text count as one token."""

    requests: int
    prompt_tokens: int
    answer_tokens: int

    def cost(self, price_in: float, price_out: float) -> float:
        """The cost, in the currency of the prices, which are per million tokens."""
        return (self.prompt_tokens * price_in + self.answer_tokens * price_out) / 1e6


def estimate(texts: Sequence[str], instruction: str) -> Estimate:
    """The estimate for one request per text, with an answer of the same length."""
    asked = len(texts) * (_tokens(instruction) + MESSAGE_TOKENS)
    said = sum(map(_tokens, texts))
    return Estimate(len(texts), asked + said, said)


def _tokens(text: str) -> int:
    return math.ceil(len(text.encode("utf-8", "replace")) / 4)


def refine(
    refiner: Refiner, records: Sequence[dict], instruction: str, together: int = 4
) -> Iterator[dict | Failed]:
    """Records with the refined text, as soon as they are ready; Failed for one without a reply.

    A record gets `before`, the original text; `refined`: "changed", "same", or "kept: " and the
    reason; `refiner`; and `refine_prompt`, the instruction. together: concurrent requests.
    UserError after several consecutive failures.
    """
    waiting = iter(records)
    running: dict[Future[Completion], dict] = {}
    failed_in_a_row = 0
    pool = ThreadPoolExecutor(together, "refine")
    try:
        while True:
            for record in waiting:
                request = f"{instruction}\n\n{record['text']}"
                limit = 2 * _tokens(record["text"]) + 64
                running[pool.submit(refiner, request, limit)] = record
                if len(running) >= together:
                    break
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                record = running.pop(future)
                outcome = _outcome(future)
                if isinstance(outcome, Failed):
                    failed_in_a_row += 1
                    if failed_in_a_row == GIVE_UP_AFTER:
                        raise UserError(
                            f"{outcome} Results so far are saved: run it again to resume."
                        )
                    yield outcome
                    continue
                failed_in_a_row = 0
                made_by = {"refiner": refiner.name, "refine_prompt": instruction}
                yield _refined(record, outcome) | made_by
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _outcome(future: Future[Completion]) -> Completion | UserError | Failed:
    try:
        return future.result()
    except Failed as error:
        return error
    except UserError as error:
        # Other errors do not depend on this text (as on its length): later requests would fail,
        # too.
        return error if error.kind in ("request", "too_long") else Failed(str(error))


def _refined(record: dict, outcome: Completion | UserError) -> dict:
    before = record["text"]
    if isinstance(outcome, UserError):
        mended, why = before, str(outcome)
    else:
        mended = tidy(outcome.text)
        why = useless(before, mended, outcome.truncated)
    if why:
        text, result = before, f"kept: {why}"
    else:
        text, result = mended, "same" if mended == before else "changed"
    # A truncated text is complete again only if the refined one ends with a sentence.
    cut = record.get("cut", False) and (result != "changed" or is_fragment(text, True))
    return record | {"text": text, "cut": cut, "before": before, "refined": result}


def tidy(answer: str) -> str:
    """An answer without quotation marks around it, and without a first line that ends in ":" and is
    followed by an empty line."""
    answer = answer.strip()
    heading, gap, rest = answer.partition("\n\n")
    if gap and "\n" not in heading and heading.rstrip("* ").endswith(":"):
        answer = rest.strip()
    marks = re.fullmatch(r'(["“«])([^"“”«»]*)(["”»])', answer, re.DOTALL)
    return (marks[2] if marks else answer).strip()


def useless(before: str, mended: str, cut: bool) -> str:
    """Why an answer cannot replace the description; "" if it can."""
    was, now = words(before), words(mended)
    if not now:
        return "the answer was empty"
    if cut:
        return "the answer was cut off"
    if refusal(mended):
        return "the answer was a refusal"
    if len(now) > MAX_SHARE * len(was) + 5:
        return "the answer was much longer"
    known = set(was)
    if sum(word not in known for word in now) > NEW_WORDS * len(now):
        return "the answer said other things"
    # A repetitive text may become much shorter, so only different words count.
    if len(set(now)) < MIN_SHARE * len(known):
        return "the answer omitted too much"
    return ""
