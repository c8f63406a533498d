"""What the page says, in each of its languages.

Gradio translates the page's fixed parts in the browser (`I18N`); what handlers say is translated
here, into the first language of the browser's list that the page speaks. A new language is another
JSON file with de.json's keys. Its keys "page_error_…" are the names of errors: a UserError's
`message_id`, else its `kind`. English has only those that the page's scripts show. The English
"page_step_…" are what is reported while a model is being loaded: it is recognised by them.
"""

import json
import re
from pathlib import Path

import gradio as gr

from minigpt4.errors import UserError

TEXTS: dict[str, dict[str, str]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8"))
    for path in sorted(Path(__file__).parent.glob("*.json"))
}
# Gradio's own locales name simplified Chinese by its region.
I18N = gr.I18n(**TEXTS, **{"zh-CN": TEXTS["zh"]})
PREFIX = "page_"  # sets the page's keys apart from Gradio's
FIGURES = ("size", "total", "share", "time")  # a step's parameters that are numbers
FIGURE = r"[\d.:]+(?: [MG]B)?"


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
    """A line about loading in the visitor's language; as it is where it is none of the steps.

    Names and figures are kept; parameters that are clauses of their own are translated, too.
    """
    for key, pattern in STEPS.items():
        if found := pattern.fullmatch(line):
            values = {n: translate_step(text, request) for n, text in found.groupdict().items()}
            return translate(key, request, **values)
    return line


def _pattern(text: str) -> re.Pattern[str]:
    """Matches the text with any values in the places of its parameters."""
    parts = re.split(r"\{(\w+)\}", text)  # every second one is a parameter's name
    parts[::2] = map(re.escape, parts[::2])
    parts[1::2] = [f"(?P<{n}>{FIGURE if n in FIGURES else '.+'})" for n in parts[1::2]]
    return re.compile("".join(parts))


STEPS = {
    key.removeprefix(PREFIX): _pattern(text)
    for key, text in TEXTS["en"].items()
    if key.startswith(f"{PREFIX}step_")
}
