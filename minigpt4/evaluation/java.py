"""METEOR and SPICE, which the reference implementation computes in Java: where it is present.

METEOR's jar and its paraphrase table come with `pycocoevalcap`. SPICE needs Stanford CoreNLP 3.6
besides, which `pycocoevalcap` would fetch from the network when SPICE is first made:
nothing is fetched here, SPICE is left out until the two files are there.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from minigpt4.evaluation.metrics import ptb_tokens

SPICE_FILES = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def java_scores(
    answers: Mapping[str, str], references: Mapping[str, Sequence[str]]
) -> tuple[dict[str, float], dict[str, str]]:
    """("meteor" and "spice" of one answer per picture, 0 to 1; why those left out are left out)."""
    gts = {key: [ptb_tokens(ref) for ref in references[key]] for key in answers}
    res = {key: [ptb_tokens(answer)] for key, answer in answers.items()}
    scores, left_out = {}, {}
    for name, reason, score in (
        ("meteor", no_meteor(), _meteor),
        ("spice", no_spice(), _spice),
    ):
        if not reason:
            try:
                scores[name] = score(gts, res)
            except Exception as error:  # whatever Java, a pipe or the parser does
                reason = f"Java or the program failed ({type(error).__name__})"
        if reason:
            left_out[name] = reason
    return scores, left_out


def no_meteor() -> str:
    """Why METEOR cannot be computed here; "" where it can."""
    return "" if shutil.which("java") else "it needs Java (apt-get install default-jre-headless)"


def no_spice() -> str:
    """Why SPICE cannot be computed here; "" where it can."""
    folder = Path(find_spec("pycocoevalcap").submodule_search_locations[0]) / "spice"
    missing = [name for name in SPICE_FILES if not (folder / "lib" / name).exists()]
    if missing:
        return (
            "Stanford CoreNLP 3.6.0 is not installed: its "
            f"{' and '.join(missing)} belong into pycocoevalcap's folder spice/lib"
        )
    return no_meteor()


def _meteor(gts: dict[str, list[str]], res: dict[str, list[str]]) -> float:
    from pycocoevalcap.meteor.meteor import Meteor

    meteor = Meteor()
    process = meteor.meteor_p
    try:
        return float(meteor.compute_score(gts, res)[0])
    finally:
        del meteor  # ends the Java program
        for pipe in (process.stdout, process.stderr):
            pipe.close()


def _spice(gts: dict[str, list[str]], res: dict[str, list[str]]) -> float:
    from pycocoevalcap.spice.spice import Spice

    with _stdout_to_stderr():
        return float(Spice().compute_score(gts, res)[0])


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What a child program prints is no part of our output."""
    kept = os.dup(1)
    sys.stdout.flush()
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
