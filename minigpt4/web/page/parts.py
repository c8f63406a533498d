"""The page's own HTML, styles and scripts, in the folder assets."""

import re
from pathlib import Path
from typing import Any

import gradio as gr

from minigpt4.web.page.examples import EXAMPLES

ASSETS = Path(__file__).parent / "assets"
STYLES = ("theme", "layout", "chat", "composer", "panels", "store")
SCRIPTS = (
    *("names", "page", "layout", "upload", "composer", "where", "crop", "pictures", "facts"),
    *("versions", "speak", "keys", "settings", "draft", "notice", "store", "chats"),
)
_COMMENT = re.compile(r"^[ \t]*//.*\n|[ \t]*/\*[\s\S]*?\*/\n?", re.MULTILINE)  # no // behind code
# Settings of a gr.HTML without Gradio's own styles.
PLAIN: dict[str, Any] = {"padding": False, "apply_default_css": False}
# names.js fills in the texts: see `complete` there.
CARD = (
    '<button type="button" class="card" data-index="{index}"><img data-file="{path}" alt="" '
    'width="320" height="240"><span data-say="{name}"></span></button>'
)


def asset(name: str) -> str:
    """The text of a file of the folder."""
    return (ASSETS / name).read_text(encoding="utf-8")


def fragment(name: str, value: Any = None, **settings: Any) -> gr.HTML:
    """assets/NAME.html, with `value` in place of ${value}, and assets/NAME.js if there is one."""
    script = asset(f"{name}.js") if (ASSETS / f"{name}.js").exists() else None
    return gr.HTML(
        value, html_template=asset(f"{name}.html"), js_on_load=script, **PLAIN, **settings
    )


def hello() -> gr.HTML:
    """The empty page: where a photo can be dropped, and a card for each example."""
    cards = "".join(
        CARD.format(index=index, path=example.thumbnail, name=name)
        for index, (name, example) in enumerate(EXAMPLES.items())
    )
    template = asset("hello.html").replace("<!-- cards -->", cards)
    return gr.HTML(html_template=template, js_on_load=asset("hello.js"), elem_id="hello", **PLAIN)


def head() -> str:
    """The page's styles and scripts, for its <head>; without comments, as every visit loads it."""
    styles = [f"<style>\n{_COMMENT.sub('', asset(f'{name}.css'))}</style>\n" for name in STYLES]
    scripts = [f"<script>\n{_COMMENT.sub('', asset(f'{name}.js'))}</script>\n" for name in SCRIPTS]
    return asset("app.html") + "".join(styles + scripts)
