"""A JSON schema -> what an answer's tokens must keep to, by the library llguidance."""

import functools
import json
from typing import TYPE_CHECKING, Any

import numpy as np

from minigpt4.engine import AnyEngine
from minigpt4.errors import UserError
from minigpt4.model.prompt import stop_ids
from minigpt4.web.api.errors import ApiError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CHARACTERS = 100_000  # of a schema
PARAM = "response_format"
MISSING = (
    "response_format needs the package llguidance: the operator must install it. Leave it out."
)
# Without line breaks and indentation, in which a small model could go on for ever.
COMPACT: Any = {"whitespace_flexible": False}


class JsonConstraint:
    """A `Constraint`: the answer is JSON that follows a schema, and then ends."""

    def __init__(self, matcher: "LLMatcher") -> None:
        self._matcher = matcher

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """The logits [vocabulary], -inf for tokens that may not come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if error := self._matcher.get_error():
            raise RuntimeError(error)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little")[: len(logits)])
        masked = np.full_like(logits, -np.inf)
        masked[allowed] = logits[allowed]
        return masked

    def accept(self, token: int) -> None:
        """This token comes next."""
        self._matcher.consume_token(token)


def json_constraint(engine: AnyEngine, schema: dict[str, Any]) -> JsonConstraint:
    """For one answer. ApiError where the schema cannot be followed."""
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise ApiError(MISSING, param=PARAM) from None
    tokenizer = engine.model.tokenizer
    ends = tuple(sorted(stop_ids(engine.model.config.template, tokenizer)))
    vocabulary = _vocabulary(tokenizer, ends)
    content = json.dumps(schema)
    if len(content) > MAX_CHARACTERS:
        sentence = f"The schema has more than {MAX_CHARACTERS} characters: shorten it."
        raise ApiError(sentence, param=PARAM)
    grammar = LLMatcher.grammar_from_json_schema(content, overrides=COMPACT)
    matcher = LLMatcher(vocabulary, grammar, log_level=0)
    matcher.compute_bitmask()  # some mistakes show only here, such as endless recursion
    if error := matcher.get_error():
        raise ApiError(f"This schema cannot be followed: {_line(error)}.", param=PARAM)
    return JsonConstraint(matcher)


@functools.lru_cache(maxsize=1)  # takes seconds
def _vocabulary(tokenizer: Any, ends: tuple[int, ...]) -> "LLTokenizer":
    from llguidance import LLTokenizer

    try:
        content = tokenizer.backend_tokenizer.to_str()
    except AttributeError:  # of a tokenizer that the tokenizers library does not read
        raise UserError("response_format is not available with this model's tokenizer.") from None
    return LLTokenizer(content, eos_token=[*ends])


def _line(text: str) -> str:
    """The first line of another library's message, cut, without its full stop."""
    first = text.strip().partition("\n")[0][:200]
    return "".join(c for c in first if c.isprintable()).rstrip(". ")
