"""Questions that captions answer: "Is there a dog in the image?" Yes where one of them says so."""

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from minigpt4.errors import UserError
from minigpt4.training.data import Example, Text, read_lines

_ASKED = (
    "Is there {} in the image?",
    "Is there {} in this picture?",
    "Can you see {} here?",
)
_A_PICTURE = 3  # questions with yes, and as many with no
_SHARE_SEEN = 0.7  # of the absent things: as common as in the captions; the rest evenly


def read_things() -> dict[str, re.Pattern]:
    """What `prompts/things.txt` names: "a dog" -> a pattern for the words that speak of one."""
    things = {}
    for line in read_lines("things.txt"):
        name, _, words = line.partition(":")
        things[name.strip()] = re.compile(rf"\b(?:{'|'.join(words.split())})\b", re.IGNORECASE)
    return things


def ask_about(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """`count` of the examples that have several captions, asked what is there and what is not.

    As many questions are answered with yes as with no. That no caption speaks of a thing does not
    prove it absent: the people and the things asked about are those that captions do not leave out
    when they are in view, nearly always.
    """
    things = read_things()
    draw = random.Random(f"questions {seed}")
    several = [example for example in examples if len(example.captions) > 1]
    if not several:
        raise UserError(
            "“--questions” are made from captions, and there are no pictures with two or more of "
            "them: give such pictures by “--replay”, or leave it out."
        )
    seen = {
        e.key: [n for n, p in things.items() if p.search(" ".join(e.captions))] for e in several
    }
    common = [name for names in seen.values() for name in names]
    asked = []
    for example in draw.sample(several, min(count, len(several))):
        there = seen[example.key]
        # People are called many things: "a person" may be a man or a girl.
        people = any(name in _PEOPLE for name in there)
        absent = [n for n in things if n not in there and not (people and n in _PEOPLE)]
        present = draw.sample(there, min(_A_PICTURE, len(there), len(absent)))
        missing: list[str] = []
        while len(missing) < len(present):
            name = draw.choice(common if draw.random() < _SHARE_SEEN else absent)
            if name in absent and name not in missing:
                missing.append(name)
        texts = [_question(name, "Yes.", draw) for name in present]
        texts += [_question(name, "No.", draw) for name in missing]
        if texts:
            asked.append(replace(example, texts=tuple(texts)))
    return asked


_PEOPLE = {"a person", "a man", "a woman", "a boy", "a girl", "a child"}


def _question(thing: str, answer: str, draw: random.Random) -> Text:
    return Text(answer, (draw.choice(_ASKED).format(thing),))
