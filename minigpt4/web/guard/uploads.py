"""Which files a visitor may name: those that were uploaded, or shown, and no other of this machine.

Gradio looks at most of what comes in, and lets the current folder and all temporary files out.
"""

from pathlib import Path

from gradio.utils import get_upload_folder

from minigpt4.errors import UserError


def uploaded(path: object) -> str:
    """The path. UserError where it is no file in the folder of uploads."""
    folder = Path(get_upload_folder()).resolve()
    try:
        file = Path(path).resolve() if isinstance(path, str) else None
        if file is not None and file.is_relative_to(folder) and file.is_file():
            return path
    except (OSError, ValueError):  # too long, or with a NUL
        pass
    raise UserError("This file is not an uploaded one: upload it again.", message_id="not_uploaded")
