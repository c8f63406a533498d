"""The commands of a page in docs/, as they are written there."""

import shlex
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
PYTHON = ".venv/bin/python -m minigpt4 "


def commands(page: str) -> list[list[str]]:
    """Arguments of each `python -m minigpt4` in the page's first blocks of sh, in order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = [block.split("```", 1)[0] for block in text.split("```sh\n")[1:]]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line.removeprefix(PYTHON)) for line in lines if line.startswith(PYTHON)]
