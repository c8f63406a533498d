"""python -m benchmarks.fuzz pictures|requests --seconds N: coverage-guided, from tests/corpus.

Atheris changes inputs so that they reach new lines of the loader (Pillow's Python among them) or of
the API's parser. Whatever comes must be understood or be a `UserError` of one sentence; anything
else ends the run with status 77, its traceback and the input, which is written to --found.
"""

import argparse
import json
import os
import re
import resource
import shutil
import sys
import tempfile
from pathlib import Path

CORPUS = Path(__file__).parent.parent / "tests" / "corpus"
MEGABYTES = 4000  # of memory: more is a finding
SLOW = 20  # seconds for one input: longer is a finding


def main() -> None:
    """Never returns: the status is libFuzzer's."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.fuzz")
    parser.add_argument("target", choices=["pictures", "requests"])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--found", default=".", metavar="FOLDER", help="where a finding is written")
    options = parser.parse_args()
    try:
        import atheris
    except ImportError:
        sys.exit("atheris must be installed first: pip install -r requirements-dev.txt.")
    with atheris.instrument_imports(include=["minigpt4", "PIL", "pillow_heif"]):
        from minigpt4.model import image  # noqa: F401
        from minigpt4.web.api import schemas  # noqa: F401
    # What reaches something new is kept there; tests/corpus stays as it is.
    with tempfile.TemporaryDirectory() as kept:
        shutil.copytree(CORPUS / options.target, kept, dirs_exist_ok=True)
        # The peak that is measured counts what the process that started this one held.
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        arguments = [
            sys.argv[0],
            f"-max_total_time={options.seconds}",
            f"-rss_limit_mb={before + MEGABYTES}",
            f"-timeout={SLOW}",
            f"-artifact_prefix={Path(options.found)}/",
            kept,
        ]
        child = os.fork()  # libFuzzer ends its process, and would leave the folder
        if not child:
            atheris.Setup(arguments, pictures if options.target == "pictures" else requests)
            atheris.Fuzz()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(status if status >= 0 else 128 - status)


def pictures(data: bytes) -> None:
    """Open the bytes as a picture; what was counted as held must go back."""
    from minigpt4.errors import UserError
    from minigpt4.model import image

    before = image.held.pixels
    try:
        assert image.load(data).rgb.mode == "RGB"
    except UserError as error:
        check(str(error))
    assert image.held.pixels == before, "pixels are counted as held for ever"


def requests(data: bytes) -> None:
    """Read the bytes as the body of a request; its text must be fit to be written as JSON."""
    from minigpt4.errors import UserError
    from minigpt4.web.api.body import parse_body, read_chat

    try:
        asked, _ = read_chat(parse_body(data))
        assert any(message.role == "user" for message in asked.messages)
    except UserError as error:
        check(str(error))
        json.dumps({"error": str(error)})


def check(sentence: str) -> None:
    """Is it one that a stranger may see?"""
    assert sentence.endswith((".", "}}.")) and "\n" not in sentence, sentence
    assert "<" not in sentence, sentence
    own = re.sub("“.*?”", "", sentence)  # between these it may name what it was given
    assert not any(bad in own for bad in ("0x", "Traceback")), sentence


if __name__ == "__main__":
    main()
