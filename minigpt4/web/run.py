"""The start of `app.py` and `minigpt4 serve`: options -> model, page and API in one server."""

import argparse
import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4 import start
from minigpt4.config import get_model
from minigpt4.errors import Unfailing, UserError
from minigpt4.options import Parser
from minigpt4.web.options import add_options

if TYPE_CHECKING:
    from minigpt4.engine import AnyEngine

DESCRIPTION = "Serve the chat page and an OpenAI-compatible API."


def options(arguments: list[str]) -> argparse.Namespace:
    """The options of app.py, from its arguments and the environment."""
    parser = Parser(prog="app.py", description=DESCRIPTION)
    add_options(parser)
    return parser.parse_args(arguments)


def one_by_one(chosen: argparse.Namespace) -> list[argparse.Namespace]:
    """The options for each model that --model names. UserError if they contradict each other."""
    names = [name.strip() for name in chosen.model.split(",")]
    if len(names) == 1:
        return [chosen]
    for name in names:
        get_model(name)
    if len({*names}) < len(names):
        raise UserError("--model names a model twice: name each once.")
    from minigpt4.remote import zerogpu

    if start.given_places(chosen) or chosen.llm_url or zerogpu.is_here():
        raise UserError(
            "Several models are offered with their own weights on this machine: leave out "
            "--projection, --vision, --qformer, --llm and --llm-url, or name one model."
        )
    return [argparse.Namespace(**vars(chosen) | {"model": name}) for name in names]


def load(chosen: argparse.Namespace, report: Callable[[str], None]) -> "AnyEngine":
    """The engine that the options name; `report` receives one line for each step."""

    def say(line: str, passing: bool = False) -> None:
        start.say(line, passing)
        report(line)

    return start.open_engine(
        chosen,
        say,
        chosen.kv_megabytes,
        max_running=chosen.max_running,
        max_waiting=chosen.max_queue,
    )


def upload_folder() -> str:
    """A folder for the page's temporary uploads that only this user can read.

    Old uploads in it are deleted, so it must hold nobody else's files. It is created here. If its
    name is taken by anything else, which another user could arrange, a new folder with a random
    name is created instead.
    """
    if not hasattr(os, "getuid"):  # Windows: each user has a temporary folder
        return str(Path(tempfile.gettempdir(), "minigpt4"))
    folder = Path(tempfile.gettempdir(), f"minigpt4-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()  # does not follow a link
    others = found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not others:
        return str(folder)
    return tempfile.mkdtemp(prefix="minigpt4-")


def serve(chosen: argparse.Namespace) -> None:
    """Run the server until it is told to end. UserError if it cannot start."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    if "GRADIO_TEMP_DIR" not in os.environ:
        os.environ["GRADIO_TEMP_DIR"] = upload_folder()
    from minigpt4.remote import zerogpu
    from minigpt4.web.page.feedback import Feedback
    from minigpt4.web.page.loading import Loading
    from minigpt4.web.page.page import build_page, launch
    from minigpt4.web.server import Server

    # Options are checked before the model is loaded.
    models = one_by_one(chosen)
    server = Server(lambda: loading.engines, chosen)
    feedback = Feedback(chosen.feedback) if chosen.feedback else None
    if zerogpu.is_here():
        loading = Loading.done(zerogpu.open_engine(chosen))
    else:
        loading = Loading(*(partial(load, one) for one in models))
    launch(build_page(loading, feedback, server), chosen, loading, server)


def main(arguments: list[str] | None = None) -> int:
    """The main function of app.py: start the server; returns the exit status."""
    sys.stderr = Unfailing(sys.stderr)  # as the command line does
    chosen = options(sys.argv[1:] if arguments is None else arguments)
    try:
        serve(chosen)
    except UserError as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
