"""The mixture of texts that small models learn: captions, descriptions, questions, tasks, absent
things.

Each time a picture is shown, several of its texts are drawn: they share the cost of reading its
prompt.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from minigpt4.data import examples, shards
from minigpt4.data.captions import NAMED
from minigpt4.data.examples import Example
from minigpt4.data.files import (
    decode,
    load_json,
    parse_jsonl,
    printable,
    prompt_lines,
    read_text,
    repeated_in,
    shortened,
)
from minigpt4.data.names import is_hidden
from minigpt4.errors import UserError, say
from minigpt4.training.questions import read_things
from minigpt4.training.word_head import fold_of

Turn = tuple[str, str]  # (question, answer)

# The weight of an answer's token: people's captions, machines' captions, descriptions, tasks. There
# are several short captions for each long text: with equal weights and no adapters, a request for
# details or a poem was answered with a caption after 180 steps.
BRIEF, SHORT, LONG, TASK = 1.0, 0.6, 1.2, 2.0
# The weight of a one-word answer, which then counts as much as a short caption: at a weight of one,
# “no” was more likely for nearly every question.
DECISION = 6.0
# The weight of “yes” relative to “no”: with equal weights, 42 % of the answers were “yes”, and 51 %
# should have been.
YES = 1.5
# One in so many pictures is kept for validation.
HELD_OUT = {"captioned": 4, "described": 20, "drawn": 20}
# Fields of a shard's record: lists of pairs, of a text and what is given here.
_PAIRED = {"questions": str, "statements": bool, "knowledge": str}
_PEOPLE = {"a person", "a man", "a woman", "a child"}
_ASKED = (
    "Is there {} in the image?",
    "Is there {} in this picture?",
    "Can you see {} in the photo?",
    "Do you see {} here?",
)
# Requests for machine-written captions, which are longer than people's, for which “briefly” asks.
_ONE_SENTENCE = (
    "Describe this image in one sentence.",
    "Write one sentence about what this picture shows.",
    "Write an alt text for this image.",
)
_UNUSUAL = (
    "What is unusual about this image?",
    "What is unusual about this picture?",
    "Is anything unusual here?",
    "What is strange about this photo?",
)
_ORDINARY = 0.08  # how often it is learned that a picture shows nothing unusual
_PREMISES = (  # questions about things that are not there
    "What colour is the {}?",
    "Where is the {}?",
    "Describe the {}.",
    "What is the {} like?",
)

_NOT_TOLD = 0.15  # how often a question that the picture does not answer is learned
_NO_PICTURE = 0.2  # how often a question is asked without the picture
_WHAT = 0.15  # how often “What is this?” asks for a caption


@dataclass(frozen=True)
class TrainingPicture:
    """A picture and the texts of people and machines about it."""

    example: Example
    source: str  # "described" or "captioned" (COCO), "flickr", "named", "instructed" or "drawn"
    captions: tuple[str, ...] = ()
    description: str = ""
    pairs: tuple[Turn, ...] = ()
    task: Turn | None = None
    statements: tuple[tuple[str, bool], ...] = ()
    knowledge: tuple[Turn, ...] = ()
    written: bool = False  # has texts from `with_texts`
    things: frozenset[int] = field(default=frozenset(), compare=False)  # of Things, that texts name

    @property
    def key(self) -> str:
        return self.example.key

    @property
    def group(self) -> str:
        """What a step's shares of the pictures go by: the source, or "written"."""
        return "written" if self.written else self.source

    @property
    def held_out(self) -> bool:
        """Is it kept for validation?"""
        share = HELD_OUT.get(self.source)
        if not share:
            return False
        return fold_of(f"held out {self.key.rsplit('/', 1)[-1]}", share) == 0

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts that say what the picture shows; answers beginning with “No” are excluded."""
        answered = tuple(answer for _, answer in self.pairs if not answer.startswith("No"))
        return (*self.captions, *((self.description,) if self.description else ()), *answered)


@dataclass(frozen=True)
class Answered:
    """A conversation about a picture; its last answer is learned, each token with `weight`.

    pictured: whether the picture is shown.
    """

    turns: tuple[Turn, ...]
    weight: float = 1.0
    kind: str = ""
    pictured: bool = True


class Things:
    """The objects of yes/no questions (`prompts/objects.txt`)."""

    def __init__(self) -> None:
        found = read_things("objects.txt")
        self.names, self._patterns = list(found), list(found.values())
        self.popular: list[int] = []

    def count(self, pictures: Sequence[TrainingPicture]) -> list[TrainingPicture]:
        """The pictures with `things` filled in; notes which objects are popular."""
        found = []
        for picture in pictures:
            text = " ".join(picture.texts)
            there = frozenset(i for i, p in enumerate(self._patterns) if p.search(text))
            found.append(replace(picture, things=there))
        seen = Counter(thing for picture in found for thing in picture.things)
        self.popular = [thing for thing, _ in seen.most_common(24)]
        return found

    def absent(self, picture: TrainingPicture, draw: random.Random) -> int:
        """An object that no text names: half of the time a popular one."""
        people = any(self.names[i] in _PEOPLE for i in picture.things)
        choices = self.popular if draw.random() < 0.5 else range(len(self.names))
        missing = [
            i
            for i in choices
            if i not in picture.things and not (people and self.names[i] in _PEOPLE)
        ]
        return draw.choice(missing or [len(self.names) - 1])


def read_pictures(pattern: str) -> list[TrainingPicture]:
    """The pictures of shards whose JSON may hold "description", "questions", "task", "statements"
    and "knowledge" besides captions."""
    pictures = []
    for path in shards.expand(pattern):
        records = _records(path)
        if odd := [key for key, record in records.items() if not _is_whole(record)]:
            names = "; ".join(map(shortened, odd[:NAMED])) + ("; …" if len(odd) > NAMED else "")
            say(f"{printable(path)}: texts of unknown form are left out of {len(odd):,} ({names}).")
        for example in examples.read_shards(str(path)):
            pictures.append(_picture(example, records.get(example.key.partition("/")[2], {})))
    return pictures


def _records(shard: Path) -> dict[str, dict]:
    """Key -> contents of KEY.json. Damaged ones, and those that have a field more than once, are
    skipped; `read_shards` reports them."""
    found = {}
    for name, place in shards.members(shard).items():
        if not name.lower().endswith(".json") or is_hidden(name):
            continue
        with suppress(ValueError, RecursionError):
            record = load_json(decode(shards.read_at(shard, *place)))
            if isinstance(record, dict) and repeated_in(record) is None:
                found[name.removeprefix("./").rpartition(".")[0]] = record
    return found


def _picture(example: Example, record: dict) -> TrainingPicture:
    description = record.get("description")
    description = description.strip() if isinstance(description, str) else ""
    if record.get("drawn"):
        source = "drawn"
    elif description:
        source = "described"
    elif len(example.captions) == 1:
        source = "named"
    else:
        source = "captioned" if record.get("coco_id") is not None else "flickr"
    return TrainingPicture(
        example,
        source,
        example.captions,
        description,
        _pairs(record.get("questions")),
        next(iter(_pairs([record.get("task")])), None),
        _pairs(record.get("statements"), bool),
        _pairs(record.get("knowledge")),
    )


def _is_whole(record: dict) -> bool:
    """Whether all that `_picture` looks at in a record has the form that it takes."""
    lists = [(record.get(name) or [], kind) for name, kind in _PAIRED.items()]
    lists += [([task] if (task := record.get("task")) is not None else [], str)]
    whole = (
        isinstance(found, list) and len(_pairs(found, kind)) == len(found) for found, kind in lists
    )
    return isinstance(record.get("description") or "", str) and all(whole)


def _pairs(given: object, kind: type = str) -> tuple:
    """The pairs of a text and a `kind` in a list; other items are left out."""
    return tuple(
        (pair[0], pair[1])
        for pair in (given if isinstance(given, list) else [])
        if isinstance(pair, list) and len(pair) == 2
        if isinstance(pair[0], str) and isinstance(pair[1], kind)
    )


def read_instructed(folder: str | Path, instructions: str | Path | None) -> list[TrainingPicture]:
    """The pictures in the second stage's layout: with descriptions, and some with pairs of
    instruction and answer."""
    asked = examples.read_instructions(instructions, folder) if instructions else []
    pairs = {e.key: tuple((t.instructions[0], t.answer) for t in e.texts) for e in asked}
    return [
        TrainingPicture(
            example,
            "instructed",
            description=example.texts[0].answer,
            pairs=pairs.get(example.key, ()),
        )
        for example in examples.read_descriptions(folder)
    ]


def is_for_validation(name: str) -> bool:
    """Are all pictures of the data set with this name kept for validation?"""
    return name.startswith("val")


def with_texts(
    sets: dict[str, list[TrainingPicture]], file: Path
) -> dict[str, list[TrainingPicture]]:
    """The data sets, with further texts about COCO's and Flickr8k's pictures.

    file: JSON lines of a picture's "key" and "description", "questions" or "task", as in a shard,
    which replace its own. Pictures kept for validation stay as they are. UserError for texts of
    unknown form.
    """
    texts = {}
    for number, record in parse_jsonl(file, read_text(file), "key"):
        key = record["key"]
        if not (isinstance(key, str) and _is_whole(record)):
            raise UserError(
                f"Line {number} of {printable(file)} must have texts as “key” and “description”, a "
                "pair of texts as “task”, and a list of such pairs as “questions”: correct it."
            )
        if key in texts:
            raise UserError(
                f"Line {number} of {printable(file)} is about a picture that an earlier line is "
                "about: make one line of both."
            )
        texts[key] = record

    def told(picture: TrainingPicture) -> TrainingPicture:
        if picture.source not in ("captioned", "flickr", "described") or picture.held_out:
            return picture
        if (record := texts.pop(picture.key, None)) is None:
            return picture
        new = _picture(picture.example, record)
        return replace(
            picture,
            description=new.description or picture.description,
            pairs=new.pairs or picture.pairs,
            task=new.task or picture.task,
            written=True,
        )

    found = {
        name: pictures if is_for_validation(name) else list(map(told, pictures))
        for name, pictures in sets.items()
    }
    if texts:
        names = "; ".join(map(shortened, list(texts)[:NAMED])) + "; …" * (len(texts) > NAMED)
        say(f"{printable(file)}: {len(texts):,} are about no picture to learn from ({names}).")
    return found


def sentence(words: str) -> str:
    """A word or two, written as a sentence."""
    return words[:1].upper() + words[1:] + "."


def name_of(picture: TrainingPicture) -> str:
    """The name in the only caption, "A photo of …"."""
    caption = picture.captions[0].strip().rstrip(".")
    return sentence(re.sub("^a photo of ", "", caption, flags=re.IGNORECASE))


def ordinary(caption: str) -> str:
    """The answer for an ordinary picture to the question what is unusual in it."""
    caption = caption.strip()
    return f"I see nothing unusual in this picture. {caption[:1].upper()}{caption[1:]}"


def read_turns(name: str) -> list[Turn]:
    """The questions and answers in a file of `prompts/`.

    not-told.txt: questions that pictures, or small encoders, cannot answer, with honest answers.
    no-picture.txt: questions in chats without a picture; the first answer fits requests, too.
    """
    pairs = (line.partition(" | ") for line in prompt_lines(name))
    return [(asked, answer) for asked, _, answer in pairs]


class Mixture:
    """Draws the texts that are learned each time a picture is shown."""

    def __init__(self, objects: Things) -> None:
        self.objects = objects
        self.short = prompt_lines("caption.txt")
        self.detailed = prompt_lines("alignment.txt")
        turns = read_turns("not-told.txt")
        self.not_told = {a: [t for t in turns if t[1] == a] for a in sorted({a for _, a in turns})}
        self.no_picture = read_turns("no-picture.txt")

    def draw(self, picture: TrainingPicture, draw: random.Random) -> list[Answered]:
        """The conversations to learn when the picture is shown once: one to twelve."""
        parts: dict[str, Callable] = {
            "captioned": self._captioned,
            "flickr": self._captioned,
            "described": self._described,
            "named": self._named,
            "instructed": self._instructed,
            "drawn": self._drawn,
        }
        texts = parts[picture.source](picture, draw)
        unknown = self._not_told(picture, draw) + self._no_picture(draw)
        return [*texts, *self.presence(picture, draw), *unknown]

    def _not_told(self, picture: TrainingPicture, draw: random.Random) -> list[Answered]:
        """Sometimes a question that the picture does not answer. Not for pictures with a stop sign,
        which can be read."""
        if draw.random() >= _NOT_TOLD or any("stop sign" in text for text in picture.texts):
            return []
        turns = draw.choice([*self.not_told.values()])  # each answer as often as the others
        return [Answered((draw.choice(turns),), kind="not told")]

    def _no_picture(self, draw: random.Random) -> list[Answered]:
        """Sometimes a question that is asked without a picture."""
        if draw.random() >= _NO_PICTURE:
            return []
        asked, answer = draw.choice(self.no_picture)
        if draw.random() < 0.25:
            asked = draw.choice([*self.short, *self.detailed])
            answer = self.no_picture[0][1]
        return [Answered(((asked, answer),), kind="no picture", pictured=False)]

    def _captioned(self, picture: TrainingPicture, draw: random.Random) -> list[Answered]:
        captions = draw.sample(picture.captions, min(3, len(picture.captions)))
        # The same question for all captions, so that they share their prompt.
        asked = "What is this?" if draw.random() < _WHAT else draw.choice(self.short)
        found = [Answered(((asked, c.strip()),), BRIEF, "caption") for c in captions]
        found += self._ordinary(picture, draw) + self._known(picture)
        if picture.description:
            detail = (draw.choice(self.detailed), picture.description)
            found.append(Answered((detail,), LONG, "description"))
        found += [self._question(pair, draw) for pair in picture.pairs]
        if picture.task:
            found.append(Answered((picture.task,), TASK, "task"))
        return found

    def _described(self, picture: TrainingPicture, draw: random.Random) -> list[Answered]:
        caption = (draw.choice(_ONE_SENTENCE), draw.choice(picture.captions).strip())
        detail = (draw.choice(self.detailed), picture.description)
        found = [Answered((caption,), SHORT, "caption"), Answered((detail,), LONG, "description")]
        pairs = draw.sample(picture.pairs, min(2, len(picture.pairs)))
        if len(pairs) == 2 and draw.random() < 0.4:  # the second asked after the first's answer
            found += [Answered(tuple(pairs[:1]), kind="question")]
            found += [Answered(tuple(pairs), kind="follow-up")]
        else:
            found += [self._question(pair, draw) for pair in pairs]
        if picture.task:
            found.append(Answered((picture.task,), TASK, "task"))
        else:
            found += self._ordinary(picture, draw)
        for statement, right in picture.statements[:1]:
            asked = f"True or false: {statement}"
            answer = "True." if right else "False."
            found.append(Answered(((asked, answer),), DECISION / 2, "statement"))
        return found + self._known(picture)

    def _drawn(self, picture: TrainingPicture, draw: random.Random) -> list[Answered]:
        caption = (draw.choice(self.short), draw.choice(picture.captions).strip())
        found = [Answered((caption,), SHORT, "caption")]
        if draw.random() < 0.5:
            detail = (draw.choice(self.detailed), picture.description)
            found.append(Answered((detail,), LONG, "description"))
        pairs = draw.sample(picture.pairs, min(2, len(picture.pairs)))
        found += [self._question(pair, draw) for pair in pairs]
        if picture.task:
            found.append(Answered((picture.task,), TASK, "task"))
        return found

    @staticmethod
    def _question(pair: Turn, draw: random.Random) -> Answered:
        """A question and its answer; if that begins with yes or no, sometimes only this word."""
        asked, answer = pair
        word = answer.split(",")[0].rstrip(".")
        if word not in ("Yes", "No"):
            return Answered((pair,), kind="question")
        if draw.random() < 0.35:
            turn = (f"{asked} Answer yes or no.", f"{word}.")
            return Answered((turn,), DECISION / 2, "question")
        return Answered((pair,), 2.0, "question")

    @staticmethod
    def _ordinary(picture: TrainingPicture, draw: random.Random) -> list[Answered]:
        """Sometimes a question about what is unusual; the answer: nothing, and a caption."""
        if draw.random() >= _ORDINARY:
            return []
        turn = (draw.choice(_UNUSUAL), ordinary(draw.choice(picture.captions)))
        return [Answered((turn,), kind="ordinary")]

    def _named(self, picture: TrainingPicture, draw: random.Random) -> list[Answered]:
        asked = "What does this picture show? Answer in one word."
        return [Answered(((asked, name_of(picture)),), kind="name")]

    def _instructed(self, picture: TrainingPicture, draw: random.Random) -> list[Answered]:
        detail = (draw.choice(self.detailed), picture.description)
        pairs = [Answered((pair,), TASK, "task") for pair in picture.pairs]
        return [Answered((detail,), LONG, "description"), *pairs]

    def _known(self, picture: TrainingPicture) -> list[Answered]:
        found = []
        for asked, answer in picture.knowledge[:1]:
            turn = (f"{asked} Answer in a word or two.", sentence(answer))
            found.append(Answered((turn,), kind="knowledge"))
        return found

    def presence(self, picture: TrainingPicture, draw: random.Random) -> list[Answered]:
        """As many questions answered with yes as with no, at most two each; sometimes one about an
        object that is not there."""
        there = draw.sample(sorted(picture.things), min(2, len(picture.things)))
        found = [self._asked(self.objects.names[thing], True, draw) for thing in there]
        for _ in there:
            name = self.objects.names[self.objects.absent(picture, draw)]
            found.append(self._asked(name, False, draw))
        name = self.objects.names[self.objects.absent(picture, draw)]
        if draw.random() < 0.2 and name.startswith(("a ", "an ")):
            thing = name.split(" ", 1)[1]
            asked = draw.choice(_PREMISES).format(thing)
            found.append(Answered(((asked, f"There is no {thing} in this picture."),), 1.0, "none"))
        return found

    def _asked(self, name: str, there: bool, draw: random.Random) -> Answered:
        asked = draw.choice(_ASKED).format(name)
        if draw.random() < 0.6:
            turn = (asked + " Answer yes or no.", "Yes." if there else "No.")
            return Answered((turn,), DECISION * (YES if there else 1.0), "presence")
        thing = re.sub("^an? ", "", name)
        are = "are" if thing in ("skis", "scissors") else "is"
        yes, no = f"Yes, there {are} {name} in it.", f"No, there {are} no {thing} in it."
        weight = 1.5 * (YES if there else 1.0)
        return Answered(((asked, yes if there else no),), weight, "presence")
