"""A page on which people judge answers: one file that needs no server. Its ratings, read again."""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4 import image
from minigpt4.data_url import data_url
from minigpt4.errors import UserError
from minigpt4.evaluation import report
from minigpt4.evaluation.judge import SIDE, Verdict, read_rubric

if TYPE_CHECKING:
    from minigpt4.evaluation.abilities import Item

TEMPLATE = Path(__file__).parent / "review.html"


def write_page(path: str, items: "Sequence[Item]", models: Mapping[str, Mapping[str, str]]) -> None:
    """All models' answers in one mixed order; the page does not show whose they are."""
    criteria = read_rubric()
    cards = [
        {
            "model": model,
            "id": item.id,
            "picture": item.id,
            "request": item.instruction,
            "criterion": criteria.get(item.task, criteria["other"]),
            "answer": answers[item.id],
        }
        for model, answers in models.items()
        for item in items
        if item.id in answers
    ]
    random.Random(len(cards)).shuffle(cards)
    pictures = {item.id: data_url(image.load(item.picture), SIDE) for item in items}
    data = json.dumps({"cards": cards, "pictures": pictures}, ensure_ascii=False)
    # "</script>" in an answer must not end the element that holds the data.
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    page = TEMPLATE.read_text(encoding="utf-8").replace("DATA_OF_THE_PAGE", data)
    Path(path).write_text(page, encoding="utf-8")


def read_ratings(paths: Iterable[str]) -> dict[tuple[str, str], list[Verdict]]:
    """(model, item's id) -> what people said, one verdict a file."""
    ratings: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for path in paths:
        for record in report.read_lines(path, "model", "id", "fulfilled"):
            if not isinstance(record["fulfilled"], bool):
                raise UserError(f"{path}: “fulfilled” must be true or false.")
            verdict = Verdict(record["fulfilled"], None)
            ratings[str(record["model"]), str(record["id"])].append(verdict)
    return ratings
