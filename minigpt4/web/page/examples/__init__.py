"""The examples on the empty page. Their pictures: see README.md."""

import logging
from pathlib import Path

from gradio.processing_utils import save_file_to_cache

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
# Name of the label and of the picture -> question. The models were trained on English.
QUESTIONS = {
    "describe": "Describe this image in detail.",
    "story": "Tell a short story about what happens in this image.",
    "poem": "Write a short poem about this image.",
    "advertisement": "Write an advertisement for this product.",
}


def thumbnail(name: str) -> str:
    """The file of an example's small picture."""
    return str(FOLDER / "small" / f"{name}.jpg")


def chosen(index: int) -> tuple[str, str]:
    """An example's question and its picture's file. IndexError where there is none."""
    name, question = [*QUESTIONS.items()][index]
    return question, _picture(name)


def in_folder(folder: Path) -> set[str]:
    """The paths of Gradio's copies of the pictures, which are made where they are missing and the
    disk has room."""
    found, failed = set(), None
    for name in QUESTIONS:
        try:
            found.add(save_file_to_cache(_picture(name), str(folder)))
        except OSError as error:
            failed = error
    if failed:
        log.warning(
            "The examples' pictures could not be copied to %s: %s.", folder, failed.strerror
        )
    return found


def _picture(name: str) -> str:
    return str(FOLDER / f"{name}.jpg")
