"""python -m tools.trace: writes the README's trace: the files that a turn enters, in their order.

A profile hook in every thread notes each file when one of its functions is called for the first
time: from the picture's file to its embeddings and from the question to the streamed text, with
nano and mini; then in web/, from an upload to the answer's end, on the page and over the API.
LEFT_OUT holds what every turn passes by or reads, and details of the file listed before them.

nano's picture enters seven files. Two that could be one stay apart: `image.py`, the way in for
pictures, and `image_file.py`, the decoding of hostile files, which would be 700 lines together.
mini's enters nine, since it has a second encoder and a word head.
"""

import argparse
import io
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from types import FrameType

from PIL import Image

from minigpt4 import start
from minigpt4.conversation import Conversation, ask
from minigpt4.engine import Engine
from minigpt4.model import image

ROOT = Path(__file__).resolve().parents[1]
README, PACKAGE = ROOT / "README.md", ROOT / "minigpt4"
LEFT_OUT = {"config.py", "model/parts.py", "data/word_lists.py", "errors.py", "web/api/errors.py"}
LEFT_OUT |= {"engine/base.py"}  # what `engine.py` inherits
LEFT_OUT |= {f"web/guard/{name}.py" for name in ("gradio_patches", "compression")}
LEFT_OUT |= {f"web/page/{name}.py" for name in ("looks", "texts/__init__", "titles", "versions")}
START, END = "<!-- python -m tools.trace writes from here -->\n", "<!-- to here -->\n"
QUESTION = "What is this?"


class Trace:
    """Files of the package in the order of their first call."""

    def __init__(self) -> None:
        self._files: list[str] | None = None
        self._last = ""
        threading.setprofile(self._hook)  # of threads that start from now on

    @contextmanager
    def files(self, last: str = "") -> Iterator[list[str]]:
        """The files entered inside the `with`, by any thread, up to the function `last`."""
        self._last, self._files = last, (found := [])
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
        if code.co_filename.startswith(str(PACKAGE)):
            name = Path(code.co_filename).relative_to(PACKAGE).as_posix()
            if name not in LEFT_OUT and name not in files:
                files.append(name)
            if getattr(code, "co_qualname", code.co_name) == self._last:
                self._files = None


def open_engine(model: str) -> Engine:
    options = argparse.Namespace(model=model, quantize="auto", projection=None, device="cpu")
    return Engine(start.open_model(options, report=lambda line, passing=False: None))


def trace_model(tracer: Trace, engine: Engine, photo: bytes) -> tuple[list[str], list[str]]:
    """(files from upload to embeddings, files from question to streamed text)."""
    sampling = start.default_sampling(engine.model.config, max_new_tokens=8, seed=1)
    # What hands the embeddings over; the engine's thread goes on with its next step.
    with tracer.files("Pictures._remember") as upload:
        picture = image.load(photo)
        engine.encode(picture)
    with tracer.files() as turn:
        conversation = Conversation.asking(QUESTION, [picture])
        for _piece in ask(engine, conversation, sampling):
            pass
    return upload, turn


def trace_server(tracer: Trace, engine: Engine, photo: bytes) -> tuple[list[str], list[str]]:
    """(files of web/ that a turn on the page enters, those of a streamed turn over the API)."""
    from tests import api_case as case

    with case.served(lambda: engine, engine) as address:
        events = case.page_events(address)
        with tracer.files() as page:
            files = {"files": ("photo.png", photo)}
            [path] = case.web.post(f"{address}/gradio_api/upload", files=files).json()
            box = {
                **case.box(QUESTION),
                "files": [{"path": path, "meta": {"_type": "gradio.FileData"}}],
            }
            for event, values in (("attach", []), ("ask", case.SETTINGS)):
                done = case.page_event(address, events[event], [box, None, *values], "trace")
                assert done and done["success"], done
        with tracer.files() as api:
            asked = [case.question(QUESTION, case.data_url(photo))]
            body = {"model": "nano", "messages": asked, "max_tokens": 8, "stream": True}
            case.web.post(f"{address}/v1/chat/completions", json=body).raise_for_status()
    return tuple([name for name in names if name.startswith("web/")] for names in (page, api))


def trace() -> str:
    """The README's tables."""
    file = io.BytesIO()
    Image.new("RGB", (640, 480), "teal").save(file, "PNG")
    photo, tracer = file.getvalue(), Trace()
    with open_engine("mini") as engine:
        mini = trace_model(tracer, engine, photo)
    with open_engine("nano") as engine:
        nano = trace_model(tracer, engine, photo)
        page, api = trace_server(tracer, engine, photo)
    titles = ("upload, mini", "upload, nano", "question, mini", "question, nano")
    columns = (mini[0], nano[0], mini[1], nano[1])
    rows = [titles, *zip_longest(*columns, fillvalue="")]
    lines = ["".join(f"{cell:22}" for cell in row).rstrip() for row in rows]
    for title, names in (("the page, web/", page), ("the API, web/", api)):
        names = ", ".join(name.removeprefix("web/") for name in names)
        lines += ["", *textwrap.wrap(f"{title:16}{names}", 112, subsequent_indent=" " * 16)]
    return "\n".join(["```", *lines, "```\n"])


def updated(page: str) -> str:
    """The README with the tables of this moment."""
    before, _, rest = page.partition(START)
    return before + START + trace() + END + rest.partition(END)[2]


if __name__ == "__main__":
    README.write_text(updated(README.read_text(encoding="utf-8")), encoding="utf-8")
