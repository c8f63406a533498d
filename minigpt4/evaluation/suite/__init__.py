"""The suite of the abilities experiment: requests about pictures, and the reader of a suite."""

from dataclasses import dataclass
from pathlib import Path

from minigpt4.data.files import read_jsonl
from minigpt4.errors import UserError

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
    """The items of a suite. UserError if a file is missing, or if two items have the same id."""
    path = folder / "suite.jsonl"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a suite: it needs the pictures and suite.jsonl, each line an object "
            "with “id”, “task”, “image” and “instruction”."
        )
    items = [
        Item(
            str(r["id"]),
            str(r["task"]),
            folder / str(r["image"]),
            str(r["instruction"]),
            str(r.get("about", "")),
        )
        for r in read_jsonl(path, "id", "task", "image", "instruction")
    ]
    missing = [i for i in items if not i.picture.is_file()]
    if missing:
        raise UserError(f"The picture {missing[0].picture} of the suite is missing.")
    if not items or len({i.id for i in items}) < len(items):
        raise UserError(f"{path} must contain requests, each with a different “id”.")
    return items
