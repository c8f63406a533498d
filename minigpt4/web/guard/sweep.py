"""Deletes uploaded files that are old, or were cut, or belong to a process that was killed.

In the place of gradio's own `delete_cache`, which knows nothing of the last two, and ends for good
when a file is uploaded while it looks (gradio 6.31: "Set changed size during iteration").
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder

from minigpt4.web.page import examples

EVERY_SECONDS = 60
CUT_SECONDS = 600  # no upload takes as long (limits.BODY_SECONDS)
KEPT_SECONDS = 24 * 3600  # conversations and uploaded files of visitors who have gone quiet

log = logging.getLogger(__name__)


def sweep(folder: Path) -> None:
    """Deletes what nobody has written to for `KEPT_SECONDS`; an upload under way, sooner.

    The examples' pictures stay: they are made young again, for other processes' sweepers, too.
    """
    now = time.time()
    for path in examples.in_folder(folder):
        os.utime(path)
    # Not Path.rglob, which raises where a folder is deleted while it looks.
    for path in [Path(root, name) for root, _, names in os.walk(folder) for name in names]:
        with contextlib.suppress(OSError):  # somebody else deleted it
            cut = path.parent == folder and path.name.startswith("tmp")
            if now - path.stat().st_mtime > (CUT_SECONDS if cut else KEPT_SECONDS):
                _delete(path, folder)


@asynccontextmanager
async def sweeping(app: Any) -> AsyncIterator[None]:
    """A lifespan: sweeps now and then while the server runs, and deletes this page's files."""
    folder = Path(get_upload_folder())
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def repeat() -> None:
        while True:
            try:
                await asyncio.to_thread(sweep, folder)
                _forget(app.get_blocks())
            except Exception:  # the next look may succeed; without any the disk would fill
                log.exception("old uploads could not be deleted")
            await asyncio.sleep(EVERY_SECONDS)

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        task.cancel()
        shown = set().union(*app.get_blocks().temp_file_sets)
        for path in shown - examples.in_folder(folder):  # another page may show these
            with contextlib.suppress(OSError):
                _delete(Path(path), folder)


def _forget(page: Any) -> None:
    """Gradio lists what was uploaded; these lists must not grow for ever."""
    for files in page.temp_file_sets:
        files -= {path for path in list(files) if not os.path.exists(path)}


def _delete(path: Path, folder: Path) -> None:
    path.unlink()
    if path.parent != folder:
        path.parent.rmdir()  # OSError where there is more in it
