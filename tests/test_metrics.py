"""Caption scores against recorded results of the Java reference; the rules for failed answers."""

import pytest

from minigpt4.evaluation.metrics import (
    caption_scores,
    failure_rates,
    is_fragment,
    is_repetitive,
    ptb_tokens,
)
from tests.running import python

# Expected: pycocoevalcap 1.2's PTBTokenizer (Java, Stanford CoreNLP 3.4.1) on these sentences.
TOKENISED = [
    (
        "A woman can't find her umbrella, and it's raining.",
        "a woman ca n't find her umbrella and it 's raining",
    ),
    (
        "Three of the players' jerseys are red; the keeper's isn't.",
        "three of the players jerseys are red the keeper 's is n't",
    ),
    (
        "They cannot say who's going to win, but they've got to try.",
        "they can not say who 's going to win but they 've got to try",
    ),
    (
        "A well-worn T-shirt hangs by the half-open door - still wet.",
        "a well-worn t-shirt hangs by the half-open door still wet",
    ),
    (
        'The banner reads "Grand Opening" in tall (blue) letters.',
        "the banner reads grand opening in tall -lrb- blue -rrb- letters",
    ),
    (
        "About 1,500 runners set off at 10:30; nearly 2.5% gave up!",
        "about 1,500 runners set off at 10:30 nearly 2.5 % gave up",
    ),
    ("A player with # 12 leaps over No. 7.", "a player with # 12 leaps over no. 7"),
    (
        "“Don’t feed the ducks,” says the keeper’s sign — twice…",
        "do n't feed the ducks says the keeper 's sign twice",
    ),
    (
        "Mr. Ortiz shows a 1960's radio, made in the U.S.A.",
        "mr. ortiz shows a 1960 's radio made in the u.s.a.",
    ),
    ("Wow!! Is that a black/white cow & calf?", "wow !! is that a black/white cow & calf"),
    (
        "Rock 'n' roll fans, aged 7 to 70, dance at 5 p.m. near St. Mary's.",
        "rock 'n' roll fans aged 7 to 70 dance at 5 p.m. near st. mary 's",
    ),
    ("I'm gonna nap\nin the sun 😀", "i 'm gon na nap in the sun"),
    (
        "A café: tables, chairs [all empty] ... and one café cat.",
        "a café tables chairs -lsb- all empty -rsb- and one café cat",
    ),
    ("It costs $5.00, or 1/2 of that at noon.", "it costs $ 5.00 or 1/2 of that at noon"),
]

REFERENCES = {
    "beach": [
        "Two children build a sandcastle on the beach.",
        "A boy and a girl play in the sand by the sea.",
        "Kids are digging in the sand.",
    ],
    "dog": [
        "A brown dog jumps over a log.",
        "The dog's leaping over a fallen tree.",
        "A dog jumps across a log in the forest.",
    ],
    "market": [
        "A woman sells fruit at a street market.",
        "People don't look up as they shop for well-priced fruit.",
    ],
    "bike": [
        "A man rides a bike down a steep hill.",
        "A cyclist in a red helmet is going downhill.",
        "The man's bike kicks up dust.",
    ],
}
ANSWERS = {
    "beach": "Two children play in the sand on the beach.",
    "dog": "A brown dog jumps over a log in the forest",
    "market": "A woman doesn't sell fruit, at a market!",
    "bike": "A man rides a bike.",
}


@pytest.mark.parametrize(("caption", "expected"), TOKENISED)
def test_tokens_are_those_of_the_java_tokeniser(caption, expected):
    assert ptb_tokens(caption) == expected


def test_scores_are_those_of_the_reference(capsys):
    scores = caption_scores(ANSWERS, REFERENCES)
    # Recorded from pycocoevalcap 1.2 with its Java tokeniser.
    expected = {"bleu1": 0.9393939394, "bleu4": 0.6542771082, "cider": 2.6408561665}
    assert scores == pytest.approx(expected, abs=1e-8)
    assert {type(score) for score in scores.values()} == {float}
    assert capsys.readouterr().out == ""


def test_scores_do_not_depend_on_the_order_of_the_pictures():
    shuffled = dict(reversed(ANSWERS.items()))
    assert caption_scores(shuffled, REFERENCES) == pytest.approx(
        caption_scores(ANSWERS, REFERENCES)
    )


def test_an_empty_answer_scores_lower_and_does_not_fail():
    scores = caption_scores(ANSWERS | {"dog": ""}, REFERENCES)
    assert all(
        0 < scores[name] < full for name, full in caption_scores(ANSWERS, REFERENCES).items()
    )


@pytest.mark.parametrize(
    ("answers", "references"),
    [
        ({}, {}),
        ({"a": "A dog."}, {"b": ["A dog."]}),
        ({"a": "A dog."}, {"a": ["A dog."], "b": ["A cat."]}),
        ({"a": "A dog."}, {"a": []}),
    ],
)
def test_scores_refuse_what_does_not_match(answers, references):
    with pytest.raises(ValueError):
        caption_scores(answers, references)


@pytest.mark.parametrize(
    "text",
    [
        "The dog runs fast. A cat sleeps. The dog runs fast!",
        "The dog runs\nthe dog runs",
        "On the left side of the car, on the left side of the road, on the left side of a wall.",
        "red red red",
        "A hat, Red, red, RED",
        "a dog, a dog, a dog",
        "the big dog the big dog the big dog",
    ],
)
def test_repetitive(text):
    assert is_repetitive(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A dog runs on the grass.",
        "Yes. It is red. Yes.",
        "A very, very tall tower with a dog, a cat and a dog.",
        "On the left side of the car, on the left side of the road.",
        "A crowd of 1,000,000,000 or 5:55:55.",
    ],
)
def test_not_repetitive(text):
    assert not is_repetitive(text)


@pytest.mark.parametrize(
    ("text", "when_truncated", "when_ended"),
    [
        # Finished sentences are whole however they ended.
        ("A dog runs on the grass.", False, False),
        ('The sign says "stop!"', False, False),
        ("(It looks cold.) ", False, False),
        ("**It is late.**", False, False),
        ("What a day! 😊", False, False),
        ("What a day! :)", False, False),
        ("一只狗在草地上跑。", False, False),
        ("52.", False, False),
        # Without a full stop, the model's own end counts.
        ("A dog runs on the grass", True, False),
        ("A boy with his coat on", True, False),
        ("The man waits...", True, False),
        ("It is called plan A", True, False),
        ("The shelf is built-in", True, False),
        # These call for more.
        ("A dog runs on the", True, True),
        ("The dog runs. A", True, True),
        ("The dog runs. The", True, True),
        ("A group of", True, True),
        ("A dog, a cat and...", True, True),
        ("A dog,", True, True),
        ("A dog -", True, True),
        ("The steps are:", True, True),
        ("The dog (", True, True),
        ("1. Beat the eggs.\n2.", True, True),
        # No words, no answer.
        ("", True, True),
        ("...", True, True),
        ("😊", True, True),
    ],
)
def test_fragment(text, when_truncated, when_ended):
    assert is_fragment(text, truncated=True) is when_truncated
    assert is_fragment(text, truncated=False) is when_ended


def test_failure_rates():
    answers = ["A dog runs", "A dog runs", "no no no", "A dog runs."]
    assert failure_rates(iter(answers), [True, False, False, True]) == {
        "repetition_rate": 0.25,
        "fragment_rate": 0.25,
        "n": 4,
    }
    with pytest.raises(ValueError):
        failure_rates([], [])
    with pytest.raises(ValueError):
        failure_rates(answers, [True])


def test_import_is_light():
    code = (
        "import sys, minigpt4.evaluation.metrics;"
        "print([m for m in ('torch', 'numpy', 'pycocoevalcap') if m in sys.modules])"
    )
    assert python("-c", code).stdout.strip() == "[]"
