"""The page's texts in each of its languages.

Gradio translates the page's fixed parts in the browser (`I18N`); what handlers say is translated
here, into the first language of the browser's list that the page speaks. A new language is another
JSON file with de.json's keys. Its keys "page_error_…" are the names of errors: a UserError's
`message_id`, else its `kind`; "page_step_…" those of steps of loading. Both hold their English
themselves: en.json has only the errors that the page's scripts show.
"""

import json
from pathlib import Path

import gradio as gr

from minigpt4.errors import Step, UserError

TEXTS: dict[str, dict[str, str]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(Path(__file__).parent.glob("*.json"))
}
# Gradio's own locales name simplified Chinese by its region.
I18N = gr.I18n(**TEXTS, **{"zh-CN": TEXTS["zh"]})
PREFIX = "page_"  # sets the page's keys apart from Gradio's


def label(key: str) -> gr.i18n.I18nData:
    """A fixed text, translated in the browser."""
    if PREFIX + key not in TEXTS["en"]:
        raise KeyError(key)
    return I18N(PREFIX + key)


def language(request: gr.Request | None) -> str:
    """The first language the browser asks for that the page speaks."""
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
    """An error in the visitor's language; English where it has no name that is translated."""
    text = TEXTS[language(request)].get(f"{PREFIX}error_{error.message_id}")
    return text.format(**error.values) if text else str(error)


def explain_loading(error: UserError, request: gr.Request | None) -> str:
    """Why loading failed. Where that has no translation, a sentence in the visitor's language comes
    before the English; a kind's text is about answers."""
    if error.message_id == error.kind:
        error = UserError(str(error), message_id="not_loaded", values={"error": error})
    return explain(error, request)


def translate_step(line: str, request: gr.Request | None) -> str:
    """A line about loading in the visitor's language; as it is where it is not translated."""
    texts = TEXTS[language(request)]
    if not isinstance(line, Step) or f"{PREFIX}step_{line.key}" not in texts:
        return line
    values = {name: translate_step(value, request) for name, value in line.values.items()}
    return translate(f"step_{line.key}", request, **values)
