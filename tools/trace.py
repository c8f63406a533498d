"""python -m tools.trace [PHOTO]: which of the package's files one upload and one chat turn enter.

A profile hook in every thread notes each file when one of its functions is called for the first
time: from the picture's file to its embeddings, and from the question to the streamed text.
config.py is left out: it holds the model's description, which every file reads. The README's trace
is this program's output (`--markdown`); a test keeps the lists short.
"""

import argparse
import io
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from PIL import Image

PACKAGE = Path(__file__).resolve().parents[1] / "minigpt4"
LEFT_OUT = {"config.py"}


class Trace:
    """Files of the package in the order of their first call, each with that function's name."""

    def __init__(self) -> None:
        self._files: dict[str, str] | None = None
        self._last = ""
        threading.setprofile(self._hook)  # of threads that start from now on

    @contextmanager
    def files(self, last: str = "") -> Iterator[dict[str, str]]:
        """The files entered inside the `with`, by any thread, up to the function `last`."""
        self._last, self._files = last, (found := {})
        sys.setprofile(self._hook)
        try:
            yield found
        finally:
            sys.setprofile(None)
            self._files = None

    def _hook(self, frame: FrameType, event: str, _argument: object) -> None:
        files, code = self._files, frame.f_code
        if files is None or event != "call" or code.co_name.startswith("<"):
            return
        path = Path(code.co_filename)
        if path.is_relative_to(PACKAGE):
            name = path.relative_to(PACKAGE).as_posix()
            function = getattr(code, "co_qualname", code.co_name)
            if name not in LEFT_OUT:
                files.setdefault(name, function)
            if function == self._last:
                self._files = None


def trace(photo: bytes, question: str = "What is this?") -> tuple[dict[str, str], dict[str, str]]:
    """(files from upload to embeddings, files from question to streamed text), with nano."""
    from minigpt4 import start
    from minigpt4.conversation import Conversation, ask
    from minigpt4.engine import Engine
    from minigpt4.model import image

    tracer = Trace()
    options = argparse.Namespace(model="nano", quantize="auto", projection=None, device="cpu")
    model = start.open_model(options, report=lambda line, passing=False: None)
    sampling = start.default_sampling(model.config, max_new_tokens=8, seed=1)
    with Engine(model) as engine:
        # What hands the embeddings over; the engine's thread goes on with its next step.
        with tracer.files("Pictures._remember") as upload:
            picture = image.load(photo)
            engine.encode(picture)
        with tracer.files() as turn:
            conversation = Conversation()
            conversation.add_question(question, [picture])
            for _piece in ask(engine, conversation, sampling):
                pass
    return upload, turn


def main() -> None:
    """Print both lists."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m tools.trace")
    parser.add_argument("photo", nargs="?", help="a picture's file; else a plain one is drawn")
    parser.add_argument("--markdown", action="store_true", help="as the README has it")
    options = parser.parse_args()
    upload, turn = trace(Path(options.photo).read_bytes() if options.photo else plain_photo())
    form = "{0}. `{1}` · `{2}`" if options.markdown else "{0:2} {1:24} {2}"
    for title, files in (("upload -> embeddings", upload), ("question -> streamed text", turn)):
        print(f"{title}: {len(files)} files")
        for number, (name, function) in enumerate(files.items(), 1):
            print(form.format(number, name, function))


def plain_photo() -> bytes:
    """A picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (640, 480), "teal").save(file, "JPEG")
    return file.getvalue()


if __name__ == "__main__":
    main()
