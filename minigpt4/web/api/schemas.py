"""What POST /v1/chat/completions takes and returns: parsing, messages and OpenAPI from one source.

`parse` turns a body into a `ChatRequest`, or raises an `ApiError` whose sentence names the field.
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from minigpt4.config import ModelConfig
from minigpt4.engine import Sampling
from minigpt4.errors import UserError
from minigpt4.start import default_sampling
from minigpt4.web.api.errors import ApiError, invalid
from minigpt4.web.guard.limits import FILES_AT_ONCE

MAX_MESSAGES, MAX_CHARACTERS = 1000, 200_000
MAX_STOPS, MAX_STOP_CHARACTERS = 4, 200
NO_TOOLS = "Tools are not supported: leave them out."
NO_PENALTY = "Only repetition_penalty is supported: leave this penalty out."

Schema = dict[str, Any]


# --- fields that code checks ----------------------------------------------------------------------


class CheckedField:
    """Annotates a field: `check` refuses values in our own words, `schema` describes the rest.

    null means the same as leaving the field out.
    """

    schema: Schema

    def check(self, value: Any, name: str) -> None:
        """Raises UserError; `name` is the field's."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        def validate(value: Any, info: ValidationInfo) -> Any:
            if value is not None:
                try:
                    self.check(value, str(info.field_name))
                except UserError as error:
                    raise PydanticCustomError("sentence", str(error)) from None
            return value

        return core_schema.with_info_plain_validator_function(validate)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> Schema:
        return {"anyOf": [self.schema, {"type": "null"}]}


class SamplingField(CheckedField):
    """One of Sampling's fields: `Sampling` checks it, with its range and its sentence."""

    def __init__(self, field: str) -> None:
        self._field = field
        low, high, inclusive = Sampling.RANGES[field]
        self.schema = {
            "type": "integer" if isinstance(low, int) else "number",
            "minimum" if inclusive else "exclusiveMinimum": low,
            "maximum": high,
        }

    def check(self, value: Any, name: str) -> None:
        try:
            Sampling(**{self._field: value})
        except UserError as error:  # it calls the field by Sampling's name
            raise UserError(str(error).replace(self._field, name)) from None


class Only(CheckedField):
    """A field that is accepted while it asks for nothing."""

    def __init__(self, allowed: Sequence[Any], sentence: str) -> None:
        self._allowed, self._sentence = allowed, sentence
        self.schema = {"enum": list(allowed)}

    def check(self, value: Any, name: str) -> None:
        for allowed in self._allowed:  # true equals 1 in Python, but not here
            if value == allowed and isinstance(value, bool) == isinstance(allowed, bool):
                return
        raise UserError(self._sentence)


# --- requests ------------------------------------------------------------------------------------


class Object(BaseModel):
    """A JSON object; fields that it does not know are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)


class TextPart(Object):
    type: Literal["text"]
    text: str


class ImageUrl(Object):
    url: str


class ImagePart(Object):
    type: Literal["image_url"]
    image_url: ImageUrl


def _part_tag(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return f"<{kind}>" if kind in ("text", "image_url") else None


Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image_url>")],
    Discriminator(_part_tag, custom_error_type="part", custom_error_message="another part"),
]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _as_list(stop: Any) -> Any:
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


class Message(Object):
    """One message of a conversation. `content` is a string, or parts in their order."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])
    ]
    tool_calls: Annotated[Any, Only([[]], NO_TOOLS)] = None
    function_call: Annotated[Any, Only([{}], NO_TOOLS)] = None

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content if isinstance(part, TextPart))

    @property
    def images(self) -> list[tuple[int, str]]:
        """(place in `content`, URL) of each picture."""
        parts = enumerate(self.content)
        return [(i, part.image_url.url) for i, part in parts if isinstance(part, ImagePart)]

    @property
    def is_system(self) -> bool:
        return self.role in ("system", "developer")


class StreamOptions(Object):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: Any = None  # changes nothing here


StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class ChatRequest(Object):
    """The body. A setting that is left out, or null, is the model's default."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    temperature: Annotated[float | None, SamplingField("temperature")] = None
    top_p: Annotated[float | None, SamplingField("top_p")] = None
    top_k: Annotated[int | None, SamplingField("top_k")] = None
    min_p: Annotated[float | None, SamplingField("min_p")] = None
    repetition_penalty: Annotated[float | None, SamplingField("repetition_penalty")] = None
    num_beams: Annotated[int | None, SamplingField("num_beams")] = None
    seed: Annotated[int | None, SamplingField("seed")] = None
    max_tokens: Annotated[int | None, SamplingField("max_new_tokens")] = None
    max_completion_tokens: Annotated[int | None, SamplingField("max_new_tokens")] = None
    stop: Annotated[
        Annotated[list[StopString], Field(max_length=MAX_STOPS)],
        BeforeValidator(
            _as_list,
            json_schema_input_type=StopString
            | Annotated[list[StopString], Field(max_length=MAX_STOPS)]
            | None,
        ),
    ] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    # Accepted while they ask for nothing.
    n: Annotated[Any, Only([1], "n must be 1: ask again for another answer.")] = None
    top_logprobs: Annotated[
        Any, Only([0], "top_logprobs must be 0: only the chosen token's logprob is known.")
    ] = None
    presence_penalty: Annotated[Any, Only([0], NO_PENALTY)] = None
    frequency_penalty: Annotated[Any, Only([0], NO_PENALTY)] = None
    logit_bias: Annotated[Any, Only([{}], "logit_bias is not supported: leave it out.")] = None
    tools: Annotated[Any, Only([[]], NO_TOOLS)] = None
    tool_choice: Annotated[Any, Only(["none", "auto"], NO_TOOLS)] = None
    parallel_tool_calls: Annotated[Any, Only([True, False], NO_TOOLS)] = None
    functions: Annotated[Any, Only([[]], NO_TOOLS)] = None
    function_call: Annotated[Any, Only(["none", "auto"], NO_TOOLS)] = None
    response_format: Annotated[
        Any, Only([{"type": "text"}], 'response_format must be {"type": "text"}.')
    ] = None
    modalities: Annotated[Any, Only([["text"]], 'modalities must be ["text"].')] = None
    # Accepted and not read: they change no answer here.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    @model_validator(mode="after")
    def _check(self) -> "ChatRequest":
        if self.logprobs and (self.num_beams or 1) > 1:
            _refuse("logprobs are not available with beam search: set num_beams to 1.", "logprobs")
        _check_conversation(self.messages)
        return self

    @property
    def system(self) -> str | None:
        """The system messages; None: the model's own system text."""
        texts = [message.text for message in self.messages if message.is_system]
        return "\n".join(texts) if texts else None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, config: ModelConfig) -> Sampling:
        """The settings, over the model's defaults."""
        names = Sampling.RANGES.keys() - {"max_new_tokens"}
        given = {name: getattr(self, name) for name in names}
        # The newer name wins.
        given["max_new_tokens"] = self.max_completion_tokens or self.max_tokens
        return default_sampling(config, **{n: v for n, v in given.items() if v is not None})


def _check_conversation(messages: Sequence[Message]) -> None:
    """ApiError where the messages do not make a conversation, or are too much of one."""
    spoken = []
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if message.images and message.role != "user":
            _refuse(f"{where}: only a user's message may hold pictures.", f"{where}.content")
        if message.is_system:
            if spoken:
                _refuse(f"{where}: put system messages before all others.", f"{where}.role")
            continue
        if message.role == "user" and not message.text.strip() and not message.images:
            _refuse(f"{where} is empty: write a question.", f"{where}.content")
        spoken.append(message)
    if not spoken or spoken[0].role != "user" or spoken[-1].role != "user":
        _refuse("The first and the last message, system messages aside, must be a user's.")
    if sum(len(message.images) for message in spoken) > FILES_AT_ONCE:
        _refuse(f"A conversation may hold at most {FILES_AT_ONCE} pictures: leave some out.")
    if sum(len(message.text) for message in messages) > MAX_CHARACTERS:
        sentence = f"The conversation has more than {MAX_CHARACTERS} characters: shorten it."
        _refuse(sentence, code="context_length_exceeded")


def _refuse(sentence: str, param: str = "messages", code: str | None = None) -> NoReturn:
    raise ApiError(sentence, 400, code, param)


def read_json(body: bytes | bytearray) -> dict:
    """The body's JSON object."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ApiError("The body must be JSON, and not deeply nested.") from None
    if not isinstance(value, dict):
        raise ApiError("The body must be a JSON object.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity are not JSON


def parse(body: dict) -> ChatRequest:
    """Check the body's fields. ApiError about the first one that is wrong."""
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as error:
        raise invalid(error) from None


# --- responses -----------------------------------------------------------------------------------

Count = Annotated[int, Field(ge=0)]


class Response(BaseModel):
    """A JSON object with just these fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TokenLogprob(Response):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: Annotated[list, Field(max_length=0)]


class Logprobs(Response):
    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(Response):
    role: Literal["assistant"]
    content: str
    refusal: None


class Choice(Response):
    index: Literal[0]
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"]


class PromptDetails(Response):
    cached_tokens: Count


class Usage(Response):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptDetails


class ChatCompletion(Response):
    id: str
    created: Count
    model: str
    object: Literal["chat.completion"]
    choices: Annotated[list[Choice], Field(min_length=1, max_length=1)]
    usage: Usage


class Model(Response):
    id: str
    object: Literal["model"]
    created: Count
    owned_by: str


class Models(Response):
    object: Literal["list"]
    data: list[Model]


class ErrorMessage(Response):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(Response):
    error: ErrorMessage
