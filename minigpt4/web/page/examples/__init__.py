"""The examples on the empty page. Their pictures: see README.md."""

import logging
from dataclasses import dataclass
from pathlib import Path

from gradio.processing_utils import save_file_to_cache

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Example:
    """picture: its file's name. seed: chosen by reading the answers that mini gives with it
    (weights of 2026-12-01). caption: what the picture shows."""

    picture: str
    question: str
    seed: int
    caption: str

    @property
    def file(self) -> str:
        return str(FOLDER / f"{self.picture}.jpg")

    @property
    def thumbnail(self) -> str:
        return str(FOLDER / "small" / f"{self.picture}.jpg")


# Key of the card's text -> example. The questions are English, as were the models' training data.
EXAMPLES = {
    "poem": Example(
        "tower",
        "Write a short poem about this image.",
        3,
        "A tower of the Summer Palace in Beijing",
    ),
    "story": Example("cat", "Tell a short story about this cat.", 11, "The cat Chelsea"),
    "entitle": Example("dahlia", "Suggest a title for this picture.", 2, "A dahlia"),
    "advertisement": Example(
        "coffee", "Write an advertisement for this product.", 1, "A cup of coffee"
    ),
}


def in_folder(folder: Path) -> set[str]:
    """The paths of Gradio's copies of the pictures. Missing copies are made if the disk has
    room."""
    found, failed = set(), None
    for example in EXAMPLES.values():
        try:
            found.add(save_file_to_cache(example.file, str(folder)))
        except OSError as error:
            failed = error
    if failed:
        log.warning(
            "The examples' pictures could not be copied to %s: %s.", folder, failed.strerror
        )
    return found
