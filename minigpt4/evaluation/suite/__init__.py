"""The suite of abilities: requests about pictures, and the reader of such a folder."""

from dataclasses import dataclass
from pathlib import Path

from minigpt4.errors import UserError
from minigpt4.evaluation import report

SUITE = Path(__file__).parent


@dataclass(frozen=True)
class Item:
    """One request about one picture."""

    id: str
    task: str
    picture: Path
    instruction: str
    about: str = ""


def read_suite(folder: Path) -> list[Item]:
    """The suite's items; UserError where its file or a picture is missing or two have one id."""
    path = folder / "suite.jsonl"
    if not path.is_file():
        raise UserError(
            f"{folder} is no suite: it needs suite.jsonl, each line an object with “id”, “task”, "
            "“image” and “instruction”, and the pictures."
        )
    items = [
        Item(
            str(r["id"]),
            str(r["task"]),
            folder / str(r["image"]),
            str(r["instruction"]),
            str(r.get("about", "")),
        )
        for r in report.read_lines(path, "id", "task", "image", "instruction")
    ]
    missing = [i for i in items if not i.picture.is_file()]
    if missing:
        raise UserError(f"The picture {missing[0].picture} of the suite is missing.")
    if not items or len({i.id for i in items}) < len(items):
        raise UserError(f"{path} must have requests, each with an “id” of its own.")
    return items
