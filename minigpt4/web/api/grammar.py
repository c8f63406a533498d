"""A JSON schema or a regular expression -> a constraint on an answer's tokens, by the library
llguidance."""

import functools
import json
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from minigpt4.engine import AnyEngine
from minigpt4.errors import UserError
from minigpt4.model.prompt import stop_ids
from minigpt4.web.api.errors import ApiError, quotable

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CHARACTERS = 100_000  # of a schema
# Characters of a regular expression, whose optional parts cost the square of their number in time
# and memory; characters of choices.
MAX_EXPRESSION, MAX_CHOICES = 2_000, 10_000
PARAM = "response_format"
MISSING = (
    "response_format needs the package llguidance: the operator must install it. Leave it out."
)
# No line breaks and indentation: a small model could write these for ever.
COMPACT: Any = {"whitespace_flexible": False}
MAX_NUMBER = 2**53 - 1  # the library rounds larger ones, and -2**63 ends the process
FIRST_BYTES = 200  # of the text that every answer begins with: tried before an answer is started
TOO_LARGE = "it is too large or too deep; simplify it"
# Part of the library's message -> our message. The first match counts.
REASONS = {
    "lexer precomputation": TOO_LARGE,
    "look-around, including": "it has a regular expression with look-around; write it without",
    "lookarounds not supported": "it has a regular expression with look-around or \\b; write it "
    "without",
    "backreferences are": "it has a regular expression with a back reference; write it without",
    "regex parse error": "a regular expression, length or number is damaged or too large; "
    "correct it",
    "oneOf constraints": "oneOf is not supported where its options may overlap; use anyOf",
    "nsatisfiable": "its conditions contradict each other; correct them",
    "NoExtension": "it refers to itself without an end; give it one",
    "circular references": "it refers to itself without an end; give it one",
    "Pointer '": "a $ref leads nowhere; correct it",
    "Resource '": "its $ref or $schema leads outside; send all of it in one schema",
    "Invalid type": "it has a type that JSON Schema does not have; correct it",
    "Unknown format": "it has a format that is not supported; leave it out",
    "Expected ": "a keyword has a value of the wrong type; correct it",
    "Failed to generate regex": "it has a range of numbers that is too large; narrow it",
    "multipleOf": "its multipleOf is not supported; leave it out",
    **dict.fromkeys(
        ("oo many", "Current row", "too large", "too big", "Unable to determine"), TOO_LARGE
    ),
}
# The same for a regular expression.
DAMAGED = (
    "it is damaged, or has what Rust's regular expressions lack, such as (?>…); correct it or "
    "write it without"
)
OF_EXPRESSIONS = {
    "lexer precomputation": TOO_LARGE,
    "look-around, including": "look-around is not supported; write it without",
    "lookarounds not supported": "\\b, and ^ or $ in the middle, are not supported; leave them out",
    "backreferences are": "back references are not supported; write it without",
    "NoExtension": "no text matches it; correct it",
    **dict.fromkeys(("oo many", "too large", "too big", "Unable to determine"), TOO_LARGE),
}
# Keywords that hold names as keys, and keywords whose values are not schemas.
NAMING = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
VALUES = ("const", "enum", "default", "examples")
OTHER_REASON = "it has something that is not supported; simplify it"

log = logging.getLogger(__name__)


class FormatConstraint:
    """A `Constraint`: the answer follows a schema or an expression, and then ends.

    An ApiError ends the answer if the format turns out to be too large.
    """

    def __init__(self, matcher: "LLMatcher", param: str) -> None:
        self._matcher, self._param = matcher, param

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """The logits [vocabulary], -inf for tokens that may not come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(bits, bitorder="little")[: len(logits)])
        self._check(len(allowed) > 0)
        masked = np.full_like(logits, -np.inf)
        masked[allowed] = logits[allowed]
        return masked

    def accept(self, token: int) -> None:
        """Note that this token was chosen."""
        self._check(self._matcher.consume_token(token))

    def _check(self, followed: bool) -> None:
        if error := self._matcher.get_error():
            log.warning("An answer's format could not be followed on: %s", _line(error))
        if error or not followed:
            raise ApiError(f"This format cannot be followed: {TOO_LARGE}.", param=self._param)


@dataclass(frozen=True)
class Format:
    """The form of an answer: JSON that follows `schema`, or a text that `expression` matches as a
    whole. param: the request's field that asks for it."""

    schema: dict[str, Any] | None = None
    expression: str | None = None
    most: int = MAX_EXPRESSION  # characters of the expression
    param: str = PARAM


def constraints(engine: AnyEngine, wanted: Format, count: int) -> list[FormatConstraint]:
    """Constraints for `count` answers. ApiError if the format cannot be followed."""
    try:
        matcher = _matcher(engine, wanted)
    except _Unfollowed as error:
        what = "format" if wanted.expression is None else "regular expression"
        raise ApiError(f"This {what} cannot be followed: {error}.", param=wanted.param) from None
    return [FormatConstraint(matcher.deep_copy(), wanted.param) for _ in range(count)]


class _Unfollowed(Exception):
    """Why a format cannot be followed."""


def _matcher(engine: AnyEngine, wanted: Format) -> "LLMatcher":
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise ApiError(MISSING, param=wanted.param) from None
    tokenizer = engine.model.tokenizer
    ends = tuple(sorted(stop_ids(engine.model.config.template, tokenizer)))
    vocabulary = _vocabulary(tokenizer, ends)
    if wanted.expression is not None:
        grammar = LLMatcher.grammar_from_regex(_checked_expression(wanted))
    else:
        content = _checked_schema(wanted.schema or {})
        try:
            grammar = LLMatcher.grammar_from_json_schema(content, overrides=COMPACT)
        except (ValueError, RecursionError):
            raise _Unfollowed(TOO_LARGE) from None
    matcher = LLMatcher(vocabulary, grammar, log_level=0)
    matcher.compute_bitmask()  # some mistakes show only here, such as endless recursion
    if error := matcher.get_error():
        raise _Unfollowed(_reason(error, wanted))
    _try_beginning(matcher.deep_copy(), vocabulary, wanted)
    return matcher


def _checked_expression(wanted: Format) -> str:
    expression = wanted.expression or ""
    if len(expression) > wanted.most:
        raise _Unfollowed(f"it has more than {wanted.most} characters; shorten it")
    if (len(expression) - len(expression.rstrip("\\"))) % 2:  # the library drops it
        raise _Unfollowed("it ends in a backslash; complete it")
    return expression


def _checked_schema(schema: dict[str, Any]) -> str:
    if "x-guidance" in schema:  # the library's own settings, which could lift our limits
        raise _Unfollowed("x-guidance is not supported; leave it out")
    try:
        _check_numbers(schema)
        content = json.dumps(_without_any_names(schema))
    except (ValueError, RecursionError):
        raise _Unfollowed(TOO_LARGE) from None
    if len(content) > MAX_CHARACTERS:
        raise _Unfollowed(f"it has more than {MAX_CHARACTERS} characters; shorten it")
    return content


def _try_beginning(matcher: "LLMatcher", vocabulary: "LLTokenizer", wanted: Format) -> None:
    """_Unfollowed if the format already fails in the text that every answer begins with."""
    begun = matcher.compute_ff_bytes()[:FIRST_BYTES].decode("utf-8", "ignore")
    matcher.consume_tokens(vocabulary.tokenize_bytes(begun.encode()))
    matcher.compute_bitmask()
    error = matcher.get_error()
    if "doesn't satisfy the grammar" in error:
        raise _Unfollowed("it asks for one of the model's control tokens; leave it out")
    if error and _reason(error, wanted) == TOO_LARGE:
        raise _Unfollowed(TOO_LARGE)


def _without_any_names(schema: Any, names: bool = False) -> Any:
    """The schema without each propertyNames that allows all names, as zod's records have: the
    library refuses the keyword. names: the keys are names. [], PHP's empty object, becomes {}."""
    if isinstance(schema, list):
        return [_without_any_names(inner) for inner in schema] or ({} if names else [])
    if not isinstance(schema, dict):
        return schema
    return {
        name: inner
        if name in VALUES and not names
        else _without_any_names(inner, name in NAMING and not names)
        for name, inner in schema.items()
        if names or name != "propertyNames" or inner not in ({"type": "string"}, {}, True)
    }


def _check_numbers(schema: Any) -> None:
    """_Unfollowed if a number anywhere is larger than the library can handle."""
    if isinstance(schema, dict | list):
        for value in schema.values() if isinstance(schema, dict) else schema:
            _check_numbers(value)
    elif isinstance(schema, int | float) and abs(schema) > MAX_NUMBER:
        raise _Unfollowed(f"it has a number beyond ±{MAX_NUMBER}; leave such numbers out")


def _reason(error: str, wanted: Format) -> str:
    """Why a format is refused, as our message."""
    first = error.strip()
    if wanted.expression is not None:
        return next((ours for theirs, ours in OF_EXPRESSIONS.items() if theirs in first), DAMAGED)
    if found := re.match(r"Unimplemented keys: \[(.*)\]", first):
        names = [f"“{quotable(name)}”" for name in re.findall(r'"([^"]*)"', found[1])[:5]]
        are, them = ("is", "it") if len(names) == 1 else ("are", "them")
        listed = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
        return f"{listed} {are} not supported; leave {them} out"
    return next((ours for theirs, ours in REASONS.items() if theirs in first), OTHER_REASON)


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
