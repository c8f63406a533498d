"""The training of small models: vocabulary, word head, mixture of texts, trainer."""

import io
import json
import random
import re
import signal
import tarfile
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt4.__main__ import main
from minigpt4.batch import greedy
from minigpt4.config import MODELS, Words, get_model
from minigpt4.conversation import Conversation, ask
from minigpt4.data.examples import Example
from minigpt4.engine import Engine
from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.model.detector import OBJECTS
from minigpt4.model.minigpt4 import MiniGPT4
from minigpt4.model.prompt import ImageRef
from minigpt4.model.words import WordHead, choose, load_words, with_objects
from minigpt4.training import int8, run, small_run, small_start, word_head
from minigpt4.training.mixture import (
    Answered,
    Mixture,
    Things,
    TrainingPicture,
    read_pictures,
    read_turns,
    with_texts,
)
from minigpt4.training.packing import pack
from minigpt4.training.selfcritical import sample
from minigpt4.training.small import SmallRecipe, SmallTrainer, TrainingSource, occurring_tokens
from minigpt4.training.small_reward import CaptionReward, DescriptionReward, Reward
from minigpt4.training.small_validation import SmallValidation, yes_no_scores
from minigpt4.training.supported import Supported
from minigpt4.training.vocabulary import Vocabulary, singular
from minigpt4.weights.sources import locate
from minigpt4.weights.tokenizer import load_tokenizer
from tests.training_case import jpeg, picture, write_descriptions, write_shard

DOG = "A brown dog runs over the green grass."
SENTENCES = (DOG, "A man sits on a wooden bench.", "Two dogs are in a parking lot.")


@pytest.fixture(scope="module")
def pictures() -> list[TrainingPicture]:
    """Twelve pictures, every other one described."""
    made = []
    for i in range(12):
        example = Example(f"shard/{i}", lambda: b"", ())
        described = i % 2 == 0
        made.append(
            TrainingPicture(
                example,
                "described" if described else "captioned",
                (SENTENCES[i % 3], SENTENCES[(i + 1) % 3]),
                "A long description. It has two sentences." if described else "",
                (("What is it?", "It is a dog."), ("Is it wet?", "No, it is dry.")),
                ("Write a poem.", "A dog,\na log.") if i == 0 else None,
            )
        )
    return Things().count(made)


@pytest.fixture(scope="module")
def model() -> MiniGPT4:
    """mini's sizes around a tiny language model; nothing sees."""
    torch.manual_seed(0)
    config = replace(get_model("mini"), llm_hidden_size=32)
    tokenizer = load_tokenizer(locate(get_model("nano"), "llm"))
    llm = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=49_152,
            attn_implementation="eager",
        )
    )
    projection = torch.nn.Linear(config.projection_in, 32)
    return MiniGPT4(config, torch.nn.Identity(), torch.nn.Identity(), projection, llm, tokenizer)


def sources(model: MiniGPT4, pictures: list[TrainingPicture]) -> dict[str, TrainingSource]:
    found = {}
    for kind in ("described", "captioned"):
        of_kind = [p for p in pictures if p.source == kind]
        generator = torch.Generator().manual_seed(len(kind))
        shape = (len(of_kind), model.config.image_tokens, 3363)
        features = torch.randn(shape, generator=generator).half()
        found[kind] = TrainingSource(
            of_kind, features.__getitem__, lambda number, draw: "brown dog, grass"
        )
    return found


def trainer(
    model: MiniGPT4,
    pictures: list[TrainingPicture],
    out,
    steps: int,
    rewards: Sequence[Reward] = (),
    validate: Callable[[SmallTrainer], dict] | None = None,
) -> SmallTrainer:
    objects = Things()
    objects.count(pictures)
    generator = torch.Generator().manual_seed(1)
    weight = 0.01 * torch.randn(32, 3363, generator=generator)
    return SmallTrainer(
        model,
        sources(model, pictures),
        Mixture(objects),
        SmallRecipe(
            steps=steps,
            peak_lr=1e-2,
            warmup_steps=2,
            cool_down=0.0,
            checkpoint_every=2,
            validate_every=1,
        ),
        out,
        lambda: (torch.eye(3363), weight, torch.zeros(32)),
        torch.arange(49_152),
        validate,
        rewards=rewards,
    )


def test_vocabulary_has_things_and_phrases():
    texts = [SENTENCES] * 10
    found = Vocabulary.of(texts, 100, 100, 5)
    assert {"dog", "bench", "brown dog", "wooden bench", "two dogs"} <= {*found.terms}
    assert not {"runs", "brown", "over", "the"} & {*found.terms}
    assert {found.terms[i] for i in found.occurring("The brown dog and two dogs")} == {
        "dog",
        "brown dog",
        "two dogs",
    }


@pytest.mark.parametrize(
    ("plural", "word"),
    [("dogs", "dog"), ("buses", "bus"), ("babies", "baby"), ("women", "woman"), ("grass", "grass")],
)
def test_singular(plural, word):
    assert singular(plural) == word


def test_a_phrase_takes_the_place_of_its_words():
    terms, words = ["dog", "brown dog", "grass", "cat"], Words(threshold=0.3, most=3)
    assert choose([0.9, 0.5, 0.4, 0.1], terms, words) == ["brown dog", "grass"]
    assert choose([0.9, 0.8], ["person", "tall man"], words) == ["tall man"]
    assert choose([0.9, 0.8], ["person", "umbrella"], words) == ["person", "umbrella"]
    assert choose([0.4, 0.9, 0.2, 0.35], terms, words) == ["brown dog", "cat"]
    assert choose([0.9, 0.1, 0.8, 0.7], terms, Words(threshold=0.3, most=2)) == ["dog", "grass"]
    assert choose([0.9, 0.8, 0.4], ["man", "tree", "two men"], words) == ["two men", "tree"]


def test_the_word_head_learns_and_is_kept(tmp_path):
    """“dog” is in one cell, another one each time; “bench” is among the classes."""
    torch.manual_seed(0)
    vocabulary = Vocabulary(["dog", "bench"])
    wanted = (torch.rand(1024, 2) > 0.5).float()
    features = torch.randn(1024, 28, 40 + len(OBJECTS) + 20)
    features[:, :, 40:] = 0  # no object is found
    rows = torch.arange(1024)
    features[rows, rows % 25, :20] += 9 * wanted[:, :1]
    features[:, 26, -20:] += 3 * wanted[:, 1:]
    inputs = word_head.Inputs(lambda rows: features[rows], rows.tolist(), 5, 40 + len(OBJECTS))
    unseen = word_head.cross_fitted(inputs, rows, wanted, rows % 2, epochs=12)
    assert word_head.mean_average_precision(wanted, unseen) > 0.9  # chance: 0.5
    layer = word_head.fit(inputs, rows, wanted, epochs=12)
    head = word_head.finished(layer, inputs, vocabulary, 40)
    head.save(tmp_path / "words.safetensors")
    loaded = load_words(tmp_path / "words.safetensors")
    assert loaded.learned == tuple(vocabulary.terms)
    assert word_head.mean_average_precision(wanted, loaded(features)[:, :2]) > 0.9
    features[0, 25, 40 + OBJECTS.index("giraffe")] = 0.6  # the root of the heat map's maximum
    features[0, 25, 40 + OBJECTS.index("dog")] = 0.95
    found = dict(zip(loaded.terms, loaded(features)[0].tolist(), strict=True))
    assert found["giraffe"] == pytest.approx(0.36 / (0.36 + 0.36), 0.01) and found["dog"] > 0.7
    assert found["zebra"] < 0.001 and loaded.terms.count("dog") == 1
    assert (loaded(features) - head(features)).abs().max() < 0.02
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(UserError):
        load_words(tmp_path / "other.safetensors")


def test_pictures_of_few_captions(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(small_start, "start", lambda model, features, texts: (texts, 0, 0))
    single = [replace(picture, captions=picture.captions[:1]) for picture in pictures]
    begun, _, _ = small_run.initial_projection(model, sources(model, single))
    assert sorted(begun) == sorted(picture.captions for picture in single)
    bare = [replace(picture, captions=()) for picture in pictures]
    with pytest.raises(UserError, match="have no captions"):
        small_run.initial_projection(model, sources(model, bare))
    encoded = SimpleNamespace(usable=lambda: list(range(7)))
    monkeypatch.setattr(small_run, "Features", lambda *_: encoded)
    of_set = small_run.DataSets(model, {"train": pictures[:7]}, tmp_path)
    with pytest.raises(UserError, match="6 pictures to learn from, no 8"):
        small_run.Found(model.config, of_set, tmp_path, False)
    assert not any(tmp_path.iterdir())
    (tmp_path / "words.pt").write_bytes(b"half a file")
    with pytest.raises(UserError, match="is damaged: delete it"):
        small_run.Found(model.config, of_set, tmp_path, False)


def test_questions_ask_for_what_is_there_and_what_is_not(pictures):
    objects = Things()
    objects.count(pictures)
    mixture = Mixture(objects)
    for number, one in enumerate(pictures * 5):
        there = {objects.names[i] for i in one.things}
        asked = mixture.presence(one, random.Random(number))
        answers = [text.turns[0][1] for text in asked]
        yes, no = (sum(a.startswith(w) for a in answers) for w in ("Yes", "No"))
        assert yes == no == min(2, len(there))
        assert all(a.startswith(("Yes", "No", "There is no")) for a in answers)
        for text in asked:
            (question, answer), names = text.turns[0], objects.names
            named = {n for n in names if f" {n} " in question or f" {n}?" in question}
            if answer.startswith("Yes"):
                assert named & there
            else:
                assert not named & there


def test_held_out_pictures_stay_so(pictures):
    described = [replace(pictures[0], example=Example(f"a/{i}", bytes, ())) for i in range(400)]
    share = sum(p.held_out for p in described) / 400
    assert 0.02 < share < 0.09
    moved = replace(described[0], example=Example("other-shard/0", bytes, ()))
    assert moved.held_out == described[0].held_out
    assert not replace(pictures[0], source="instructed").held_out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_multiply_nearly_as_floats(dtype):
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 96).requires_grad_(False).to(dtype)
    inputs = torch.randn(3, 7, 64, dtype=dtype, requires_grad=True)
    exact = linear(inputs)
    exact.square().sum().backward()
    gradient, inputs.grad = inputs.grad, None
    rough = int8.TrainableInt8Linear(linear)(inputs)
    rough.square().sum().backward()
    for wanted, found, bound in ((exact, rough, 0.999), (gradient, inputs.grad, 0.99)):
        wanted, found = wanted.float().flatten(), found.float().flatten()
        assert torch.nn.functional.cosine_similarity(wanted, found, 0) > bound


@pytest.mark.parametrize(
    ("option", "begun", "expected"),
    [
        ("float32", "8-bit integers and bfloat16", ("float32", torch.float32, False)),
        ("bfloat16", "", ("bfloat16", torch.bfloat16, False)),
        ("auto", "8-bit integers and float32", (None, torch.float32, True)),
        ("auto", "bfloat16", (None, torch.bfloat16, False)),
    ],
)
def test_nothing_is_measured_where_an_option_or_the_run_says_it(
    option, begun, expected, monkeypatch
):
    monkeypatch.setattr(int8, "fastest", lambda calls: 1 / 0)
    assert int8.arithmetic(option, begun) == (expected[0] or begun, *expected[1:])


@pytest.mark.parametrize("place", [0, 1])
def test_a_run_notes_the_arithmetic_that_was_fastest(place, model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "fastest", lambda calls: place)
    assert int8.arithmetic_of(tmp_path / "log.jsonl") == ""
    name, dtype, integers = int8.arithmetic("auto")
    assert dtype == (torch.float32 if place else torch.bfloat16) and integers == (not place)
    run = trainer(model, pictures, tmp_path, 1)
    for noted in ("float32", name):
        run.log({"step": 0, "arithmetic": noted})
    assert int8.arithmetic_of(tmp_path / "log.jsonl") == name


def test_a_resumed_run_ends_as_one_that_was_not_stopped(model, pictures, tmp_path):
    whole = trainer(model, pictures, tmp_path / "whole", 4)
    whole.run()
    first = trainer(model, pictures, tmp_path / "parts", 4)
    for _ in range(2):
        first.one_step()
    first.save()
    second = trainer(model, pictures, tmp_path / "parts", 4)
    assert second.step == 2
    second.run()
    assert torch.equal(whole.projection.weight, second.projection.weight)
    assert torch.equal(whole.average["weight"], second.average["weight"])
    assert (tmp_path / "parts" / "mini.safetensors").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_a_whole_step(model, pictures, tmp_path, number):
    run = trainer(model, pictures, tmp_path, 4, validate=lambda run: {"seen": run.step})
    step, save = run.optimizer.step, run.save
    run.optimizer.step = lambda: (signal.raise_signal(number), step())
    run.save = lambda: (signal.raise_signal(number), save())  # pressed again
    with pytest.raises(KeyboardInterrupt):
        run.run()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert [record["step"] for record in log] == [1, 1] and log[1]["validation"] == {"seen": 1}
    again = trainer(model, pictures, tmp_path, 4)
    assert again.step == 1
    assert torch.equal(again.average["weight"], run.average["weight"])


def test_a_run_that_diverges_ends(model, pictures, tmp_path):
    run = trainer(model, pictures, tmp_path, 4)
    run.losses = lambda images, batch: batch.weights * images.sum() * float("nan")
    before = run.projection.weight.clone()
    with pytest.raises(UserError, match="diverged in step 1"):
        run.run()
    assert torch.equal(run.projection.weight, before)


def test_another_runs_checkpoint_is_not_resumed(model, pictures, tmp_path):
    trainer(model, pictures, tmp_path, 2).run()
    assert trainer(model, pictures, tmp_path, 9).step == 2  # a run may be made longer
    reward = CaptionReward(pictures, 2)
    for others, given in ((pictures[:-1], []), (pictures, [reward])):
        with pytest.raises(UserError, match="belongs to a run with other data"):
            trainer(model, others, tmp_path, 2, given)
    (tmp_path / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(UserError, match="is damaged: delete it"):
        trainer(model, pictures, tmp_path, 2)


def test_it_learns_at_the_length_of_words(model, pictures, tmp_path):
    run = trainer(model, pictures, tmp_path, 30)
    records = [run.one_step() for _ in range(30)]
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(r["length"] == pytest.approx(0.6, abs=1e-3) for r in records)
    before = run.projection.weight.clone()
    assert not torch.equal(before, run.average["weight"])


def test_a_run_can_start_from_given_weights(model):
    basis = torch.linalg.qr(torch.randn(model.config.projection_in, model.config.projection_in))[0]
    basis[:, :3] *= 3
    weight, bias = small_start.in_basis(model.projection, basis)
    features = torch.randn(4, model.config.projection_in)
    expected = model.projection(features)
    assert torch.allclose(features @ basis @ weight.T + bias, expected, atol=1e-3)


def test_a_follow_up_holds_the_first_answer_but_learns_the_last(model, pictures, tmp_path):
    run = trainer(model, pictures, tmp_path, 1)
    turns = (("What is it?", "It is a dog."), ("Is it wet?", "No."))
    prompt = run.learned(ImageRef("1", "brown dog"), Answered(turns)).prompt
    decode = model.tokenizer.decode
    learned = [i for i, m in zip(prompt.ids, prompt.loss_mask, strict=True) if m]
    assert decode(learned) == "No.<|im_end|>"
    text = decode([i for i in prompt.ids if i >= 0])
    assert "<Img> brown dog</Img> What is it?" in text
    assert "It is a dog.<|im_end|>" in text


def test_questions_without_the_picture_are_learned_beside_it(model, pictures, tmp_path):
    run = trainer(model, pictures, tmp_path, 1)
    drawn = [t for n in range(300) for t in run.mixture.draw(pictures[0], random.Random(n))]
    blind = [text for text in drawn if not text.pictured]
    assert {text.kind for text in blind} == {"no picture"} and 30 < len(blind) < 90
    asked = {text.turns[0][0] for text in blind}
    assert asked & {*run.mixture.short, *run.mixture.detailed}
    text = Answered((("What is this?", "I see no picture yet."),), pictured=False)
    learned = run.learned(ImageRef("1", "brown dog"), text)
    prompt = learned.prompt
    system = model.config.template.system_without_images
    assert not prompt.images and system in model.tokenizer.decode(prompt.ids)
    # Packed with one that shows the picture, it is learned as if alone.
    shown = run.learned(ImageRef("1", ""), Answered((("What is it?", "A dog."),)))
    features = run.sources["captioned"].features([0])
    together = run.losses(run.embeddings(features), pack([[shown, learned]]))
    alone = run.losses(run.embeddings(features)[:0], pack([[learned]]))
    assert torch.allclose(together[-len(alone) :], alone, atol=1e-4)


def test_only_tokens_that_occur_are_scored(model):
    tokens = occurring_tokens(model.tokenizer, iter(["A dog."]), 2)
    assert 2 in tokens and len(tokens) < 6


def test_the_probe_measures_all_sides(model, pictures, tmp_path):
    run = trainer(model, pictures, tmp_path, 1)
    kept = sources(model, pictures)
    figures = SmallValidation(kept, run.mixture.objects, tmp_path, {"captions": 4, "detail": 2})(
        run
    )
    assert 0 <= figures["yes/no described"]["auc"] <= 1
    assert figures["yes/no described"]["questions"] > 6
    assert "described caption" in figures["loss"]
    assert (tmp_path / "answers-000000.txt").read_text()


def test_yes_no_scores():
    figures = yes_no_scores([2.0, 1.0, 0.5, -1.0], [True, True, False, False])
    assert figures["auc"] == 1 and figures["accuracy"] == 0.75 and figures["best"] == 1


def test_a_folder_of_data_is_read(tmp_path):
    (tmp_path / "coco").mkdir()
    record = {
        "captions": ["A cat.", "A grey cat on a bed."],
        "description": "A grey cat lies on a bed.",
        "questions": [["Is it grey?", "Yes, it is grey."]],
        "task": ["Write a line.", "A cat."],
        "statements": [["The cat is on the bed.", True]],
        "coco_id": 1,
    }
    human = {"captions": ["A dog runs."] * 5, "coco_id": 2}
    with tarfile.open(tmp_path / "coco" / "described-0.tar", "w") as shard:
        for key, content in (("1", record), ("2", human)):
            for suffix, data in (("jpg", jpeg(picture(1))), ("json", json.dumps(content).encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    (tmp_path / "stage1").mkdir()
    write_shard(tmp_path / "stage1" / "train-0.tar", 3)
    write_descriptions(tmp_path / "stage2", 2)
    found = small_run.read(tmp_path)
    described, captioned = found["described-0"]
    assert (described.source, captioned.source) == ("described", "captioned")
    assert described.task == ("Write a line.", "A cat.")
    assert described.statements == (("The cat is on the bed.", True),)
    assert described.example.picture().size == (60, 44)
    assert [p.source for p in found["train-0"]] == ["flickr"] * 3
    assert [p.source for p in found["stage2"]] == ["instructed"] * 2
    with pytest.raises(UserError):
        small_run.read(tmp_path / "coco")

    line = {"key": described.key, "task": ["How is it made?", "1. Boil it."]}
    (tmp_path / "texts.jsonl").write_text(json.dumps(line))
    written = small_run.read(tmp_path)["described-0"][0]
    changes = {"example": written.example, "task": ("How is it made?", "1. Boil it.")}
    assert written == replace(described, **changes, written=True)
    assert (described.group, written.group) == ("described", "written")


def test_further_texts_about_pictures_are_learned(tmp_path, capsys):
    (tmp_path / "stage1").mkdir()
    write_shard(tmp_path / "stage1" / "train-0.tar", 3)
    write_shard(tmp_path / "stage1" / "val-0.tar", 1)
    before = small_run.read(tmp_path)
    first, kept = before["train-0"][0], before["val-0"][0]
    record = {
        "key": first.key,
        "description": "A dog runs. It is fast.",
        "questions": [["What runs?", "A dog runs."]],
        "task": ["Write a line.", "Run, dog!"],
    }
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, (record, record | {"key": kept.key}))))
    found = small_run.read(tmp_path)
    assert (
        "texts.jsonl: 1 are about no picture to learn from (val-0/00000)."
        in capsys.readouterr().err
    )
    written, *others = found["train-0"]
    assert [p.group for p in [*others, *found["val-0"]]] == ["flickr"] * 3
    assert (written.group, written.captions) == ("written", first.captions)
    drawn = Mixture(Things()).draw(written, random.Random(0))
    answers = {text.turns[-1][1] for text in drawn}
    assert {"A dog runs. It is fast.", "A dog runs.", "Run, dog!"} < answers
    assert any(caption.strip() in answers for caption in first.captions)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([{"key": "a", "task": ["Write a line."]}], "Line 1 of .*texts.jsonl must have texts as"),
        ([{"key": 1}], "Line 1 of"),
        ([{"key": "a"}, {"key": "a"}], "Line 2 of .* earlier line"),
    ],
)
def test_further_texts_of_unknown_form_are_refused(lines, said, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UserError, match=said):
        with_texts({}, file)


def test_what_is_wrong_in_the_data_is_left_out(tmp_path, capsys):
    """Each of these ended a run with a traceback."""
    good = {"captions": ["A dog runs."], "description": "A dog. It runs."}
    contents = {
        "cam_22.5mm.json": json.dumps(good | {"questions": [None, ["Wet?", "No."], ["a"]]}),
        "list.json": "[1]",
        "damaged.json": "{",
        "._cam_22.5mm.json": "\0damaged",
        "text.txt": "A cat.",
        "task.json": json.dumps(good | {"task": ["only"], "statements": "no", "knowledge": 3}),
        "whole.json": json.dumps(good | {"task": ["Why?", "So."], "knowledge": None}),
    }
    for key in ("list", "damaged"):
        contents[f"{key}.txt"] = "A bird."
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        for key in ("cam_22.5mm", "list", "damaged", "text", "task"):
            contents[f"{key}.jpg"] = jpeg(picture(1))
        for name, content in contents.items():
            data = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    found = {p.key: p for p in read_pictures(str(tmp_path / "x.tar"))}
    assert found["x/cam_22.5mm"].pairs == (("Wet?", "No."),)
    assert found["x/task"].description and found["x/task"].task is None
    assert found["x/text"].captions == ("A cat.",)
    said = "x.tar: texts of unknown form are left out of 2 (cam_22.5mm; task)."
    assert said in capsys.readouterr().err


class Called(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function) -> None:
        super().__init__()
        self.forward = function


def test_the_words_stand_in_the_prompt_after_the_picture(model, monkeypatch):
    """Of each picture, wherever it stands in the conversation; the picture is encoded once."""
    head = WordHead(("brown dog", "grass", "cat"), model.config.projection_in, 5, 2363)
    head.bias += torch.tensor([2.0, 1.0, -9.0])
    encoded = []

    def features(pixels):
        encoded.append(len(pixels))
        return torch.randn(len(pixels), model.config.image_tokens, model.config.projection_in)

    monkeypatch.setattr(model, "word_head", head)
    monkeypatch.setattr(model, "pixel_values", lambda pictures: torch.zeros(len(pictures)))
    sizes = (len(OBJECTS), 4)  # the heat map, the distances to the objects' edges
    maps = Called(lambda pixels: [torch.zeros(len(pixels), size, 8, 8) for size in sizes])
    monkeypatch.setattr(model, "encoder", maps)
    monkeypatch.setattr(model, "bridge", Called(lambda found: features(found[-1])))
    conversation = Conversation()
    shown = [image.Picture(picture(number), f"{number:064x}") for number in (1, 2)]
    conversation.add_question("What is it?", shown)
    with Engine(model, kv_megabytes=4) as engine:
        prompts, submit = [], engine.submit
        monkeypatch.setattr(engine, "submit", lambda r: prompts.append(r.prompt) or submit(r))
        for _ in range(2):
            answer = ask(engine, conversation, greedy(2))
            assert len(list(answer.tokens)) <= 2
            conversation.add_answer("".join(answer) or "A dog.")
            conversation.add_question("And its colour?")
    assert sum(encoded) == 2
    for prompt in prompts:
        ids = [i for i in prompt.ids if i >= 0]
        text = model.tokenizer.decode(ids)
        assert text.count("<Img> brown dog, grass</Img>") == 2 and "cat" not in text
    assert conversation.messages[0].images[0].words == ""  # what is stored names the picture alone


REDUCED = (
    ("A red dog and a blue umbrella lie here.", "A dog and an umbrella lie here."),
    ("A brown dog wears a dark blue and white coat.", "A brown dog wears a coat."),
    ("A light reddish-brown dog barks.", "A dog barks."),
    ("An old black and white photo of grey dogs.", "An old black and white photo of dogs."),
    ("Red cups are green and small.", "Cups are green and small."),
    ("A man in black leads a dog.", "A man in black leads a dog."),
    ("An orange sits here. It is white, dogs are not.",) * 2,
    ("An ice cream stands by a sliced orange.", "An ice cream stands by a sliced orange."),
)


@pytest.mark.parametrize("text, reduced", REDUCED)
def test_colours_that_are_not_found_are_left_out(text, reduced):
    supported = Supported(Vocabulary(["dog", "brown dog", "grey dog", "cup"]))
    assert supported.colours(text, [0.9, 0.5, 0.01, 0.3]) == reduced


def test_sentences_that_are_not_found_are_left_out(pictures):
    supported = Supported(Vocabulary(["dog", "grass", "cup", "sky"]))
    text = "A dog runs. It has no name. A cup stands there. Grass is behind it. The sky is blue."
    kept = supported.description(text, [0.9, 0.4, 0.05, 0.9])
    assert kept == "A dog runs. Grass is behind it."
    # Two sentences are kept at least.
    assert supported.description(text, [0.0, 0.0, 0.1, 0.0]) == "A dog runs. A cup stands there."
    assert supported(pictures[1], []) is pictures[1]  # people's captions stay


def test_a_picture_may_show_nothing_unusual(pictures):
    mixture = Mixture(Things())
    for one in pictures[:3]:
        drawn = [t for n in range(200) for t in mixture.draw(one, random.Random(n))]
        found = [text for text in drawn if text.kind == "ordinary"]
        assert bool(found) == (one.task is None)
        for text in found:
            asked, answer = text.turns[0]
            assert re.search("unusual|strange", asked)
            assert answer.removeprefix("I see nothing unusual in this picture. ") in one.captions


def test_what_a_picture_does_not_tell_is_said_to_be_unknown(pictures):
    mixture = Mixture(Things())
    drawn = [t for n in range(300) for t in mixture.draw(pictures[0], random.Random(n))]
    found = {text.turns[0] for text in drawn if text.kind == "not told"}
    assert ("What time is it?", "I cannot read clocks in pictures.") in found
    assert len({answer for _, answer in found}) == 3 and found <= {*read_turns("not-told.txt")}
    stop = replace(pictures[0], captions=("A stop sign.",))
    assert not any(mixture._not_told(stop, random.Random(n)) for n in range(50))


def test_questions_are_also_answered_in_a_word(pictures):
    mixture = Mixture(Things())
    drawn = [t for n in range(200) for t in mixture.draw(pictures[0], random.Random(n))]
    answers = {text.turns for text in drawn if text.kind == "question"}
    assert (("Is it wet? Answer yes or no.", "No."),) in answers
    assert (("Is it wet?", "No, it is dry."),) in answers
    assert not any("Answer" in asked for ((asked, _), *_) in answers if asked.startswith("What"))


def test_captions_are_compared_by_their_score(model, pictures, tmp_path):
    reward = CaptionReward(pictures, 4, weight=3.0)
    run = trainer(model, pictures, tmp_path, 1, [reward])
    one = next(p for p in pictures if p.source == "captioned")
    answers = [model.tokenizer.encode(text) for text in (one.captions[0], "A dog.", "Rain, rain.")]
    question = run.conversation(ImageRef("1"), (("Briefly.", ""),))
    found = reward.weighted(model, one, question, [a + [2] for a in answers])
    weights = [one.weight for one in found]
    assert sum(weights) == pytest.approx(0, abs=1e-5)
    assert weights[0] > weights[1] >= weights[2] and weights[0] > 0 > weights[2]
    assert reward.taken() > 0 and reward.taken() == 0
    with pytest.raises(UserError, match="2 or more"):
        CaptionReward(pictures, 1)


def test_descriptions_are_scored_by_what_is_there(pictures):
    one = next(p for p in pictures if p.source == "described")
    one = replace(one, description="A brown dog sits on a wooden bench.", captions=(), pairs=())
    terms = ["dog", "bench", "brown dog", "cat", "hat"]
    reward = DescriptionReward([one], terms, 2)
    said = {
        text: reward.score(one, text, True)
        for text in (
            "A brown dog is on a bench. It is quiet.",
            "A dog is on a bench. It is quiet.",
            "A brown dog is on a bench.",
            "A brown dog is on a bench. The dog has a hat.",
            "A cat has a hat. It is quiet.",
        )
    }
    best, plain, single, invented, wrong = said.values()
    assert best > plain > invented > wrong == 0 and single == best / 2
    assert reward.score(one, "A dog. A dog. A dog.", True) == 0
    assert reward.score(one, "A brown dog is on a bench. It is", False) == 0
    assert [reward.covers(p) for p in pictures] == [p.key == one.key for p in pictures]


def test_a_run_with_a_reward_ends_as_one_that_was_not_stopped(model, pictures, tmp_path):
    records = []
    for out, parts in ((tmp_path / "whole", (3,)), (tmp_path / "parts", (2, 3))):
        for steps in parts:
            rewards = [CaptionReward(pictures, 3), DescriptionReward(pictures, ["dog", "bench"], 2)]
            run = trainer(model, pictures, out, steps, rewards)
            run.run()
        records.append([json.loads(line) for line in (out / "log.jsonl").open()])
        kinds = {kind for record in records[-1] for kind in record["kinds"]}
        assert {"sampled caption", "sampled description", "description", "caption"} <= kinds
    losses = [[record["loss"] for record in record_of_one] for record_of_one in records]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_padded_prompts_are_answered_as_alone(model):
    torch.manual_seed(3)
    rows = [torch.randn(length, 32) for length in (5, 9)]
    together = sample(model, rows, 2, 4, 0.0)
    alone = [sample(model, row[None], 2, 4, 0.0)[0] for row in rows]
    assert together == alone


@pytest.mark.parametrize(
    "given",
    [
        ["--stage", "1"],
        ["--crop"],
        ["--mix", "x=1"],
        ["--validate", "x.tar"],
        ["--limit", "3"],
        ["--no-words"],
        ["--device", "cuda"],
        ["--quantize", "int8"],
        ["--projection", "mini.safetensors"],  # which it does not start from
    ],
)
def test_options_of_other_models_are_refused(given, capsys, tmp_path):
    assert main(["train", "--model", "mini", "--data", str(tmp_path), *given]) == 2
    said = capsys.readouterr().err
    assert given[0] in said and "mini" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "option, name, said",
    [
        ("init", "mini.safetensors", "would be overwritten"),
        ("init", "mini-best.safetensors", "holds no data"),  # which mini does not write
    ],
)
def test_the_projection_it_starts_from_is_not_overwritten(option, name, said, capsys, tmp_path):
    run = [f"--{option}", f"{tmp_path}/{name}", "--out", str(tmp_path)]
    assert main(["train", "--model", "mini", "--data", str(tmp_path), *run]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--scored", "captions"], ["--adapters"], ["--refit"]])
def test_its_options_are_refused_for_other_models(given, capsys, tmp_path):
    options = ["--model", "nano", "--stage", "1", "--data", str(tmp_path), *given]
    assert main(["train", *options]) == 2
    said = capsys.readouterr().err
    assert given[0] in said and "word head" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("scored", "source"), [("captions", "captioned"), ("descriptions", "described")]
)
def test_one_kind_of_text_alone_is_scored(scored, source, model, pictures, tmp_path):
    """More pictures that have it are shown, each with few other texts."""
    options = Namespace(steps=1, peak_lr=None, seed=1, validate_every=9, samples=2, scored=scored)
    recipe = small_run.recipe_of(options)
    usual = small_run.recipe_of(Namespace(**vars(options) | {"samples": 0}))
    shown, before = (Counter(dict(sum(r.sizes, ()))) for r in (recipe, usual))
    assert shown[source] > before[source]
    reward = {
        "captions": CaptionReward(pictures, 2),
        "descriptions": DescriptionReward(pictures, ["dog"], 2),
    }[scored]
    run = trainer(model, pictures, tmp_path, 1, [reward])
    run.recipe = replace(recipe, sizes=((("described", 3), ("captioned", 3)),))
    features, _, kinds = run.batch(run.chosen(0)[0], random.Random(0))
    assert len(features) == 6
    assert f"sampled {reward.kind}" in kinds
    of_one = run.sources[source].pictures[0]
    showing = [(of_one, ImageRef("0"), run.mixture.draw(of_one, random.Random(1)))]
    run._rewarded(showing, features[:1], random.Random(0))
    kinds_left = [text.kind for text in showing[0][2]]
    assert kinds_left.count(reward.kind) == 1 and len(kinds_left) <= 3


def test_weak_signs_of_a_person_do_not_count():
    names, learned = ("person", "dog"), torch.tensor([[0.1, 0.1], [0.1, 0.1]])
    found = with_objects(learned, torch.tensor([[0.2, 0.2], [0.3, 0.2]]), names, names)
    assert found[:, 0].tolist() == pytest.approx([0.1, 0.3 / 0.66]) and found[0, 1] > 0.3


def test_in_a_drawing_the_detector_counts_less():
    heat = torch.tensor([[0.36, 0.04]])
    photo, drawn = (
        with_objects(
            torch.tensor([[p, 0.1]]), heat, ("drawing", "kite", "clock"), ("kite", "clock")
        )
        for p in (0.0, 0.9)
    )
    assert photo[0].tolist() == pytest.approx([0, 0.5, 0.1])
    assert drawn[0].tolist() == pytest.approx([0.9, 0.1, 0.01])


def test_the_recipe_selects_the_trainer(monkeypatch):
    monkeypatch.setattr(small_run, "train", lambda _, config: config.name)
    monkeypatch.setitem(MODELS, "nano", replace(get_model("nano"), recipe="small"))
    assert [run.train(Namespace(model=name)) for name in ("nano", "mini")] == ["nano", "mini"]


def test_a_run_says_where_its_projection_is_or_that_nothing_is_kept(tmp_path, monkeypatch, capsys):
    whole = {"read": {}, "opened": (None, {}, ""), "Found": None, "divided": ({}, {})}
    for name, value in (whole | {"tokens_of": None, "SmallTrainer": Mock(step=0)}).items():
        monkeypatch.setattr(small_run, name, lambda *_, value=value: value)
    command = ["train", "--model", "mini", "--data", "d", "--out", str(tmp_path)]
    command += ["--threads", str(torch.get_num_threads())]
    assert main(command) == 0
    assert f"The projection is in {tmp_path}/mini.safetensors" in capsys.readouterr().err
    assert main([*command, "--validate"]) == 2
    assert "d has none: add some as" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [1, 4])
def test_few_pictures_are_enough_to_measure(limit, model, pictures, tmp_path, monkeypatch, capsys):
    run, kept = trainer(model, pictures, tmp_path, 1), sources(model, pictures)
    kept["described"].pictures = [  # the first names nothing to ask yes or no about
        replace(p, captions=("So it goes.",), description="", pairs=()) if p is pictures[0] else p
        for p in kept["described"].pictures
    ]
    whole = {"read": {}, "opened": (model, {}, ""), "Found": None, "divided": ({}, kept)}
    for name, value in (whole | {"tokens_of": None, "SmallTrainer": run}).items():
        monkeypatch.setattr(small_run, name, lambda *_, value=value: value)
    command = ["train", "--model", "mini", "--data", "d", "--out", str(tmp_path)]
    command += ["--threads", str(torch.get_num_threads()), "--validate", "--limit", str(limit)]
    assert main(command) == 0
    said = capsys.readouterr().err
    figures = json.loads(said[said.index("{") :])
    assert 0 <= figures["detail"]["several"] <= 1
    assert (figures["yes/no described"]["questions"] == 0) == (limit == 1)


def test_an_empty_folder_name_is_not_the_current_folder(capsys):
    assert main(["train", "--model", "mini", "--data", ""]) == 2
    assert "path is empty" in capsys.readouterr().err
