"""The website in an answer: found, closed in, shown. Its frame reaches neither page nor network."""

import html
import re
import secrets
from pathlib import Path

# A whole document, or the beginning of one, that stands in an answer without a code fence.
_DOCUMENT = re.compile(
    r"<!doctype\s+html\b.*?(?:</html\s*>|\Z)|<html\b.*?(?:</html\s*>|\Z)|"
    r"<(?:head|body)\b.*?(?:</body\s*>|\Z)",
    re.DOTALL | re.IGNORECASE,
)
# Possessive and atomic parts (*+, ?>): whatever stands there is read once, in linear time.
_FENCE = re.compile(r"```[ \t]*+([\w+-]*+)[^\n]*+(?:\n(.*?)(?:```|\Z)|\Z)", re.DOTALL)
_MARKUP = re.compile(
    r"\s*+(?><!--.*?-->\s*+)*+<(?:!doctype\s+html|html|head|body|div|main|section|header|h1|h2|form|p|"
    r"button|style|table|ul|nav|title|a|img|input|script)\b",
    re.IGNORECASE | re.DOTALL,
)
# The frame's own policy. It comes first in the document, before anything the model wrote, and
# stands beside the page's, which keeps the frame from being led elsewhere.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:; media-src data: blob:; form-action 'none'; "
    "base-uri 'none'"
)
# Keeps WebRTC away, which no policy covers.
_FIRST_SCRIPT = (Path(__file__).parent / "assets" / "frame.js").read_text(encoding="utf-8")
# What would make a shadow root of markup.
_SHADOW = re.compile("shadowrootmode", re.IGNORECASE)


def website(answer: str) -> str:
    """The HTML in an answer, "" where there is none. Its CSS and script in further code blocks,
    as models like to write them, are put inside."""
    document, styles, scripts = "", [], []
    for language, code in _FENCE.findall(answer):
        language = language.lower()
        if language == "css":
            styles.append(f"<style>\n{code}</style>\n")
        elif language in ("js", "javascript"):
            scripts.append(f"<script>\n{code}</script>\n")
        elif language in ("html", "htm", "xhtml", "") and _MARKUP.match(code):
            document = document or code
    if not document:
        found = _DOCUMENT.search(_FENCE.sub("", answer))
        document = found[0] if found else ""
    return document and document.strip() + "\n" + "".join(styles + scripts)


def fenced(answer: str) -> str:
    """The answer, a bare HTML document in it set as a code block."""
    if "```" in answer:
        return answer
    return _DOCUMENT.sub(lambda found: f"\n```html\n{found[0]}\n```\n", answer, count=1)


def frame(document: str, title: str) -> str:
    """The element that shows the document: sandboxed, another origin, nothing to be fetched."""
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    whole = (
        f'<!doctype html><meta charset="utf-8">{policy}'
        '<meta http-equiv="x-dns-prefetch-control" content="off">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<script>\n{_FIRST_SCRIPT}</script>\n{_SHADOW.sub('data-shadow', document)}"
    )
    return (
        # The mark makes the page show the same website afresh when it is asked to.
        f'<iframe class="website" data-shown="{secrets.token_hex(4)}" '
        f'sandbox="allow-scripts" referrerpolicy="no-referrer" '
        f'title="{html.escape(title)}" srcdoc="{html.escape(whole)}"></iframe>'
    )
