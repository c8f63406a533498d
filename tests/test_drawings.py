"""The texts of the drawings that mini learns from (tools/compose_drawings.py)."""

import random

import pytest

from minigpt4.data.examples import Example
from minigpt4.training.mixture import Mixture, Things, TrainingPicture
from tools.compose_drawings import PLAIN, TABLE, Thing, chosen, texts

THINGS = [
    Thing("1f415", "animal", "dog"),
    Thing("1f436", "animal", "dog"),
    Thing("1f95e", "food", "pancakes"),
    Thing("1f355", "food", "pizza"),
    Thing("1f511", "object", "key"),
]


def test_what_is_shown_has_different_names_and_what_is_absent_another():
    for number in range(300):
        shown, absent = chosen(THINGS, number, random.Random(number))
        names = [thing.name for thing in shown]
        assert len({*names, absent.name}) == len(names) + 1


@pytest.mark.parametrize(
    ("thing", "called"),
    [
        (Thing("", "animal", "ewe"), "a ewe"),
        (Thing("", "animal", "owl"), "an owl"),
        (Thing("", "object", "one-piece swimsuit"), "a one-piece swimsuit"),
        (Thing("", "food", "pancakes"), "pancakes"),
        (Thing("", "food", "bread"), "bread"),
        (Thing("", "place", "bus"), "a bus"),
        (Thing("", "food", "plate of curry with rice"), "a plate of curry with rice"),
    ],
)
def test_articles(thing, called):
    assert thing.called() == called


def test_texts_say_what_is_shown_and_where():
    dog, _, pancakes, pizza, key = THINGS
    record = texts([pancakes], ["pancakes"], TABLE, key, random.Random(0))
    assert record["captions"][0] == "A drawing of pancakes on a plate."
    assert record["captions"][2] == "A cartoon of some pancakes on a plate."
    assert "They are in the middle. The plate is on a table." in record["description"]
    answers = dict(record["questions"])
    assert answers["Is there a key in this picture?"] == "No, it shows pancakes."
    assert answers["What food is this?"] == "Pancakes."
    both = texts([dog, pizza], ["a dog", "a pizza"], PLAIN, key, random.Random(0))
    assert "The dog is on the left, and the pizza is on the right." in both["description"]
    assert dict(both["questions"])["What is next to the dog?"] == "A pizza."


def test_a_drawing_is_learned_with_its_own_texts():
    record = texts([THINGS[0]], ["a dog"], PLAIN, THINGS[4], random.Random(0))
    drawing = TrainingPicture(
        Example("1", lambda: b"", ()),
        "drawn",
        tuple(record["captions"]),
        record["description"],
        tuple(map(tuple, record["questions"])),
        ("Write a poem about this picture.", "A dog,\na log."),
    )
    objects = Things()
    drawing = objects.count([drawing])[0]
    drawn = [t for n in range(40) for t in Mixture(objects).draw(drawing, random.Random(n))]
    kinds = {text.kind for text in drawn}
    assert {"caption", "description", "question", "task", "presence"} <= kinds
    said = {text.turns[-1][1] for text in drawn if text.kind in ("caption", "description")}
    assert said <= {*drawing.captions, drawing.description}
    weights = {t.turns[-1][1]: t.weight for t in drawn if t.kind == "presence"}
    assert weights["Yes."] == 1.5 * weights["No."]
