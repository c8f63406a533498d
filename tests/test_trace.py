"""A chat turn crosses few of the package's files, and each once."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_turn_reads_straight_down():
    """In a program of its own: a profile hook slows down everything."""
    command = [sys.executable, "-m", "tools.trace"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    uploads, turns = done.stdout.split("question -> streamed text")
    files = [line.split()[1] for line in uploads.splitlines()[1:]]
    assert files[0] == "model/image.py" and "model/vision.py" in files and len(files) <= 8
    files = [line.split()[1] for line in turns.splitlines()[1:]]
    assert files[0] == "conversation.py" and "model/prompt.py" in files and len(files) <= 10
    assert "engine/engine.py" in files and "model/text.py" in files
