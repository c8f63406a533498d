"""Yes/no questions about a picture, answered from its captions: “Is there a dog in the image?”."""

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from minigpt4.data.examples import Example, Text
from minigpt4.data.files import prompt_lines
from minigpt4.errors import UserError

_WORDINGS = ("Is there {} in the image?", "Is there {} in this picture?", "Can you see {} here?")
_PER_PICTURE = 3  # questions answered with yes, and as many answered with no
_SHARE_COMMON = 0.7  # of absent things: drawn in proportion to captions; the rest evenly
# Names of people overlap: "a person" may be a man or a girl.
_PEOPLE = {"a person", "a man", "a woman", "a boy", "a girl", "a child"}


def read_things(file: str = "things.txt") -> dict[str, re.Pattern]:
    """The things in a file of `prompts/`: "a dog" -> a pattern of the words that name it."""
    things = {}
    for line in prompt_lines(file):
        name, _, words = line.partition(":")
        things[name.strip()] = re.compile(rf"\b(?:{'|'.join(words.split())})\b", re.IGNORECASE)
    return things


def ask_about(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Questions about `count` of the examples that have several captions.

    Half of the answers are yes, half no. A thing that no caption names may still be in the
    picture, so the questions are about people and things that captions nearly always name.
    """
    things = read_things()
    draw = random.Random(f"questions {seed}")
    several = [example for example in examples if len(example.captions) > 1]
    if not several:
        raise UserError(
            "“--questions” needs pictures with two or more captions: add them with “--replay”, or "
            "omit it."
        )
    named = {
        e.key: [n for n, p in things.items() if p.search(" ".join(e.captions))] for e in several
    }
    common = [name for names in named.values() for name in names]
    asked = []
    for example in draw.sample(several, min(count, len(several))):
        present, absent = _draw_things(list(things), named[example.key], common, draw)
        texts = [_question(name, "Yes.", draw) for name in present]
        texts += [_question(name, "No.", draw) for name in absent]
        if texts:
            asked.append(replace(example, texts=tuple(texts)))
    return asked


def _draw_things(
    things: Sequence[str], named: Sequence[str], common: Sequence[str], draw: random.Random
) -> tuple[list[str], list[str]]:
    """As many things that are in the picture as things that are not."""
    people = any(name in _PEOPLE for name in named)
    possible = [n for n in things if n not in named and not (people and n in _PEOPLE)]
    present = draw.sample(named, min(_PER_PICTURE, len(named), len(possible)))
    absent: list[str] = []
    while len(absent) < len(present):
        name = draw.choice(common if draw.random() < _SHARE_COMMON else possible)
        if name in possible and name not in absent:
            absent.append(name)
    return present, absent


def _question(thing: str, answer: str, draw: random.Random) -> Text:
    return Text(answer, (draw.choice(_WORDINGS).format(thing),))
