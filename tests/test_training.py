"""Training: only the projection learns, runs resume exactly, processes share a batch exactly."""

import argparse
import gzip
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from minigpt4.__main__ import main
from minigpt4.config import MODELS
from minigpt4.data import examples as data
from minigpt4.data import files
from minigpt4.data.datasets import read_captioned
from minigpt4.errors import UserError
from minigpt4.training import questions
from minigpt4.training.batches import batches, mixed_batches, published_caption, random_resized_crop
from minigpt4.training.extended import ExtendedRecipe, ExtendedTrainer
from minigpt4.training.features import Features, fingerprint
from minigpt4.training.run import schedule_of
from minigpt4.training.trainer import Recipe, Trainer, learning_rate
from minigpt4.weights.checkpoint import read_projection, save_projection
from minigpt4.weights.load import load_model
from tests import training_case
from tests.parity_case import ParityCase
from tests.training_case import (
    PARITY,
    SCHEDULE,
    room_for,
    tiny_model,
    write_captioned,
    write_descriptions,
    write_shard,
)

PROMPTED = ExtendedRecipe(SCHEDULE, ("Describe.", "What is this?"), mirror=True)


def make(model, examples, recipe, out, **options) -> Trainer:
    """The trainer for a recipe."""
    kind = ExtendedTrainer if isinstance(recipe, ExtendedRecipe) else Trainer
    return kind(model, examples, recipe, out, **options)


@pytest.fixture
def examples(tmp_path):
    return data.read_shards(str(write_shard(tmp_path / "train-00000.tar")))


def train(examples, out, recipe=PROMPTED, steps=None, **options) -> Trainer:
    """A run on a tiny model, stopped after `steps` if given, as if the machine had gone."""
    trainer = make(tiny_model(), examples, recipe, out, **options)
    trainer.resume()
    if steps is None:
        trainer.run()
    else:
        save, trainer.save = trainer.save, lambda: None

        class Stop(Exception):
            pass

        def stop_after():
            if trainer.step == steps:
                save()
                raise Stop

        trainer.save = stop_after
        with pytest.raises(Stop):
            trainer.run()
    return trainer


@pytest.mark.parametrize("recipe", [PROMPTED, Recipe(SCHEDULE)], ids=["prompted", "published"])
def test_only_the_projection_learns(examples, tmp_path, recipe):
    before = {k: v.clone() for k, v in tiny_model().state_dict().items()}
    trainer = train(examples, tmp_path / "run", recipe)
    for name, tensor in trainer.model.state_dict().items():
        changed = not torch.equal(tensor, before[name])
        assert changed == name.startswith("projection."), name
    losses = [row["loss"] for row in trainer.rows]
    assert losses[-1] < losses[0]
    for file in ("loss.png", "loss.csv", "checkpoint.pt"):
        assert (tmp_path / "run" / file).stat().st_size > 100
    saved = read_projection(trainer.projection_path)["weight"]
    torch.testing.assert_close(saved.float(), trainer.model.projection.weight, atol=1e-2, rtol=1e-2)


def test_resumed_is_uninterrupted(examples, tmp_path):
    whole = train(examples, tmp_path / "whole")
    recipe = replace(PROMPTED, checkpoint_every=3)
    train(examples, tmp_path / "halves", recipe, steps=3)
    halves = train(examples, tmp_path / "halves", recipe)
    assert [r["loss"] for r in halves.rows] == [r["loss"] for r in whole.rows]
    torch.testing.assert_close(
        halves.model.projection.weight, whole.model.projection.weight, atol=0, rtol=0
    )


def test_resuming_with_other_hyperparameters_is_refused(examples, tmp_path):
    train(examples, tmp_path / "run")
    other = replace(PROMPTED, schedule=replace(SCHEDULE, peak_lr=5e-2))
    for changed in ({"recipe": other}, {"recipe": replace(PROMPTED, seed=1)}):
        with pytest.raises(UserError, match="hyperparameters"):
            train(examples, tmp_path / "run", **changed)
    mended = replace(examples[0], texts=(data.Text("Another caption."),))
    for other in (examples[:8], [mended, *examples[1:]]):
        with pytest.raises(UserError, match="other data"):
            train(other, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(UserError, match="damaged"):
        train(examples, tmp_path / "run")


def test_blending_writes_a_point_between_start_and_end(examples, tmp_path):
    start = tiny_model().projection.weight
    whole = read_projection(train(examples, tmp_path / "1").projection_path)["weight"]
    recipe = replace(PROMPTED, blend=0.25)
    part = read_projection(train(examples, tmp_path / "2", recipe).projection_path)["weight"]
    expected = start + 0.25 * (whole.float() - start)
    torch.testing.assert_close(part.float(), expected, atol=1e-2, rtol=1e-2)


def test_a_run_interrupted_in_its_first_step_leaves_nothing(examples, tmp_path):
    trainer = make(tiny_model(), examples, PROMPTED, tmp_path / "run")
    trainer.loss_and_gradient = lambda *_: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert not any((tmp_path / "run").iterdir())


@pytest.mark.trust("Faults", "a full disk")
def test_a_disk_that_refuses_a_file_is_said_alike_by_all_libraries(tmp_path):
    for write in (torch.save, lambda tensors, path: save_projection(tensors, path)):
        path = tmp_path / "run"
        with (
            pytest.raises(OSError, match="run"),
            room_for(1 << 16),
            files.replacing(path) as partial,
        ):
            write({"weight": torch.zeros(1 << 16)}, partial)
        assert not any(tmp_path.iterdir())


def test_an_interrupted_run_is_saved(examples, tmp_path, capsys):
    """Ctrl-C: the steps so far are in the checkpoint."""
    trainer = make(tiny_model(), examples, PROMPTED, tmp_path / "run")
    gradient = trainer.loss_and_gradient

    def interrupted(step, indices):
        if step == 2:
            raise KeyboardInterrupt
        return gradient(step, indices)

    trainer.loss_and_gradient = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert "Stopped after step 2: the same command goes on" in capsys.readouterr().err
    again = make(tiny_model(), examples, PROMPTED, tmp_path / "run")
    assert again.resume() and again.step == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_step_to_be_whole(examples, tmp_path, number):
    """Sent while the optimizer works, the step counts, with its loss."""
    trainer = make(tiny_model(), examples, PROMPTED, tmp_path / "run")
    step = trainer.optimizer.step

    def sent_in():
        if trainer.step == 2:
            signal.raise_signal(number)
        step()

    trainer.optimizer.step = sent_in
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer.step == len(trainer.rows) == 3
    again = make(tiny_model(), examples, PROMPTED, tmp_path / "run")
    assert again.resume() and again.step == 3
    whole = train(examples, tmp_path / "whole")
    again.run()
    assert [r["loss"] for r in again.rows] == [r["loss"] for r in whole.rows]


def test_a_trained_llama2_projection_loads_again(examples, tmp_path):
    """Without a Q-Former file, the projection's file brings `ln_vision`."""
    case = ParityCase(PARITY / "llama2_patch_concat")
    trainer = Trainer(tiny_model(case.folder.name), examples, Recipe(SCHEDULE), tmp_path / "run")
    path = trainer.run()
    files = replace(case.files, projection=path)
    loaded = load_model(case.config, files, llm_dtype=torch.float32)
    torch.testing.assert_close(
        loaded.projection.weight, trainer.model.projection.weight, atol=1e-2, rtol=1e-2
    )
    fresh = replace(case.files, projection=None)
    new = load_model(case.config, fresh, llm_dtype=torch.float32, seed=0)
    assert new.projection.bias.abs().max() == 0


def test_the_eigenbasis_is_another_way_to_the_same_projection(examples, tmp_path):
    """Features and weight turn together, and what is written is turned back."""
    recipe = replace(PROMPTED, eigenbasis=True)
    trainer = make(tiny_model(), examples, recipe, tmp_path / "run")
    plain = make(tiny_model(), examples, PROMPTED, tmp_path / "plain")
    torch.testing.assert_close(trainer.basis @ trainer.basis.T, torch.eye(len(trainer.basis)))
    assert trainer.loss_and_gradient(0, [0, 1, 2, 3]) == pytest.approx(
        plain.loss_and_gradient(0, [0, 1, 2, 3]), rel=1e-4
    )
    saved = read_projection(trainer.run())["weight"].float()
    turned = trainer.model.projection.weight @ trainer.basis.T
    torch.testing.assert_close(saved, turned, atol=1e-2, rtol=1e-2)
    assert (saved - tiny_model().projection.weight).abs().max() < 0.2  # six steps at 0.01
    assert trainer.rows[-1]["loss"] < trainer.rows[0]["loss"]


def test_denoised_features_become_part_of_the_weights(examples, tmp_path):
    """What is written needs no filter; it has less of what mirror images differ in, and most of
    what they share."""
    still = replace(SCHEDULE, steps=1, peak_lr=0.0, warmup_lr=0.0, floor_lr=0.0)
    recipe = replace(PROMPTED, schedule=still, denoise=1.0, eigenbasis=True)
    trainer = make(tiny_model(), examples, recipe, tmp_path / "run")
    saved = read_projection(trainer.run())
    inside = trainer.model.projection(trainer.features([(0, 0), (1, 1)]).float()).detach()
    plain = make(tiny_model(), examples, PROMPTED, tmp_path / "plain")
    pairs = [(index, view) for view in (0, 1) for index in range(len(examples))]
    features = plain.features(pairs).float()
    weight, bias = saved["weight"].float(), saved["bias"].float()
    written = features @ weight.T + bias
    torch.testing.assert_close(written[[0, len(examples) + 1]], inside, atol=5e-3, rtol=5e-3)
    before = plain.model.projection(features).detach()
    shares = []
    for embeds in (before, written):
        one, other = embeds.chunk(2)
        shares.append(((one - other).var() / (one + other).var()).item())
    assert shares[1] < 0.9 * shares[0]
    assert (written.mean((0, 1)) - before.mean((0, 1))).abs().max() < 0.1 * before.abs().max()


def test_captions_that_agree_count_more(examples, tmp_path):
    recipe = replace(PROMPTED, consensus=0.5)
    trainer = make(tiny_model(), examples, recipe, tmp_path / "run")

    def weights_of(trainer, indices):
        rows, _ = trainer.prompts(0, indices)
        return [[one.weight for one in row] for row in rows]

    weights = weights_of(trainer, [0, 1, 2, 3])
    assert all(sum(row) == pytest.approx(len(row), rel=1e-5) for row in weights)
    even = make(tiny_model(), examples, PROMPTED, tmp_path / "even")
    assert weights_of(even, [0, 1]) == [[1.0, 1.0]] * 2
    # Data that is mixed in may use the same names, for other pictures.
    said = ("Two boats.", "Boats at sea.", "A boat.")
    others = [replace(e, texts=tuple(map(data.Text, said)), captions=said) for e in examples[:4]]
    mixed = make(tiny_model(), [*examples, *others], recipe, tmp_path / "mixed")
    first, other = weights_of(mixed, [0, len(examples)])
    assert sum(first) == pytest.approx(2) and 1.0 not in other


def test_questions_follow_the_captions(tmp_path):
    captions = ("A brown dog runs on grass.", "The puppy is playing outside on the lawn")
    one = data.Example("a", bytes, (), captions)
    other = data.Example("b", bytes, (), ("Two men in a boat.", "Fishermen on the sea in a boat"))
    asked = {e.key: e for e in questions.ask_about([one, other, replace(one, key="c")], 3, 0)}
    assert set(asked) == {"a", "b", "c"}
    for example in asked.values():
        told = " ".join(example.captions)
        answers = [text.answer for text in example.texts]
        assert answers.count("Yes.") == answers.count("No.") > 0
        for text in example.texts:
            pattern = next(
                p for n, p in questions.read_things().items() if n in text.instructions[0]
            )
            if text.answer == "Yes.":
                assert pattern.search(told)
    assert questions.ask_about([one, other], 2, 1) == questions.ask_about([one, other], 2, 1)


def test_questions_of_few_things(monkeypatch):
    """Three things known, two of them in the picture: one is asked about each way."""
    known = [f"{name}: {name.split()[1]}" for name in ("a dog", "a cat", "a boat")]
    monkeypatch.setattr(questions, "prompt_lines", lambda name: known)
    one = data.Example("a", bytes, (), ("A dog and a cat.", "Two animals."))
    (asked,) = questions.ask_about([one], 1, 0)
    assert sorted(text.answer for text in asked.texts) == ["No.", "Yes."]
    with pytest.raises(UserError, match="“--replay”"):
        questions.ask_about([replace(one, captions=())], 1, 0)


def test_prompts_that_cannot_be_used_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PROMPTS", tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        files.prompt_lines("caption.txt")
    (tmp_path / "caption.txt").write_bytes("Décrivez.".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        files.prompt_lines("caption.txt")
    (tmp_path / "caption.txt").write_text("# nothing yet\n")
    with pytest.raises(UserError, match="empty"):
        files.prompt_lines("caption.txt")


def test_other_pictures_are_encoded_anew(tmp_path):
    """Two data sets that number their pictures alike do not share cached features."""
    losses = []
    for name, count in (("a", 10), ("b", 10)):
        (tmp_path / name).mkdir()
        shard = write_shard(tmp_path / name / "train-00000.tar", count, first=5 * len(losses))
        run = train(
            data.read_shards(str(shard)), tmp_path / f"run-{name}", feature_cache=tmp_path / "cache"
        )
        losses.append(run.rows[0]["loss"])
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2
    assert losses[0] != losses[1]


def test_pictures_of_equal_names_sizes_and_samples_are_told_apart(examples, tmp_path):
    for part in (examples[:2], examples[2:4], examples[:2]):
        alike = [replace(e, key=str(i), sample=partial(str, "1 2")) for i, e in enumerate(part)]
        Features(tiny_model(), alike, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("packed", [True, False])
def test_a_copy_is_the_same_data_and_a_changed_picture_is_not(tmp_path, packed):
    original = tmp_path / "original"
    if packed:
        original.mkdir()
        write_shard(original / "train-00000.tar", 3)
        place = original / "train-00000.tar"
    else:
        write_captioned(original, 3)
        place = next(original.rglob("*.jpg"))
    shutil.copytree(original, copy := tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(place, (0, 0))

    def mark(folder):
        return fingerprint(read_captioned(str(folder)))

    assert mark(original) == mark(copy)
    content = bytearray(place.read_bytes())
    at = content.index(b"\xff\xda") + 40  # in the first picture's pixels
    content[at] ^= 1
    place.write_bytes(content)
    assert mark(original) != mark(copy)


def test_a_shard_is_sampled_once_for_all_of_its_pictures(tmp_path, monkeypatch):
    sampled, shard = [], write_shard(tmp_path / "a.tar", 3)
    monkeypatch.setattr(data, "sample_of", lambda *given: str(sampled.append(given)))
    marks = [example.version for example in data.read_shards(str(shard))]
    assert len({*marks}) == 3 and len(sampled) == 1


def test_another_encoder_encodes_anew(examples, tmp_path):
    """The same model and pictures, and one number of the encoder's or the bridge's is another."""
    for change in ("", "encoder", "bridge", ""):
        model = tiny_model()
        if change:
            next(getattr(model, change).parameters()).data.view(-1)[0] += 1
        Features(model, examples[:1], cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_two_runs_fill_one_cache(examples, tmp_path, monkeypatch):
    """One begins and ends while the other is at it."""
    encode, model, others = Features._encode, tiny_model(), []

    def with_another(self, *arguments):
        if not others:
            others.append(os.getpid() + 1)
            with monkeypatch.context() as patch:
                patch.setattr(os, "getpid", lambda: others[0])
                Features(model, examples[:2], cache=tmp_path)
        return encode(self, *arguments)

    monkeypatch.setattr(Features, "_encode", with_another)
    found = Features(model, examples[:2], cache=tmp_path)([(0, 0), (1, 0)])
    monkeypatch.undo()
    expected = Features(model, examples[:2])([(0, 0), (1, 0)])
    torch.testing.assert_close(found.float(), expected, atol=1e-2, rtol=1e-2)
    assert len(list(tmp_path.iterdir())) == 2  # the shard and the cache


def test_what_could_not_be_decoded_is_known_from_the_cache(examples, tmp_path):
    damaged = replace(examples[1], read=lambda: b"no picture")
    some = [
        examples[0],
        damaged,
        *[replace(e, key=f"{e.key}{i}") for i, e in enumerate(examples[:3])],
    ]
    for _ in range(2):  # encoded, and found again
        assert Features(tiny_model(), some, cache=tmp_path / "cache").usable() == [0, 2, 3, 4]


def test_an_encoding_that_fails_leaves_nothing(examples, tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("damaged")

    monkeypatch.setattr(Features, "_encode", fail)
    with pytest.raises(UserError):
        Features(tiny_model(), examples, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("native", [torch.float32, torch.bfloat16])
def test_on_a_processor_the_encoder_computes_in_the_language_models_type(
    native, examples, monkeypatch
):
    monkeypatch.setattr("minigpt4.training.features.choose_dtype", lambda _: native)
    plain = Features(model := tiny_model(), examples[:1])([(0, 0)])
    model.llm.to(torch.bfloat16)
    rounded = Features(model, examples[:1])([(0, 0)])
    assert torch.equal(plain, rounded) == (native == torch.float32)


def test_what_a_killed_run_left_is_deleted(examples, tmp_path):
    cache = tmp_path / "cache"
    Features(tiny_model(), examples[:2], cache=cache)
    path = next(cache.iterdir())
    path.unlink()
    old, new = (path.with_suffix(f".{number}.part") for number in (1, 2))
    for part in (old, new):
        part.write_bytes(b"incomplete")
    os.utime(old, (0, 0))
    Features(tiny_model(), examples[:2], cache=cache)
    assert {*cache.iterdir()} == {path, new}


def test_cached_features_train_the_same(examples, tmp_path):
    fresh = train(examples, tmp_path / "fresh")
    cached = train(examples, tmp_path / "cached", feature_cache=tmp_path / "cache")
    again = train(examples, tmp_path / "again", feature_cache=tmp_path / "cache")
    losses = [[r["loss"] for r in t.rows] for t in (fresh, cached, again)]
    assert losses[1] == losses[2]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)  # the cache holds 16 bits


def test_two_processes_are_one(tmp_path):
    """The same loss and gradient from two CPU processes as from one on the joined batch."""
    shard = write_shard(tmp_path / "train-00000.tar")
    results = {}
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        launch = [sys.executable]
        if processes > 1:
            launch += ["-m", "accelerate.commands.launch", "--num_machines=1"]
            launch += [f"--num_processes={processes}", "--mixed_precision=no"]
            # The flag means one process a device, CPUs among them.
            launch += ["--dynamo_backend=no", "--multi_gpu", "--main_process_port=0"]
        launch += ["-m", "tests.training_case", str(shard), str(out)]
        root = Path(training_case.__file__).parent.parent
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(launch, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        results[processes] = torch.load(out, weights_only=True)
    assert [results[n]["world"] for n in (1, 2)] == [1, 2]
    assert results[1]["loss"] == pytest.approx(results[2]["loss"], rel=1e-5)
    torch.testing.assert_close(
        results[1]["gradients"], results[2]["gradients"], atol=1e-5, rtol=1e-4
    )


def test_published_schedules():
    """Warm-up, peak, floor of the published configs."""
    stage1 = MODELS["vicuna-7b"].stage1
    assert learning_rate(stage1, 0) == pytest.approx(1e-6)
    # The published cosine counts from step 0, so that the peak is not quite reached.
    assert learning_rate(stage1, 5000) == pytest.approx(9.707e-5, rel=1e-3)
    assert learning_rate(stage1, 20000) == pytest.approx(8e-5)
    stage2 = MODELS["vicuna-7b"].stage2
    assert learning_rate(stage2, 200) == pytest.approx(2.809e-5, rel=1e-3)
    assert learning_rate(stage2, 1000) == pytest.approx(1e-5)
    rates = [learning_rate(stage2, s) for s in range(200, 1001)]
    assert rates == sorted(rates, reverse=True)


def test_no_rate_is_above_the_highest():
    given = argparse.Namespace(stage=1, steps=None, batch_size=None, peak_lr=1e-7)
    schedule = schedule_of(given, MODELS["vicuna-7b"])
    assert max(learning_rate(schedule, step) for step in range(0, 9999, 99)) <= 1e-7


@pytest.mark.parametrize(("share", "name"), [(0.1, "replay"), (0.9, "data")])
def test_data_without_a_place_in_a_batch_is_refused(examples, tmp_path, share, name):
    recipe = replace(PROMPTED, replay_share=share)
    trainer = make(tiny_model(), examples[:4], recipe, tmp_path / "run", replay=examples[4:])
    with pytest.raises(UserError, match=f"no place for “--{name}”"):
        trainer.run()


def test_a_run_that_diverges_ends(examples, tmp_path):
    trainer = make(tiny_model(), examples, PROMPTED, tmp_path / "run")
    with torch.no_grad():
        trainer.model.projection.bias += 1e30  # more than the file's 16 bits hold
    with pytest.raises(UserError, match="lower “--peak-lr”"):
        trainer.save_weights(trainer.projection_path)
    trainer.loss_and_gradient = lambda *_: math.nan
    with pytest.raises(UserError, match="diverged in step 1"):
        trainer.run()
    assert not any((tmp_path / "run").iterdir())


def test_fewer_steps_warm_up_shorter():
    """Of a hundred steps, twenty: two hundred, as published, would be longer than the run."""
    options = argparse.Namespace(stage=2, steps=100, batch_size=None, peak_lr=None)
    assert schedule_of(options, MODELS["vicuna-7b"]).warmup_steps == 20
    options.steps = 1000
    assert schedule_of(options, MODELS["vicuna-7b"]) == MODELS["vicuna-7b"].stage2


@pytest.mark.parametrize("length", [3, 60])
def test_long_texts_are_said_to_be_cut(tmp_path, length, capsys):
    folder = write_captioned(tmp_path / "set", 3)
    lines = [f"{i}.jpg,{'word ' * length}" for i in range(3)]
    (folder / "captions.csv").write_text("\n".join(["file_name,caption", *lines]))
    trainer = make(tiny_model(), read_captioned(str(folder)), PROMPTED, tmp_path / "run")
    for step in range(2):
        trainer.prompts(step, [0, 1])
    told = capsys.readouterr().err.count("24 tokens are learned at most: that of 0.jpg is cut")
    assert told == (length > 24)


def test_published_captions():
    caption = 'A "Dog" (brown)  runs: fast! ' + "word " * 60
    cleaned = published_caption(caption)
    assert cleaned.startswith("a dog brown runs fast word")
    assert len(cleaned.split()) == 50


def test_shards_and_descriptions_are_read(tmp_path):
    write_shard(tmp_path / "train-00000.tar", 4)
    write_shard(tmp_path / "train-00001.tar", 4)
    for pattern in ("train-*.tar", "train-{00000..00001}.tar"):
        assert len(data.read_shards(str(tmp_path / pattern))) == 8
    described = data.read_descriptions(write_descriptions(tmp_path / "two"))
    assert [e.texts[0].answer for e in described][:1] == ["The image shows pattern 0."]
    assert described[0].picture().size == (60, 44)
    pairs = [{"instruction": "Why?", "answer": "Because."}]
    line = json.dumps({"image_id": "2", "pairs": pairs})
    (tmp_path / "instruct.jsonl").write_text(line + "\n")
    asked = data.read_instructions(tmp_path / "instruct.jsonl", tmp_path / "two")
    merged = data.merge([*described, *asked])
    assert len(merged) == 6 and [t.answer for t in merged[2].texts][1] == "Because."


def test_wrong_data_is_named(tmp_path):
    with pytest.raises(UserError, match="no shard"):
        data.read_shards(str(tmp_path / "none-*.tar"))
    (tmp_path / "bad.tar").write_bytes(b"this is no tar file at all" * 100)
    with pytest.raises(UserError, match="bad.tar"):
        data.read_shards(str(tmp_path / "bad.tar"))
    with pytest.raises(UserError, match="filter_cap.json"):
        data.read_descriptions(tmp_path)
    folder = write_descriptions(tmp_path / "two")
    (folder / "image" / "3.jpg").unlink()
    with pytest.raises(UserError, match="3.jpg"):
        data.read_descriptions(folder)


def test_shards_as_people_make_them(tmp_path):
    """Folders in the names, capitals, one caption as a string, no caption, odd JSON."""
    path = tmp_path / "odd.tar"
    content = training_case.jpeg(training_case.picture(0))
    with tarfile.open(path, "w") as shard:
        for name, body in (
            ("./00001.JPG", content),
            ("./00001.json", b'{"caption": "A dog."}'),
            ("v1.0/00001.jpg", content),
            ("v1.0/00001.json", b'{"captions": "A cat."}'),
            ("00003.jpg", content),
            ("00003.json", b"[1, 2]"),
            ("00004.jpg", content),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(body)
            shard.addfile(member, io.BytesIO(body))
    found = data.read_shards(str(path))
    assert sorted(e.captions for e in found) == [("A cat.",), ("A dog.",)]
    assert found[0].picture().size == (60, 44)
    (tmp_path / "odd.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(UserError, match="uncompressed"):
        data.read_shards(str(tmp_path / "odd.tar.gz"))


def test_a_damaged_picture_is_named(tmp_path):
    folder = write_descriptions(tmp_path / "two")
    (folder / "image" / "3.jpg").write_bytes(b"\xff\xd8 cut")
    with pytest.raises(UserError, match="Picture 3 of the data"):
        data.read_descriptions(folder)[3].picture()


def test_random_crops_are_as_published():
    draw, picture = random.Random(0), Image.new("RGB", (200, 100))
    for _ in range(50):
        width, height = random_resized_crop(picture, draw).size
        assert 0.49 <= width * height / 20_000 <= 1.0
        assert 0.7 <= width / height <= 2.0


def test_crops_are_others_each_step_and_the_same_again(examples, tmp_path):
    trainer = make(tiny_model(), examples, replace(PROMPTED, crop=True), tmp_path / "run")
    first, again, later = (trainer.features([(3, 0)], seed) for seed in ("1", "1", "2"))
    assert torch.equal(first, again)
    assert (first - later).abs().max() > 1e-3


def test_crops_are_not_kept(examples, tmp_path, capsys):
    shard = str(tmp_path / "train-00000.tar")
    assert main(["train", "--stage", "1", "--data", shard, "--crop", "--cache", "kept"]) == 2
    assert capsys.readouterr().err.endswith("omit “--cache”.\n")


def test_questions_beside_samples_would_not_be_asked(examples, tmp_path, capsys):
    shard = str(tmp_path / "train-00000.tar")
    options = ["--stage", "1", "--data", shard, "--samples", "2", "--questions", "3"]
    assert main(["train", *options]) == 2
    assert capsys.readouterr().err.endswith("omit one of them.\n")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--instructions nope.jsonl", "needs the layout of the second stage"),
        ("--init a --projection b", "omit one"),
        ("--init {0}/run/nano-best.safetensors --out {0}/run", "would be overwritten"),
        ("--threads 1", "models with a word head"),
        ("--replay-share 0.5", "belongs to “--replay”"),
        ("--reward-weight 1", "belongs to “--samples”"),
        ("--validate-every 5", "belongs to “--validate”"),
        ("--stage 2 --init a --samples 2", "reads from “--replay”"),
        ("--vision {0}/none.safetensors", "none.safetensors"),
        ("--init {0}", "is a folder: name the file in it, {0}/nano.safetensors."),
        ("--init runs/none.safetensors", "“--init runs/none.safetensors:FILE”"),
        ("--init {0}/stage2.safetensors", "right file with “--init”"),
        ("--out=", "--out: must be a name, not empty"),
        ("--mix a=0", "needs a weight above 0, not “0”"),
        ("--mix a=-1", "needs a weight above 0, not “-1”"),
        ("--blend 3", "from 0 to 1, not “3”"),
    ],
)
def test_options_without_an_effect_are_refused(tmp_path, given, said, capsys):
    write_captioned(tmp_path / "data", 1)
    options = ["--stage", "1", "--data", f"{tmp_path}/data", *given.format(tmp_path).split()]
    for name in ("nano-best", "nano", "stage2"):
        tensors = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
        save_projection(tensors, tmp_path / f"{name}.safetensors")
    try:
        status = main(["train", *options])
    except SystemExit as ended:  # a value that cannot be
        status = ended.code
    assert status == 2 and said.format(tmp_path) in capsys.readouterr().err


def test_a_comparison_with_mirror_images_does_not_show_them(examples, tmp_path):
    recipe = replace(PROMPTED, mirror=False, denoise=1.0)
    trainer = make(tiny_model(), examples, recipe, tmp_path / "run")
    assert {view for step in range(9) for _, view in trainer.prompts(step, [0, 1])[1]} == {0}


def test_batches_cover_each_epoch_and_resume():
    def first(n, start=0):
        stream = batches(10, 3, seed=1, start=start)
        return [next(stream) for _ in range(n)]

    run = first(7)
    assert first(4, start=3) == run[3:]
    for epoch in (run[0:3], run[3:6]):
        assert len({i for batch in epoch for i in batch}) == 9
    assert run[:3] != run[3:6]
    mixed = mixed_batches([10, 5], [2, 1], seed=1)
    for _ in range(20):
        a, b, c = next(mixed)
        assert a < 10 and b < 10 and 10 <= c < 15
