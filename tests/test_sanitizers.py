"""The kernels under AddressSanitizer and UndefinedBehaviorSanitizer, at awkward sizes."""

import os
import subprocess
from pathlib import Path

import pytest

from minigpt4.engine.kernels.build import library
from tests.running import python

ROOT = Path(__file__).parent.parent
FLAGS = "-g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"


def sanitizer_library() -> str:
    """Where the compiler's AddressSanitizer is, which has to be loaded before Python."""
    compiler = os.environ.get("CC", "cc").split()[0]
    command = [compiler, "-print-file-name=libasan.so"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found = ""
    if not Path(found).is_absolute():
        pytest.skip("the C compiler has no AddressSanitizer (gcc's libasan.so)")
    return found


@pytest.mark.skipif(library() is None, reason="no C compiler: install gcc")
def test_no_access_outside_and_nothing_undefined(tmp_path):
    variables = {
        "LD_PRELOAD": sanitizer_library(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself keeps memory until the end
        "CC": f"{os.environ.get('CC', 'cc')} {FLAGS}",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    assert "done" in python("-m", "tests.sanitized_kernels", "checked", **variables).stdout
