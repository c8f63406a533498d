"""What every page of the project needs of Gradio: a server of its own, and notes that go away."""

import argparse
import html
from typing import Any

import gradio as gr

from minigpt4.errors import UserError

# Seconds that a connection waits for its next request: longer than a proxy keeps it (nginx: 60), or
# a question that is sent while the server closes it meets a reset. Uvicorn's default is 5.
KEEP_ALIVE = 75


def start_server(page: gr.Blocks, options: argparse.Namespace, **settings: Any) -> str:
    """Serve the page in the background; its address. settings: further ones of `Blocks.launch`.

    UserError where options.port of options.host cannot be used.
    """
    try:
        _, address, _ = page.launch(
            server_name=options.host,
            server_port=options.port,
            footer_links=[],
            show_error=False,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            enable_monitoring=False,
            **settings,
        )
    except (OSError, OverflowError):
        raise UserError(
            f"Port {options.port} of {options.host} cannot be used, or is used already: choose "
            "another with --port or --host."
        ) from None
    # Gradio has no option for it; connections read it when they are made.
    page.server.config.timeout_keep_alive = KEEP_ALIVE
    return address.rstrip("/")


def warn(text: str | UserError, seconds: float = 10) -> None:
    """A note that goes away again."""
    gr.Warning(html.escape(str(text)), title="", duration=seconds)  # Gradio shows it as HTML
