"""A short run of each coverage-guided fuzzer; a long one: python -m benchmarks.fuzz."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from benchmarks import fuzz
from tests.running import python

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not find_spec("atheris"), reason="atheris has no build for this platform")
@pytest.mark.parametrize("target", ["pictures", "requests"])
@pytest.mark.trust("Pictures", "any bytes at all, found by coverage-guided fuzzing (requests, too)")
def test_a_few_seconds(target, tmp_path):
    """No input ends it, and it is guided: coverage is seen, and inputs are kept for it."""
    before = {path: path.read_bytes() for path in (fuzz.CORPUS / target).iterdir()}
    found, temporary = tmp_path / "found", tmp_path / "temporary"
    found.mkdir(), temporary.mkdir()
    options = [target, "--seconds", "3", "--found", str(found)]
    done = python("-m", "benchmarks.fuzz", *options, TMPDIR=str(temporary))
    said = done.stdout + done.stderr
    runs = int(re.search(r"Done (\d+) runs", said)[1])
    assert runs > len(before) and re.search(r"cov: [1-9]\d+", said)
    assert not list(found.iterdir()) and not list(temporary.iterdir())
    assert before == {path: path.read_bytes() for path in (fuzz.CORPUS / target).iterdir()}


@pytest.mark.parametrize("sentence", ["Traceback: x.", "at <0x7f>.", "two\nlines.", "no end"])
def test_what_counts_as_a_finding(sentence):
    with pytest.raises(AssertionError):
        fuzz.check(sentence)
