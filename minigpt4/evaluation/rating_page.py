"""A page on which people rate answers, one file that needs no server; and the ratings it saves."""

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt4.batch import Completion
from minigpt4.errors import say
from minigpt4.evaluation.judge import SIDE, Verdict, read_judged, read_rubric
from minigpt4.model import image

if TYPE_CHECKING:
    from minigpt4.evaluation.suite import Item

TEMPLATE = Path(__file__).parent / "rating_page.html"


def write_page(
    path: str, items: "Sequence[Item]", models: Mapping[str, Mapping[str, Completion]]
) -> None:
    """Write the answers of all models in random order; the page does not name the models.

    models: name -> item's id -> answer.
    """
    criteria = read_rubric()
    cards = [
        {
            "model": model,
            "id": item.id,
            "picture": item.id,
            "request": item.instruction,
            "criterion": criteria.get(item.task, criteria["other"]),
            "answer": answers[item.id].text,
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
    """(model, item's id) -> the verdicts of people on its answer, one per file.

    answers: by the same keys. Ratings of other answers are counted and ignored. Of several ratings
    of an answer in a file, the last counts.
    """
    ratings: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
    for path in paths:
        others, found = 0, {}
        for record in read_judged(path, "model", "id"):
            key = str(record["model"]), str(record["id"])
            if key in answers and record.get("answer", answers[key]) == answers[key]:
                found[key] = Verdict(record["fulfilled"], None)
            else:
                others += 1
        for key, verdict in found.items():
            ratings[key].append(verdict)
        if others:
            say(f"Ratings of other answers in {path} are ignored: {others}.")
    return ratings
