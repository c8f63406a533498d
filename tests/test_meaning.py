"""The rule for texts without meaning, and all three rules against a hundred texts labelled by hand.

tests/labelled_texts.jsonl: each text with the ways in which a reader found it to fail (none, one or
more of repetition, fragment, meaningless), and where it is from: 62 are nano's own, with either
stage's projection, 38 were written for this. The labels are one reader's. The rule's thresholds
were chosen with these texts and with people's captions in view: on others it may do worse.
"""

import json
from pathlib import Path

import pytest

from minigpt4.evaluation.meaning import failures, is_meaningless, misshapen, stutters

LABELLED = [
    json.loads(line)
    for line in (Path(__file__).parent / "labelled_texts.jsonl").read_text("utf-8").splitlines()
]


def precision_and_recall(kind: str) -> tuple[float, float]:
    pairs = []
    for record in LABELLED:
        found = getattr(failures(record["text"], record["truncated"]), kind)
        labels = record["failures"]
        pairs.append((found, bool(labels) if kind == "any" else kind in labels))
    right = sum(found and labelled for found, labelled in pairs)
    return right / sum(found for found, _ in pairs), right / sum(label for _, label in pairs)


def test_there_are_a_hundred_texts_good_and_bad():
    assert len({r["text"] for r in LABELLED}) == len(LABELLED) == 100
    good = sum(not r["failures"] for r in LABELLED)
    assert 30 <= good <= 70
    assert sum(r["source"] != "written" for r in LABELLED) >= 60


@pytest.mark.parametrize(
    ("kind", "precision", "recall"),
    # What the rules find is nearly always so. What they miss: things said again in other words, and
    # well-formed nonsense.
    [
        ("repetition", 0.95, 0.7),
        ("fragment", 0.85, 0.85),
        ("meaningless", 0.95, 0.45),
        ("any", 0.97, 0.64),
    ],
)
def test_the_rules_agree_with_a_reader(kind, precision, recall):
    found = precision_and_recall(kind)
    assert found[0] >= precision and found[1] >= recall, found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Nice picture.",
        "###Human: <Img><ImageHere></Img> What is this?",
        "As a large language model, I do not see pictures.",
        "I cannot see the attached image.",
        "Please upload the photo first.",
        "{{ ~~ ^^ || dog << >> ~~ a b",
        "Tower Sony Paris engine velvet Honda purple kitchen",
        "of the in to and with by on at from the",
        "x9f3 ab12cd a quick w0rd",
        "grassDogRunning fieldGreen blueSky",
        "strngth brdwn kmplt in the garden",
        "A собakа runs over the grass.",
    ],
)
def test_without_meaning(text):
    assert is_meaningless(text)


@pytest.mark.parametrize(
    "text",
    [
        "A dog runs.",
        "Two men wearing white suits play guitar onstage.",  # few binding words, as captions have
        "A café in São Paulo sells crème brûlée for $4.50.",
        "It's a USB-C hub; the MV-22 was built in the U.S.A. at 6:30 p.m.",
        "I can't see any boats, but there is a lighthouse.",
        "```html\n<div id='q1w2'>zxcvb</div>\n```",
        "The 3rd runner, No. 12, wears a 1960s T-shirt from McDonald's.",
    ],
)
def test_with_meaning(text):
    assert not is_meaningless(text)


@pytest.mark.parametrize(
    ("text", "does"),
    [
        ("A woman with a hat is wearing a hat.", True),
        ("A boy on a skateboard is jumping over a Skateboard", True),
        ("An apple beside a red bowl and an apple.", True),
        ("A man in a blue kayak and a man in a red kayak.", False),
        ("A dog. A ball. A dog with a ball. A ball again.", False),
        ("A hat and the hat.", False),
    ],
)
def test_stuttering(text, does):
    assert stutters(text) is does


def test_misshapen_words():
    assert not any(map(misshapen, ["rhythm", "NASA", "iPhone", "half-open", "well-worn,", "f/2.8"]))
    assert all(map(misshapen, ["doublePutting", "gr4ss", "brdwn", "pneumonoultramicroscopic"]))
