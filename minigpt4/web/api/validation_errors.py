"""Pydantic's validation errors as one sentence that names the field."""

from collections.abc import Iterator
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from minigpt4.web.api.errors import ApiError, json_path, quotable

T = TypeVar("T", bound=BaseModel)
# Fields that may come in two forms.
EITHER: dict[int | str, str] = {
    "content": "a string or a list of parts",
    "instructions": "a string or a list of parts",
    "image_url": "a URL or an object with one",
}
# pydantic's error types -> the end of our sentence, which begins with the field's path. If a field
# has a description, that is the end instead.
SENTENCES = {
    "missing": "is missing: add it.",
    "string_type": "must be a string.",
    "bool_type": "must be true or false.",
    "list_type": "must be a list.",
    "too_short": "must hold at least {min_length} {items}.",
    "too_long": "must hold at most {max_length} items.",
    "model_type": "must be an object.",
    "dict_type": "must be an object.",
    "none_required": "is not supported: leave it out, and send the picture in image_url.",
    "empty": "is empty: write something.",
    "part": 'must be {{"type": "text", "text": …}} or '
    '{{"type": "image_url", "image_url": {{"url": …}}}}.',
}


def validated(model: type[T], body: dict) -> T:
    """The body as this model. ApiError for the first field that is wrong."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise _explained(error, model) from None


def _explained(error: ValidationError, model: type[BaseModel]) -> ApiError:
    """pydantic's first error as our sentence."""
    first = error.errors(include_url=False)[0]
    kind, (location, sentence) = first["type"], _located(first["loc"], model)
    path = json_path(location)
    missing = kind == "missing" and (sentence or "").startswith(f"{path} ")  # not a part of it
    if sentence and kind != "empty" and not missing:
        return ApiError(sentence, param=path)
    if kind in ("list_type", "model_type") and location[-1] in EITHER:
        return ApiError(f"{path} must be {EITHER[location[-1]]}.", param=path)
    details = first.get("ctx", {})
    sent = first["input"].get("type") if kind == "part" and isinstance(first["input"], dict) else ""
    if isinstance(sent, str) and sent:
        path = f"{path} is of type “{quotable(sent)}”, which is not supported: it"
    items = "item" if details.get("min_length") == 1 else "items"
    end = SENTENCES.get(kind, "has a wrong value.").format(**details, items=items)
    return ApiError(f"{path} {end}", param=json_path(location))


def _located(
    location: tuple[int | str, ...], model: type[BaseModel]
) -> tuple[tuple[int | str, ...], str | None]:
    """(the location without the types of a union, the description of the first field on the way
    that has one)."""
    models, sentence = [model], None
    for place, step in enumerate(location):
        if isinstance(step, int) or step.startswith("<"):
            continue
        fields = [
            field
            for m in models
            for name, field in m.model_fields.items()
            if step == (field.alias or name)
        ]
        if not fields:
            return location[:place], sentence
        if fields[0].description and not sentence:
            sentence = f"{json_path(location[: place + 1])} {fields[0].description}"
        models = [inner for field in fields for inner in _models(field.annotation)]
    return location, sentence


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models anywhere inside a field's type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
