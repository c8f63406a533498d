"""Uploaded files: which of them a visitor may name, and when they are deleted.

Gradio checks most paths, but allows the current folder and all temporary files. `sweeping` replaces
its `delete_cache`, which deletes neither interrupted uploads nor those of a killed process, and
stops for good if a file arrives while it runs (gradio 6.31: "Set changed size during iteration").
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder

from minigpt4.errors import UserError

EVERY_SECONDS = 60
CUT_SECONDS = 600  # an older upload was interrupted: none takes as long (limits.BODY_SECONDS)
KEPT_SECONDS = 24 * 3600  # conversations and uploaded files of visitors who have gone quiet

log = logging.getLogger(__name__)


def uploaded(path: object) -> str:
    """The path. UserError if it is not a file in the folder of uploads."""
    folder = Path(get_upload_folder()).resolve()
    if isinstance(path, str):
        with contextlib.suppress(OSError, ValueError):  # too long, or with a NUL
            file = Path(path).resolve()
            if file.is_relative_to(folder) and file.is_file():
                return path
    raise UserError("This file was not uploaded here: upload it again.", message_id="not_uploaded")


def sweep(folder: Path, kept: Collection[str] = ()) -> None:
    """Delete files that were not written to for `KEPT_SECONDS`, and interrupted uploads sooner.

    Files in `kept` stay, and get the current date so that other processes keep them, too.
    """
    now = time.time()
    for name in kept:
        os.utime(name)
    # Not Path.rglob, which raises if a folder disappears meanwhile.
    for path in [Path(root, file) for root, _, files in os.walk(folder) for file in files]:
        with contextlib.suppress(OSError):  # another process deleted it
            cut = path.parent == folder and path.name.startswith("tmp")
            if now - path.stat().st_mtime > (CUT_SECONDS if cut else KEPT_SECONDS):
                _delete(path, folder)


@asynccontextmanager
async def sweeping(
    app: Any, kept: Callable[[Path], Collection[str]] = lambda folder: ()
) -> AsyncIterator[None]:
    """A lifespan: sweep every minute while the server runs; at its end, delete its own uploads.

    kept: folder -> the files in it that must stay, such as the examples' pictures.
    """
    folder = Path(get_upload_folder())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def repeat() -> None:
        while True:
            try:
                await asyncio.to_thread(lambda: sweep(folder, kept(folder)))
                # Gradio keeps sets of uploaded files' paths, which must not grow for ever.
                for files in app.get_blocks().temp_file_sets:
                    files -= await asyncio.to_thread(_missing, list(files))
            except Exception:  # go on: the next attempt may succeed
                log.exception("Old uploads could not be deleted.")
            await asyncio.sleep(EVERY_SECONDS)

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        task.cancel()
        shown = set().union(*app.get_blocks().temp_file_sets)
        for path in shown - set(kept(folder)):  # another page may show these
            with contextlib.suppress(OSError):
                _delete(Path(path), folder)


def _missing(paths: list[str]) -> set[str]:
    return {path for path in paths if not os.path.exists(path)}


def _delete(path: Path, folder: Path) -> None:
    path.unlink()
    if path.parent != folder:
        path.parent.rmdir()  # OSError if it is not empty
