"""What the page says, in each of its languages.

Gradio translates the page's fixed parts in the browser (`I18N`); what a handler says is translated
here (`say`), by the language that the browser asks for. A new language is another JSON file beside
en.json, with the same keys.
"""

import json
from pathlib import Path

import gradio as gr

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


def say(key: str, request: gr.Request | None, **values: object) -> str:
    """A text that depends on what happened, in the visitor's language."""
    return TEXTS[language(request)][PREFIX + key].format(**values)
