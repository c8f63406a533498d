"""Objects in captions; which questions are made of them; how answers are read and scored."""

import io
import json
import math
import tarfile

import numpy as np
import pytest

from minigpt4.batch import greedy
from minigpt4.conversation import Conversation, fit
from minigpt4.engine import Engine, Request
from minigpt4.errors import UserError
from minigpt4.evaluation.metrics import auc
from minigpt4.evaluation.objects import Mentions, ObjectList
from minigpt4.evaluation.pope import WAYS, PopeAnswer, beginnings, make_questions, scores
from minigpt4.evaluation.report import interval
from minigpt4.model import image
from tests.evaluation_case import run
from tests.parity_case import ParityCase
from tests.training_case import PARITY, jpeg, picture

OBJECTS = ObjectList()


def mentioned(*captions: str) -> tuple[set[str], set[str]]:
    found = OBJECTS.mentioned(captions)
    return set(found.present), set(found.unclear)


def test_the_list_is_coco_s_eighty():
    assert len(set(OBJECTS.names)) == 80
    assert {"a person", "a hair dryer", "a pair of skis", "any broccoli"} <= set(OBJECTS.names)


@pytest.mark.parametrize(
    ("caption", "present"),
    [
        ("Two puppies and a kitten.", {"a dog", "a cat"}),
        ("A man eats a hot dog.", {"a person", "a hot dog"}),
        ("The woman's teddy-bear lies on the beds.", {"a person", "a teddy bear", "a bed"}),
        ("Knives beside sandwiches and cherries", {"a knife", "a sandwich"}),
        ("A baseball player in a baseball cap", {"a person"}),
        ("A catalogue of doggerel", set()),
        ("A fire truck passes school buses.", {"a truck", "a bus"}),
    ],
)
def test_objects_are_found_in_captions(caption, present):
    assert mentioned(caption)[0] == present


def test_what_may_be_there_is_left_open():
    present, unclear = mentioned("A biker in the street", "He rides a dirt bike.")
    assert {"a motorcycle", "a person"} <= present
    assert {"a bicycle", "a car"} <= unclear and not present & unclear
    present, unclear = mentioned("An orange kite")
    assert present == {"a kite"} and unclear == {"an orange"}


@pytest.mark.parametrize(
    ("caption", "present", "unclear"),
    [
        ("There are no people on the street.", set(), "a person"),
        ("A street without cars, buses or people", set(), "a bus"),
        ("A dog without a leash beside a cat", {"a dog"}, "a cat"),
        ("No cars are to be seen. A dog runs.", {"a dog"}, "a car"),
        ("A notable dog", {"a dog"}, None),
    ],
)
def test_what_is_said_not_to_be_there_is_left_open(caption, present, unclear):
    found = mentioned(caption)
    assert found[0] == present and (unclear in found[1] or unclear is None)
    assert unclear not in mentioned(caption, "Some people, a car, a bus and a cat.")[1]


def test_a_list_of_one_s_own(tmp_path):
    path = tmp_path / "objects.txt"
    path.write_text("# of X-rays\na fracture: fracture, broken bone | crack\n")
    assert ObjectList(path).mentioned(["Broken bones."]).present == {"a fracture"}
    for bad in ("a fracture\n", "a fracture: | crack\n", "# nothing\n", "une fêlure: fêlure\n"):
        path.write_text(bad, encoding="latin-1")
        with pytest.raises(UserError):
            ObjectList(path)


MENTIONS = [
    Mentions(frozenset(present), frozenset(unclear))
    for present, unclear in [
        *[({"a dog", "a ball"}, set())] * 5,
        *[({"a person"}, {"a car"})] * 40,
        ({"a cat", "a car"}, set()),
        (set(), {"a dog"}),
    ]
]


def test_probes_are_balanced_and_true():
    names = ["a dog", "a ball", "a person", "a cat", "a car", "a zebra"]
    probes = make_questions(names, MENTIONS, range(len(MENTIONS)))
    for way in WAYS:
        of = [p for p in probes if p.way == way]
        assert sum(p.there for p in of) * 2 == len(of)
        assert len({(p.picture, p.object) for p in of}) == len(of)
    for p in probes:
        found = MENTIONS[p.picture]
        assert p.object not in found.unclear and p.there == (p.object in found.present)
    assert "a zebra" not in {p.object for p in probes}  # in no picture
    assert 46 not in {p.picture for p in probes}  # it has no object

    def absent(way, picture):
        return [p.object for p in probes if (p.way, p.picture, p.there) == (way, picture, False)]

    assert absent("popular", 0)[0] == "a person"
    assert absent("popular", 5) in (["a dog"], ["a ball"])
    assert {name for i in range(5, 45) for name in absent("random", i)} == {
        "a dog",
        "a ball",
        "a cat",
    }
    assert probes == make_questions(names, MENTIONS, range(len(MENTIONS)))
    assert [p for p in probes if p.picture == 3] == make_questions(names, MENTIONS, [3])


def test_adversarial_objects_stand_beside_the_picture_s_own():
    pairs = [({"a dog", "a ball"}, set())] * 3 + [({"a dog"}, set()), ({"a cat"}, set())]
    pairs += [({"a person"}, set())] * 9
    mentions = [Mentions(frozenset(p), frozenset(u)) for p, u in pairs]
    names = ["a cat", "a person", "a ball", "a dog"]
    found = make_questions(names, mentions, [3])
    chosen = {p.way: p.object for p in found if not p.there}
    assert chosen["adversarial"] == "a ball" and chosen["popular"] == "a person"


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes, there is a dog.", True),
        ("There is no dog. Yes.", False),
        ("NO", False),
        ("A dog runs. Nothing else, I know.", None),
        ("", None),
    ],
)
def test_the_first_yes_or_no_counts(text, read):
    assert PopeAnswer(text, 0.0).read is read


def test_scores():
    pairs = [(True, True), (True, True), (True, None), (False, True), (False, False), (False, None)]
    found = scores(pairs)
    assert found["accuracy"] == 3 / 6 and found["yes_rate"] == 3 / 6 and found["neither"] == 2 / 6
    assert found["precision"] == found["recall"] == pytest.approx(2 / 3) == found["f1"]
    assert found["accuracy_interval"] == list(interval(3, 6))
    assert scores([(True, None), (False, None)])["f1"] == 0
    assert auc([(True, 2.0), (True, 0.0), (False, 0.0), (False, -1.0)]) == 3.5 / 4


def test_watched_log_probabilities_are_the_engine_s_own(tmp_path):
    engine = Engine(ParityCase(PARITY / "vicuna_qformer_a").load())
    conversation = Conversation()
    picture = image.load(ParityCase(PARITY / "vicuna_qformer_a").image_paths[0])
    conversation.add_question("Is there a dog?", [picture])
    prompt, _ = fit(conversation, engine, 4)
    stream = engine.submit(Request(prompt, conversation.pictures, greedy(4), logprobs=True))
    first, best = next(iter(stream)), stream.logprobs[0]
    vocabulary = engine.model.llm.config.vocab_size
    request = Request(prompt, conversation.pictures, greedy(4), watched=tuple(range(vocabulary)))
    watching = engine.submit(request)
    assert len(list(watching)) == 4
    watched = np.array(watching.watched)
    assert watched.argmax() == first and watched[first] == pytest.approx(best, abs=1e-5)
    assert math.fsum(np.exp(watched)) == pytest.approx(1.0, abs=1e-3)
    engine.close()


def test_beginnings_of_yes_and_no():
    tokenizer = ParityCase(PARITY / "vicuna_qformer_a").load().tokenizer
    yes, no = beginnings(tokenizer)
    assert yes and no and not set(yes) & set(no)


def test_the_experiment(tiny, shard, tmp_path, capsys):
    answers = tmp_path / "answers.jsonl"
    described = tmp_path / "val-00000.tar"
    with tarfile.open(described, "w") as tar:
        for i, caption in enumerate(("A dog.", "A cat on a couch.", "Two cats and a bus.")):
            record = json.dumps({"captions": [caption]}).encode()
            for name, content in ((f"{i}.jpg", jpeg(picture(i))), (f"{i}.json", record)):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    options = ["--experiment", "pope", "--limit", 2, "--answers", answers]
    result, page = run(described, *options, out=tmp_path)
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(lines) == result["questions_asked"] and result["n"] == 2
    there = {(line["key"][-1], line["object"]) for line in lines if line["there"]}
    assert there == {("0", "a dog"), ("1", "a cat"), ("1", "a couch")}
    absent = {(line["key"][-1], line["object"]) for line in lines if not line["there"]}
    assert {("1", "a bus"), ("1", "a dog")} <= absent and ("0", "a person") not in absent
    with pytest.raises(AssertionError):  # its pictures all have the same objects
        run(shard, *options, out=tmp_path)
    assert "--objects" in capsys.readouterr().err
    for reading in ("read", "likelihood"):
        assert page.count(f"| {WAYS[0]} |") == 2
        for found in result[reading].values():
            assert 0 <= found["accuracy"] <= 1
            low, high = (round(100 * end) for end in found["accuracy_interval"])
            assert f" {100 * found['accuracy']:.1f} ({low}–{high}) |" in page
    assert "auc" in result["likelihood"]["random"] and "auc" not in result["read"]["random"]
