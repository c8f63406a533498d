"""`app.py` and `minigpt4 serve`: options -> model, page and API in one server."""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from minigpt4 import start
from minigpt4.errors import Unfailing, UserError
from minigpt4.options import (
    SERVER,
    Parser,
    add_model_options,
    add_remote_llm_options,
)

if TYPE_CHECKING:
    from minigpt4.engine import AnyEngine

DESCRIPTION = "Serve the chat page and an OpenAI-compatible API."


def add_options(parser: Parser) -> None:
    """The server's options."""
    add_model_options(parser)
    add_remote_llm_options(parser)
    parser.add(SERVER, "server")


def options(arguments: list[str]) -> argparse.Namespace:
    """The options of app.py, from its arguments and the environment."""
    parser = Parser(prog="app.py", description=DESCRIPTION)
    add_options(parser)
    return parser.parse_args(arguments)


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


def serve(chosen: argparse.Namespace) -> None:
    """Run the server until it is told to end. UserError for what keeps it from starting."""
    sys.stderr = Unfailing(sys.stderr)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    if "GRADIO_TEMP_DIR" not in os.environ:
        os.environ["GRADIO_TEMP_DIR"] = start.upload_folder()
    from minigpt4.remote import zerogpu
    from minigpt4.web.page.feedback import Feedback
    from minigpt4.web.page.loading import Loading
    from minigpt4.web.page.page import build_page, launch
    from minigpt4.web.server import Server

    # Options are checked before the model is loaded.
    server = Server(lambda: loading.engine, chosen)
    feedback = Feedback(chosen.feedback) if chosen.feedback else None
    if zerogpu.is_here():
        loading = Loading.done(zerogpu.open_engine(chosen))
    else:
        loading = Loading(partial(load, chosen))
    launch(build_page(loading, feedback, server), chosen, loading, server)


def main(arguments: list[str] | None = None) -> int:
    """app.py: start the server; the exit status."""
    chosen = options(sys.argv[1:] if arguments is None else arguments)
    try:
        serve(chosen)
    except UserError as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
