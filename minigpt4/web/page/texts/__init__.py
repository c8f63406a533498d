"""The page's texts in each of its languages.

Gradio translates the page's fixed parts in the browser (`I18N`). Handlers' messages are translated
here, into the first of the browser's languages that the page has. A new language is another JSON
file with de.json's keys. A key "page_error_…" ends in an error's `message_id`, or else its `kind`;
a key "page_step_…" in the key of a step of loading. Errors and steps have their English text in the
code: en.json has only the errors that the page's scripts show.
"""

import json
from pathlib import Path

import gradio as gr

from minigpt4.errors import Step, UserError

TEXTS: dict[str, dict[str, str]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(Path(__file__).parent.glob("*.json"))
}
# What a page loads: without the errors and steps of which en.json has no text.
_LOADED = {
    name: {key: text for key, text in texts.items() if key in TEXTS["en"]}
    for name, texts in TEXTS.items()
}
# Gradio's own locales call simplified Chinese zh-CN.
I18N = gr.I18n(**_LOADED, **{"zh-CN": _LOADED["zh"]})
PREFIX = "page_"  # sets the page's keys apart from Gradio's


def label(key: str) -> gr.i18n.I18nData:
    """A fixed text, translated in the browser."""
    if PREFIX + key not in TEXTS["en"]:
        raise KeyError(key)
    return I18N(PREFIX + key)


def language(request: gr.Request | None) -> str:
    """The first of the browser's languages that the page has."""
    asked = request.headers.get("accept-language", "") if request else ""
    for choice in asked.split(","):
        tag = choice.split(";")[0].strip().lower().split("-")[0]
        if tag in TEXTS:
            return tag
    return "en"


def translate(key: str, request: gr.Request | None, **values: object) -> str:
    """A text that depends on what happened, in the visitor's language."""
    return TEXTS[language(request)][PREFIX + key].format(**values)


def explain(error: UserError, request: gr.Request | None) -> str:
    """An error in the visitor's language; in English if there is no translation."""
    text = TEXTS[language(request)].get(f"{PREFIX}error_{error.message_id}")
    return text.format(**error.values) if text else str(error)


def explain_loading(error: UserError, request: gr.Request | None) -> str:
    """Why loading failed. If the error has no `message_id` of its own, a sentence in the visitor's
    language precedes its English text: the texts of error kinds are about answers."""
    if error.message_id == error.kind:
        error = UserError(str(error), message_id="not_loaded", values={"error": error})
    return explain(error, request)


def translate_step(line: str, request: gr.Request | None) -> str:
    """A line about loading in the visitor's language; unchanged if it has no translation."""
    texts = TEXTS[language(request)]
    if not isinstance(line, Step) or f"{PREFIX}step_{line.key}" not in texts:
        return line
    values = {name: translate_step(value, request) for name, value in line.values.items()}
    return translate(f"step_{line.key}", request, **values)
