"""The chat page: options, model and page in one server. See `python app.py --help`."""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from minigpt4 import start
from minigpt4.errors import Unfailing, UserError

if TYPE_CHECKING:
    from minigpt4.engine import Engine


def options(arguments: list[str]) -> argparse.Namespace:
    """Parsed options; each also comes from an environment variable MINIGPT4_…"""
    parser = argparse.ArgumentParser(
        prog="app.py",
        description="MiniGPT-4's chat page, and an OpenAI-compatible API beside it.",
        epilog="Each option can also be set in the environment: MINIGPT4_MAX_QUEUE=8 for example.",
    )
    start.add_model_options(parser)
    start.add_server_options(parser)
    group = parser.add_argument_group("server")
    # On a Space, gradio's own variables say where it is looked for.
    host = os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    port = int(os.environ.get("GRADIO_SERVER_PORT") or 7860)
    group.add_argument("--host", default=host, help="0.0.0.0 lets other machines in")
    group.add_argument("--port", type=int, default=port)
    group.add_argument("--share", action="store_true", help="a public link through gradio's relay")
    group.add_argument("--max-upload-mb", type=positive, default=20, help="largest picture file")
    group.add_argument("--max-queue", type=positive, default=32, help="people waiting, at most")
    group.add_argument(
        "--max-running",
        type=positive,
        default=32,
        help="answers at once, at most (with --llm-url: at each of its servers)",
    )
    group.add_argument(
        "--kv-megabytes", type=positive, help="memory for what conversations have computed"
    )
    group.add_argument("--auth", metavar="USER:PASSWORD", help="the page asks for these")
    group.add_argument("--api-key", metavar="KEY", help="the API asks for this key")
    group.add_argument(
        "--image-hosts",
        metavar="HOSTS",
        help="hosts, with commas between, that the API may fetch pictures from; without it, none",
    )
    group.add_argument("--root-path", metavar="PATH", help="where a proxy shows the page: /chat")
    group.add_argument(
        "--shutdown-seconds",
        type=float,
        default=25.0,
        help="time for answers to end after SIGTERM",
    )
    group.add_argument(
        "--feedback",
        metavar="FOLDER",
        help="store likes and dislikes there, with the conversation's text; without it, no thumbs",
    )
    return parser.parse_args(_from_environment(parser) + arguments)


def positive(text: str) -> int:
    """A whole number above 0; ValueError, of which argparse makes a sentence."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def _from_environment(parser: argparse.ArgumentParser) -> list[str]:
    """The options that the environment sets, as arguments: they are checked like any other."""
    found = []
    for action in parser._actions:
        value = os.environ.get("MINIGPT4_" + action.dest.upper(), "")
        flag = action.option_strings[-1]
        if action.nargs == 0:  # a switch
            found += [flag] if value.lower() not in ("", "0", "false", "no") else []
        elif value:
            found += [f"{flag}={value}"]
    return found


def load(chosen: argparse.Namespace, report: Callable[[str], None]) -> "Engine":
    """The engine that the options ask for; `report` is told what is being done."""

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


def main(arguments: list[str] | None = None) -> int:
    """Start the server; the exit status."""
    chosen = options(sys.argv[1:] if arguments is None else arguments)
    sys.stderr = Unfailing(sys.stderr)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    if "GRADIO_TEMP_DIR" not in os.environ:
        os.environ["GRADIO_TEMP_DIR"] = start.upload_folder()
    try:
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
    except UserError as error:
        print(f"app.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
