"""Schemas of POST /v1/chat/completions: one source for parsing, error messages and OpenAPI.

Validators beside the fields turn the variants that clients send into ours.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    FailFast,
    Field,
    PrivateAttr,
    Tag,
    model_validator,
)

from minigpt4.config import LOWEST_TEMPERATURE, SAMPLING_RANGES, ModelConfig, setting_range
from minigpt4.engine import Sampling
from minigpt4.start import default_sampling
from minigpt4.web.api.errors import ApiError
from minigpt4.web.api.grammar import MAX_CHOICES, MAX_EXPRESSION, Format
from minigpt4.web.guard.limits import FILES_AT_ONCE

MAX_MESSAGES, MAX_CHARACTERS = 1000, 200_000
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 200
MAX_ANSWERS, MAX_TOP_LOGPROBS = 8, 20
LOWEST_TOP_P = 1e-6  # keeps only the most likely token, which is what clients mean by 0
# The types of parts in the Responses API, which some clients send here, too.
PART_TYPES = {"input_text": "text", "output_text": "text", "input_image": "image_url"}


class Object(BaseModel):
    """A JSON object; fields that it does not know are kept, so that `unread` can name them."""

    model_config = ConfigDict(
        strict=True,
        frozen=True,
        extra="allow",
        json_schema_extra=lambda schema: schema.pop("additionalProperties"),  # true by default
    )


# --- clients' variants of values -> ours; invalid values stay as they are -------------------------


def _whole(value: Any) -> Any:
    """1.0 -> 1: languages without integers send that."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _or_none(value: Any) -> Any:
    """-1 -> None: it means "not set" for vLLM, llama.cpp and LM Studio."""
    value = _whole(value)
    return None if value == -1 else value


def _most(value: Any) -> Any:
    """A limit may be any number; those above 2**63 - 1 make no difference."""
    value = _or_none(value)
    return min(value, 2**63 - 1) if isinstance(value, int) else value


def _temperature(value: Any) -> Any:
    """A temperature below the lowest -> 0, as clients mean it."""
    return 0.0 if isinstance(value, float) and 0 < value < LOWEST_TEMPERATURE else value


def _top_p(value: Any) -> Any:
    return LOWEST_TOP_P if value == 0 and value is not False else value


def as_object(value: Any) -> Any:
    """[] -> {}: PHP writes an empty object so."""
    return {} if value == [] else value


def _without_zeros(bias: Any) -> Any:
    return {k: v for k, v in bias.items() if v != 0} if isinstance(bias, dict) else as_object(bias)


def _as_stops(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    return [text for text in texts if text != ""] if isinstance(texts, list) else value


def _as_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


def _as_part(part: Any) -> Any:
    """The part with its type's name in chat completions."""
    kind = part.get("type") if isinstance(part, dict) else None
    return part | {"type": PART_TYPES.get(kind, kind)} if isinstance(kind, str) else part


def _as_parts(content: Any) -> Any:
    text = "" if content is None else content
    return [{"type": "text", "text": text}] if isinstance(text, str) else content


# --- the fields ----------------------------------------------------------------------------------


class TextPart(Object):
    type: Literal["text"]
    text: str


class ImageUrl(Object):
    url: str
    detail: Any = None  # changes nothing here


class ImagePart(Object):
    type: Literal["image_url"]
    file_id: None = None  # before `image_url`, which is missing then: this is the clearer error
    image_url: Annotated[ImageUrl, BeforeValidator(_as_url, json_schema_input_type=str | ImageUrl)]


class RefusalPart(Object):
    """A refusal by one of OpenAI's models, which clients send back in the history."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


PARTS: dict[str, type[Object]] = {"text": TextPart, "image_url": ImagePart, "refusal": RefusalPart}


def _part_tag(part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else getattr(part, "type", None)
    return f"<{kind}>" if isinstance(kind, str) and kind in PARTS else None


Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[ImagePart, Tag("<image_url>")]
    | Annotated[RefusalPart, Tag("<refusal>")],
    Discriminator(_part_tag, custom_error_type="part", custom_error_message="another part"),
    BeforeValidator(_as_part),
]


def _number(name: str, unset: str = "") -> Any:
    """A field with the range of the setting `name`. unset: the message's addition if another value
    means "not set"."""
    low, high, inclusive = SAMPLING_RANGES[name]
    sentence = f"{setting_range(name).replace('above', 'from')}{unset}."  # clients may send it
    if inclusive:
        return Field(ge=low, le=high, description=sentence)
    return Field(gt=low, le=high, description=sentence)


def _accepting(
    kind: type, low: int, read: Callable[[Any], Any], high: float | None = 2**63 - 1
) -> BeforeValidator:
    """A validator for a number of at least `low`, which `read` turns into ours."""
    return BeforeValidator(
        read, json_schema_input_type=Annotated[kind, Field(ge=low, le=high)] | None
    )


WHOLE = BeforeValidator(_whole)
UNSET = ", or -1 for the model's default"
# The maximum length of an answer, which may exceed what fits. None and -1: as long as fits.
MaxTokens = Annotated[
    int | None,
    Field(ge=1, description="must be an integer of at least 1, or -1 for as many as fit."),
    _accepting(int, -1, _most, None),
]


def _only(sentence: str, **constraints: Any) -> Any:
    """A field that is accepted only with values that ask for nothing."""
    return Field(description=sentence, **constraints)


EMPTY = _only("is not supported: leave it out.", max_length=0)
NO_TOOLS = _only("is not supported: this model calls no functions. Leave it out.", max_length=0)
NO_OFFER = _only(
    "is not supported: this model calls no functions. Leave it out, or have the server started "
    "with --ignore-tools.",
    max_length=0,
)
# Ollama's field. It is refused: without the pictures, the answer would be invented.
AS_PART = 'is not read: send each picture as a part {"type": "image_url", "image_url": {"url": …}}.'
NO_PICTURES = _only(AS_PART, alias="images", max_length=0)
# Other names for pictures: llama.cpp's, and those in parts whose type is text.
OTHER_PICTURES = ("image", "image_url", "image_urls", "image_data", "image_base64")
NoTool = Annotated[Literal["none", "auto"] | None, _only('must be "none" or "auto".')]


class ChatMessage(Object):
    """One message of a conversation. `content` is a string, or parts in their order."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant"],
        Field(description="must be system, developer, user or assistant: tools are not supported."),
    ]
    content: Annotated[
        list[Part],
        FailFast(),
        BeforeValidator(_as_parts, json_schema_input_type=str | list[Part] | None),
    ]
    images_field: Annotated[list | None, NO_PICTURES] = None
    refusal: str | None = None
    tool_calls: Annotated[list | None, NO_TOOLS] = None
    function_call: Annotated[dict | None, NO_TOOLS] = None

    @model_validator(mode="before")
    @classmethod
    def _without_content(cls, message: Any) -> Any:
        """An assistant's message needs no content: it may hold a refusal or calls instead."""
        said = isinstance(message, dict) and (
            message.get("role") == "assistant" or message.get("refusal") is not None
        )
        return {"content": None} | message if said else message

    @property
    def text(self) -> str:
        text = "\n".join(part.text for part in self.content if not isinstance(part, ImagePart))
        return "\n".join(filter(None, (text, self.refusal)))

    @property
    def images(self) -> list[tuple[int, str]]:
        """(place in `content`, URL) of each picture."""
        parts = enumerate(self.content)
        return [(i, part.image_url.url) for i, part in parts if isinstance(part, ImagePart)]

    @property
    def is_empty(self) -> bool:
        return not self.text.strip() and not self.images

    @property
    def is_system(self) -> bool:
        return self.role in ("system", "developer")


class StreamOptions(Object):
    include_usage: bool | None = None
    include_obfuscation: Any = None  # changes nothing here


class JsonSchema(Object):
    """`schema` is a JSON schema. The answer follows it, whatever `strict` says."""

    name: Any = None
    description: Any = None
    strict: Any = None
    content: Annotated[dict[str, Any], Field(alias="schema")]


class ResponseFormat(Object):
    """The type `regex` is TGI's: the regular expression `value` matches the whole answer."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    value: Any = None
    _sent_as: str = PrivateAttr("response_format")

    def comes_from(self, name: str) -> None:
        """Note that the client sent it as this field of vLLM."""
        self._sent_as = name

    @property
    def of_answer(self) -> Format | None:
        """The answer's format, None for plain text."""
        if self.type == "regex":
            most = MAX_CHOICES if self._sent_as.endswith("choice") else MAX_EXPRESSION
            return Format(expression=self.value, most=most, param=self._sent_as)
        schema = {"type": "object"} if self.type == "json_object" else None
        if self.json_schema is not None and self.type == "json_schema":
            schema = self.json_schema.content
        return None if schema is None else Format(schema, param=self._sent_as)


Stop = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]


class ChatRequest(Object):
    """The body. A setting that is left out, or null, has the model's default."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES), FailFast()]
    temperature: Annotated[float | None, _number("temperature"), BeforeValidator(_temperature)] = (
        None
    )
    top_p: Annotated[float | None, _number("top_p"), _accepting(float, 0, _top_p, 1)] = None
    top_k: Annotated[
        int | None, _number("top_k", UNSET), _accepting(int, -1, _or_none, 1_000_000)
    ] = None
    min_p: Annotated[float | None, _number("min_p")] = None
    repetition_penalty: Annotated[float | None, _number("repetition_penalty")] = None
    presence_penalty: Annotated[float | None, _number("presence_penalty")] = None
    frequency_penalty: Annotated[float | None, _number("frequency_penalty")] = None
    num_beams: Annotated[int | None, _number("num_beams"), WHOLE] = None
    seed: Annotated[int | None, _number("seed"), _accepting(int, -1, _or_none)] = None
    max_tokens: MaxTokens = None
    max_completion_tokens: MaxTokens = None
    instructions: Annotated[str | None, Field(description="must be a string.")] = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None, Field(description="must be auto or disabled.")
    ] = None
    stop: Annotated[
        Stops | None,
        BeforeValidator(_as_stops, json_schema_input_type=Stop | Stops | None),
        Field(
            description=f"must be a string of up to {MAX_STOP_CHARACTERS} characters, or a list of "
            f"up to {MAX_STOPS} of them."
        ),
    ] = None
    stream: bool | None = None
    stream_options: Annotated[StreamOptions | None, BeforeValidator(as_object)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[
        int | None,
        _only(f"must be an integer from 0 to {MAX_TOP_LOGPROBS}.", ge=0, le=MAX_TOP_LOGPROBS),
        WHOLE,
    ] = None
    n: Annotated[
        int | None,
        _only(f"must be an integer from 1 to {MAX_ANSWERS}.", ge=1, le=MAX_ANSWERS),
        WHOLE,
    ] = None
    response_format: Annotated[
        ResponseFormat | None,
        _only(
            'must be {"type": "text"}, {"type": "json_object"}, {"type": "json_schema", '
            '"json_schema": {"schema": …}} or {"type": "regex", "value": …}.'
        ),
    ] = None
    # Accepted only with values that ask for nothing.
    logit_bias: Annotated[dict | None, EMPTY, BeforeValidator(_without_zeros)] = None
    images_field: Annotated[list | None, NO_PICTURES] = None
    tools: Annotated[list | None, NO_OFFER] = None
    functions: Annotated[list | None, NO_OFFER] = None
    tool_choice: NoTool = None
    function_call: NoTool = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[
        list[Literal["text"]] | None, _only('must be ["text"].', min_length=1, max_length=1)
    ] = None
    # Accepted and ignored: they change no answer here.
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
        if self.top_logprobs and not self.logprobs:
            _refuse("top_logprobs needs logprobs: set logprobs to true.", "top_logprobs")
        _check_places_of_pictures(self)
        _check_conversation(self.messages, self.instructions or "")
        self._check_format()
        return self

    def _check_format(self) -> None:
        """ApiError if the answer cannot keep to the format."""
        wanted = self.response_format
        if wanted is None or wanted.type == "text":
            return
        if wanted.type == "json_schema" and wanted.json_schema is None:
            where = "response_format.json_schema"
            _refuse(f"{where} is missing: add the schema.", where)
        if wanted.type == "regex" and not isinstance(wanted.value, str):
            where = "response_format.value"
            wrong = "is missing: add" if wanted.value is None else "must be a string:"
            _refuse(f"{where} {wrong} the regular expression.", where)
        if (self.num_beams or 1) > 1:
            sentence = "A response_format is not available with beam search: set num_beams to 1."
            _refuse(sentence, "num_beams")
        if self.messages[-1].role == "assistant":
            sentence = "An answer in a given format cannot be continued: end with a user's message."
            _refuse(sentence, "response_format")

    @property
    def system(self) -> str | None:
        """The instructions and system messages; None for the model's own system text."""
        texts = [message.text for message in self.messages if message.is_system]
        texts = [text for text in (self.instructions, *texts) if text]
        return "\n".join(texts) if texts else None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, config: ModelConfig) -> Sampling:
        """The model's defaults with the given settings; without max_tokens, as long as fits."""
        given = {name: getattr(self, name, None) for name in SAMPLING_RANGES}
        # The newer name wins.
        most = self.max_completion_tokens or self.max_tokens or config.context
        given["max_new_tokens"] = min(most, config.context)
        return default_sampling(config, **{n: v for n, v in given.items() if v is not None})


def _check_places_of_pictures(request: ChatRequest) -> None:
    """ApiError for a picture in a field that would be ignored."""
    places: list[tuple[str, Object]] = [("", request)]
    for i, message in enumerate(request.messages):
        where = f"messages[{i}]."
        parts = ((f"{where}content[{k}].", part) for k, part in enumerate(message.content))
        places += [(where, message), *parts]
    for where, value in places:
        for name in OTHER_PICTURES:
            if (value.model_extra or {}).get(name):
                _refuse(f"{where}{name} {AS_PART}", f"{where}{name}")


def _check_conversation(messages: Sequence[ChatMessage], instructions: str = "") -> None:
    """ApiError if the messages are not a valid conversation, or are too many or too long."""
    for place, message in enumerate(messages):
        where = f"messages[{place}]"
        if message.images and message.role != "user":
            _refuse(f"{where}: only a user's message may hold pictures.", f"{where}.content")
        refused = any(isinstance(part, RefusalPart) for part in message.content)
        if (refused or message.refusal) and message.role != "assistant":
            sentence = f"{where}: only an assistant's message may hold a refusal."
            _refuse(sentence, f"{where}.{'content' if refused else 'refusal'}")
    asked = [place for place, message in enumerate(messages) if message.role == "user"]
    if not asked:
        _refuse("messages must hold a user's message: add a question.")
    if messages[asked[-1]].is_empty:  # earlier ones may be empty: clients keep such turns
        where = f"messages[{asked[-1]}]"
        _refuse(f"{where} is empty: write a question.", f"{where}.content")
    if sum(len(message.images) for message in messages) > FILES_AT_ONCE:
        _refuse(f"A conversation may hold at most {FILES_AT_ONCE} pictures: leave some out.")
    if sum(len(message.text) for message in messages) + len(instructions) > MAX_CHARACTERS:
        sentence = f"The conversation has more than {MAX_CHARACTERS} characters: shorten it."
        _refuse(sentence, code="context_length_exceeded")


def _refuse(sentence: str, param: str = "messages", code: str | None = None) -> NoReturn:
    raise ApiError(sentence, 400, code, param)
