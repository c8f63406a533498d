"""A chat turn crosses few of the package's files, and each once."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def traced() -> str:
    """In a program of its own: a profile hook slows down everything."""
    command = [sys.executable, "-m", "tools.trace"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_a_turn_reads_straight_down(traced):
    uploads, turns = traced.split("question -> streamed text")
    files = [line.split()[1] for line in uploads.splitlines()[1:]]
    assert files[0] == "model/image.py" and "model/vision.py" in files and len(files) <= 7
    files = [line.split()[1] for line in turns.splitlines()[1:]]
    assert files[0] == "conversation.py" and "model/prompt.py" in files and len(files) <= 10
    assert "engine/engine.py" in files and "model/text.py" in files


def test_the_readme_shows_this_trace(traced):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = readme.partition("## Trace")[2].split("```")[1]
    assert set(_modules(shown)) == set(_modules(traced))


def test_the_readmes_map_shows_every_module():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = {name.rpartition("/")[2] for name in _modules(readme.partition("## Map")[2])}
    modules = [path for path in (ROOT / "minigpt4").rglob("*.py") if path.name != "__init__.py"]
    assert not [path for path in modules if path.name not in listed]


def _modules(text: str) -> list[str]:
    return re.findall(r"[\w/]+\.py", text)
