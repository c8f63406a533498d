"""Step 2, refine: another model mends each description; what is of no use leaves it as it is."""

import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from minigpt4.curation.filters import refusal, words
from minigpt4.curation.refiners import Failed, Refiner, Reply
from minigpt4.errors import UserError
from minigpt4.evaluation.metrics import is_fragment

MESSAGE_TOKENS = 8  # what a chat format adds to a request, about
GIVE_UP_AFTER = 5  # requests in a row that failed after all their retries
MIN_SHARE, MAX_SHARE = 0.3, 1.3  # of the description's words that a mended one may have
NEW_WORDS = 0.3  # share of a mended one's words that may be new to it


@dataclass(frozen=True)
class Estimate:
    """What refining will take, before it starts: four bytes of text are counted as a token."""

    requests: int
    prompt_tokens: int
    answer_tokens: int

    def cost(self, price_in: float, price_out: float) -> float:
        """In the prices' currency; they are per million tokens."""
        return (self.prompt_tokens * price_in + self.answer_tokens * price_out) / 1e6


def estimate(texts: Sequence[str], instruction: str) -> Estimate:
    """Of one request a text, whose answer is as long as the text."""
    asked = len(texts) * (_tokens(instruction) + MESSAGE_TOKENS)
    said = sum(map(_tokens, texts))
    return Estimate(len(texts), asked + said, said)


def _tokens(text: str) -> int:
    return math.ceil(len(text.encode("utf-8", "replace")) / 4)


def refine(
    refiner: Refiner, records: Sequence[dict], instruction: str, together: int = 4
) -> Iterator[dict | Failed]:
    """Records with the mended text, as they come; Failed for one that has no reply.

    A record gets `before`, the text as it was; `refined`, "changed", "same" or "kept: " and why;
    `refiner`; and `refine_prompt`, the instruction. `together`: requests under way at once. After
    several failures in a row it ends with the last one's sentence, as a UserError.
    """
    waiting = iter(records)
    running: dict[Future[Reply], dict] = {}
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
                        raise UserError(f"{outcome} What is done is kept: run it again to go on.")
                    yield outcome
                    continue
                failed_in_a_row = 0
                made_by = {"refiner": refiner.name, "refine_prompt": instruction}
                yield _refined(record, outcome) | made_by
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _outcome(future: Future[Reply]) -> Reply | UserError | Failed:
    try:
        return future.result()
    except Failed as error:
        return error
    except UserError as error:
        # Of this text alone: too long, say. Of the engine itself, any later one would fail as well.
        return error if error.kind in ("request", "too_long") else Failed(str(error))


def _refined(record: dict, outcome: Reply | UserError) -> dict:
    before = record["text"]
    if isinstance(outcome, UserError):
        mended, why = before, str(outcome)
    else:
        mended = tidy(outcome.text)
        why = useless(before, mended, outcome.cut)
    if why:
        text, result = before, f"kept: {why}"
    else:
        text, result = mended, "same" if mended == before else "changed"
    # What was cut is whole again only where it was mended to a sentence's end.
    cut = record.get("cut", False) and (result != "changed" or is_fragment(text, True))
    return record | {"text": text, "cut": cut, "before": before, "refined": result}


def tidy(answer: str) -> str:
    """An answer without quotation marks around it, and without a line in front that ends in ":"
    and has an empty one behind it."""
    answer = answer.strip()
    heading, gap, rest = answer.partition("\n\n")
    if gap and "\n" not in heading and heading.rstrip("* ").endswith(":"):
        answer = rest.strip()
    marks = re.fullmatch(r'(["“«])([^"“”«»]*)(["”»])', answer, re.DOTALL)
    return (marks[2] if marks else answer).strip()


def useless(before: str, mended: str, cut: bool) -> str:
    """Why an answer cannot stand in the description's place; "" where it can."""
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
    # What repeats itself may become much shorter: its different words are what counts.
    if len(set(now)) < MIN_SHARE * len(known):
        return "the answer left too much out"
    return ""
