"""A page on which people judge answers: one file that needs no server. Its ratings, read again."""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.errors import say
from minigpt4.evaluation.judge import SIDE, Verdict, read_judged, read_rubric
from minigpt4.model import image

if TYPE_CHECKING:
    from minigpt4.evaluation.suite import Item

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
    pictures = {item.id: image.data_url(image.load(item.picture), SIDE) for item in items}
    data = json.dumps({"cards": cards, "pictures": pictures}, ensure_ascii=False)
    # "</script>" in an answer must not end the element that holds the data.
    data = data.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    page = TEMPLATE.read_text(encoding="utf-8").replace("DATA_OF_THE_PAGE", data)
    Path(path).write_text(page, encoding="utf-8")


def read_ratings(
    paths: Iterable[str], answers: Mapping[tuple[str, str], str]
) -> dict[tuple[str, str], list[Verdict]]:
    """(model, item's id) -> what people said of its answer, one verdict a file.

    answers: by the same keys. How many ratings of other answers were left out is said.
    """
    ratings: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for path in paths:
        others = 0
        for record in read_judged(path, "model", "id"):
            key = str(record["model"]), str(record["id"])
            if record.get("answer", answers.get(key)) == answers.get(key):
                ratings[key].append(Verdict(record["fulfilled"], None))
            else:
                others += 1
        if others:
            say(f"Ratings of other answers than these do not count: {others} in {path}.")
    return ratings
