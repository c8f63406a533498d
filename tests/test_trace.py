"""The README's trace and map: true to the code, and short."""

import re
from pathlib import Path

import pytest

from minigpt4.config import get_model
from minigpt4.engine.kernels.build import library
from minigpt4.errors import UserError
from minigpt4.weights.load import download_weights
from tests.running import python

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(heading: str) -> list[str]:
    """The lines of the first code block below a heading of the README."""
    return README.partition(f"## {heading}\n")[2].split("```")[1].splitlines()[1:]


def files_in(lines: list[str]) -> list[str]:
    """The names of files, sorted."""
    return sorted(re.findall(r"\S+\.py", " ".join(lines)))


@pytest.mark.skipif(library() is None, reason="no C compiler: install gcc")
def test_the_readme_shows_this_trace():
    """Otherwise: python -m tools.trace"""
    try:
        download_weights(get_model("mini"))
    except UserError as error:
        pytest.skip(f"mini's weights are not available: {error}")
    # In a program of its own: a profile hook slows down everything.
    code = "from tools.trace import trace; print(trace())"
    found = python("-c", code).stdout.splitlines()[1:]
    shown = block("Trace")
    models = shown.index("")
    assert found[:models] == shown[:models]
    # In web/, several threads are at work.
    assert files_in(found[models:]) == files_in(shown[models:])


@pytest.mark.parametrize(
    ("title", "most", "first", "inside"),
    [
        ("upload, nano", 7, "model/image.py", "model/bridge.py"),
        ("upload, mini", 10, "model/image.py", "model/words.py"),
        ("question, nano", 10, "conversation.py", "model/prompt.py"),
        ("question, mini", 10, "conversation.py", "engine/native.py"),
    ],
)
def test_a_turn_reads_straight_down(title, most, first, inside):
    head, *lines = block("Trace")
    start = head.index(title)
    table = lines[: lines.index("")]
    files = [cell for line in table if (cell := line[start:].split("  ")[0])]
    assert files[0] == first and inside in files and len(files) == len({*files}) <= most


def test_the_readmes_map_shows_every_module():
    """And nothing else: each name is that of a file, in the folder under which it is written."""
    folders, shown = [(-1, "")], set()
    for line in block("Map"):
        indent = len(line) - len(line.lstrip())
        if indent < 20:  # not the rest of the entry above
            while folders[-1][0] >= indent:
                folders.pop()
            if (entry := line.split()[0]).endswith("/"):
                folders.append((indent, folders[-1][1] + entry))
        here = folders[-1][1]
        shown |= {here + name for name in re.findall(r"[\w/]+\.py\b|\b\w+/(?= |,|;|$)", line)}
        shown.add(here)
    package = sorted((ROOT / "minigpt4").rglob("*.py"))
    modules = {path.relative_to(ROOT).as_posix() for path in package}
    inits = {name for name in modules if name.endswith("/__init__.py")}
    assert modules - inits <= shown
    assert not [name for name in shown if name.endswith(".py") and not (ROOT / name).is_file()]
    assert {name.removesuffix("__init__.py") for name in inits if "engine/" not in name} <= shown
