"""Researchers' runs: held-out scores, the best projection, parts, mixtures, files of options."""

import csv
import math
import sys
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml

from minigpt4.__main__ import main
from minigpt4.data.datasets import read_captioned
from minigpt4.data.examples import read_shards
from minigpt4.data.files import write_settings
from minigpt4.errors import UserError
from minigpt4.options import Option, Parser, integer, number, switch
from minigpt4.training import run as training
from minigpt4.training import validation
from minigpt4.training.batches import divide
from minigpt4.training.trainer import Recipe, recompute_activations
from minigpt4.training.validation import Validation, dashboards, watch
from minigpt4.weights.checkpoint import read_projection
from tests.test_training import PROMPTED, make
from tests.training_case import SCHEDULE, jpeg, picture, tiny_model, write_captioned, write_shard


@pytest.fixture
def examples(tmp_path):
    return read_shards(str(write_shard(tmp_path / "train-00000.tar")))


@pytest.fixture
def held_out(tmp_path):
    return read_shards(str(write_shard(tmp_path / "val-00000.tar", 5, first=20)))


def run(examples, held_out, out, recipe=PROMPTED, steps=SCHEDULE.steps):
    trainer = make(tiny_model(), examples, replace(recipe, checkpoint_every=2), out)
    trainer.resume()
    watching = Validation(trainer, held_out, 2)
    trainer.after_step.append(watching)
    if steps < SCHEDULE.steps:

        def stop():
            if trainer.step == steps:
                trainer.save()
                raise KeyboardInterrupt

        trainer.after_step.append(stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    else:
        trainer.run()
    return trainer, watching


@pytest.mark.parametrize("recipe", [PROMPTED, Recipe(SCHEDULE)], ids=["extended", "published"])
def test_held_out_scores_and_the_best_projection(
    examples, held_out, tmp_path, recipe, monkeypatch, capsys
):
    monkeypatch.setattr(validation, "CAPTION_TOKENS", 5)
    trainer, watching = run(examples, held_out, tmp_path / "whole", recipe)
    assert [row["step"] for row in watching.rows] == [2, 4, 6]
    losses = [row["loss"] for row in watching.rows]
    assert len(set(losses)) == 3 and all(row["cider"] >= 0 for row in watching.rows)
    with (tmp_path / "whole" / "validation.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == losses
    assert "held-out loss" in capsys.readouterr().err
    best = read_projection(trainer.best_path)["weight"]
    is_last = losses.index(min(losses)) == 2
    assert torch.equal(best, read_projection(trainer.projection_path)["weight"]) == is_last
    # Measuring changes nothing, and a resumed run goes on with both.
    plain = make(tiny_model(), examples, recipe, tmp_path / "plain")
    plain.run()
    assert [r["loss"] for r in plain.rows] == [r["loss"] for r in trainer.rows]
    run(examples, held_out, tmp_path / "halves", recipe, steps=4)
    _, halves = run(examples, held_out, tmp_path / "halves", recipe)
    assert halves.rows == watching.rows
    capsys.readouterr()
    watch(trainer, held_out[:2], 2)  # of a run that has ended
    assert f"Step {SCHEDULE.steps}: held-out loss" in capsys.readouterr().err


def test_no_number_is_never_the_best(examples, held_out, tmp_path, monkeypatch):
    trainer = make(tiny_model(), examples, PROMPTED, tmp_path / "run")
    watching, kept = Validation(trainer, held_out[:1], 1), []
    monkeypatch.setattr(trainer, "save_weights", lambda *_, **more: kept.append(trainer.step))
    for loss in (math.nan, 2.0, math.inf, math.nan, 1.0):
        trainer.step += 1
        monkeypatch.setattr(watching, "measure", lambda loss=loss: {"loss": loss, "cider": 0.0})
        watching()
    assert kept == [2, 5]


def test_losses_on_other_pictures_are_not_compared(examples, held_out, tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "CAPTION_TOKENS", 2)
    trainer, _ = run(examples, held_out[:3], tmp_path / "run", steps=2)
    with pytest.raises(UserError, match="best on other held-out pictures"):
        run(examples, held_out[:2], tmp_path / "run")
    trainer.best_path.unlink()
    _, anew = run(examples, held_out[:2], tmp_path / "run", steps=4)
    assert [row["step"] for row in anew.rows] == [2, 4]  # kept, but not compared
    assert anew._since == 3
    trainer.best_path.write_bytes(b"damaged")
    _, last = run(examples, held_out[:3], tmp_path / "run", steps=5)
    assert [row["step"] for row in last.rows] == [2, 4] and last._since == 5


def test_all_processes_end_where_the_main_one_cannot_begin(monkeypatch):
    wrong = UserError("The held-out pictures are others.")
    monkeypatch.setattr(training, "broadcast_object_list", lambda found: [wrong])
    begun = training.prepared(SimpleNamespace(main=False), [], Namespace())
    with pytest.raises(UserError, match="are others"), begun:
        raise AssertionError("began")


def test_two_runs_do_not_write_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "broadcast_object_list", lambda found: found)
    monkeypatch.setattr(training, "watch", lambda *_: None)
    monkeypatch.setattr(training, "given_options", lambda _: {})
    run = SimpleNamespace(main=True, out=tmp_path / "run")
    given = Namespace(validate_every=1)
    for _ in range(2):  # one after the other may
        with (
            training.prepared(run, [], given),
            pytest.raises(UserError, match="Another run is writing"),
            training.prepared(run, [], given),
        ):
            raise AssertionError("began")


def test_an_earlier_run_s_best_is_not_taken_for_this_one_s(examples, tmp_path):
    """That run had ended before its first checkpoint, or somebody deleted it."""
    first = make(tiny_model(), examples, PROMPTED, tmp_path / "run")
    first.save_weights(first.best_path)
    with pytest.raises(UserError, match="is an earlier run's"):
        first.resume()
    assert first.best_path.exists()


def test_other_pictures_of_the_same_names_are_no_false_alarm(tmp_path, capsys):
    trained, other = tmp_path / "train", tmp_path / "other"
    write_captioned(trained, 2)
    write_captioned(other, 2)
    (other / "0.jpg").write_bytes(jpeg(picture(5)))
    trainer = make(tiny_model(), read_captioned(str(trained)), PROMPTED, tmp_path / "run")
    Validation(trainer, read_captioned(str(other)), 2)
    assert "that are also trained on: 1 (1.jpg)" in capsys.readouterr().err


def test_the_loss_is_that_of_the_held_out_pictures(examples, tmp_path, monkeypatch):
    """On what is learned by heart it falls; the greedy captions come to match."""
    monkeypatch.setattr(validation, "CAPTION_TOKENS", 12)
    schedule = replace(SCHEDULE, steps=60, peak_lr=5e-2, floor_lr=5e-2)
    trainer = make(tiny_model(), examples, replace(PROMPTED, schedule=schedule), tmp_path / "run")
    watching = Validation(trainer, examples, 60)
    before = watching.measure()
    trainer.run()
    assert watching.measure()["loss"] < before["loss"] - 0.3


@pytest.mark.parametrize("recipe", [PROMPTED, replace(PROMPTED, consensus=1.0)])
def test_a_batch_in_parts_has_the_same_gradient(examples, tmp_path, recipe):
    found = []
    for parts in (1, 3, 9):
        trainer = make(
            tiny_model(), examples, replace(recipe, accumulate=parts), tmp_path / str(parts)
        )
        loss = trainer.loss_and_gradient(0, [3, 1, 4, 9])
        found.append((loss, trainer.model.projection.weight.grad.clone()))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("error::FutureWarning")  # of transformers, in every training
def test_recomputing_activations_gives_the_same_gradient(examples, tmp_path):
    found = []
    for recompute in (False, True):
        trainer = make(tiny_model(), examples, PROMPTED, tmp_path / str(recompute))
        llm, calls = trainer.model.torch_llm, []
        if recompute:
            recompute_activations(llm)
        llm.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_, to=calls: to.append(1))
        trainer.loss_and_gradient(0, [3, 1, 4, 9])
        found.append((trainer.model.projection.weight.grad.clone(), len(calls), llm.training))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert [calls for _, calls, _ in found] == [1, 2] and not found[1][2]


def test_batches_are_divided_by_weight(examples, held_out, tmp_path):
    assert divide(12, [1, 1, 1]) == [4, 4, 4]
    assert divide(10, [2, 1, 1]) == [5, 3, 2]
    with pytest.raises(UserError, match="too small for these weights"):
        divide(4, [100, 1])
    recipe = replace(PROMPTED, mixture=((10, 1.0), (5, 3.0)))
    trainer = make(tiny_model(), [*examples, *held_out], recipe, tmp_path / "run")
    seen = []
    loss = trainer.loss_and_gradient
    trainer.loss_and_gradient = lambda step, indices: seen.append(indices) or loss(step, indices)
    trainer.run()
    assert [sum(i < 10 for i in batch) for batch in seen] == [1] * SCHEDULE.steps
    other = make(tiny_model(), [*examples, *held_out], PROMPTED, tmp_path / "run")
    with pytest.raises(UserError):
        other.resume()


def test_logs_for_tensorboard(examples, tmp_path):
    pytest.importorskip("tensorboard")
    trainer = make(tiny_model(), examples, PROMPTED, tmp_path / "run")
    watch(trainer, [], 1)
    trainer.run()
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


def test_logs_for_weights_and_biases(examples, tmp_path, monkeypatch):
    """Only where it is told where to send them."""
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    before = len(dashboards(tmp_path, 0))
    monkeypatch.setenv("WANDB_MODE", "offline")
    trainer = make(tiny_model(), examples, PROMPTED, tmp_path / "run")
    watch(trainer, [], 1)
    trainer.run()
    assert len(dashboards(tmp_path / "other", 0)) == before + 1
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))


def test_dashboards_that_cannot_be_used(tmp_path, monkeypatch):
    def init(**_):
        raise ValueError("mode\n  Input should be 'online'")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=True))
    monkeypatch.setenv("WANDB_MODE", "x")
    with pytest.raises(UserError, match="Weights & Biases takes no logs: check .WANDB_API_KEY, "):
        dashboards(tmp_path, 0)


# --- a file of options --------------------------------------------------------------------------


def parser() -> Parser:
    made = Parser(prog="try")
    made.reads_file = "--options"
    options = [
        Option("options", "File."),
        Option("data", "Data.", required=True),
        Option("batch-size", "Size.", 3, integer(1)),
        Option("rate", "Rate.", 0.1, number(0)),
        Option("crop", "Crop.", True, switch),
        Option("mix", "More.", many=True),
        Option("validate", "Held out.", bare="on"),
    ]
    made.add(options, prefix="TRY_")
    return made


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("o.yaml", "data: a b.tar\nbatch-size: 7\nrate: 1e-3\ncrop: false\nmix: [b=1, c=2]\n"),
        (
            "o.toml",
            'data = "a b.tar"\nbatch_size = 7\nrate = 1e-3\ncrop = false\nmix = ["b=1", "c=2"]',
        ),
    ],
)
def test_options_from_a_file(tmp_path, name, text, monkeypatch):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8-sig")
    found = parser().parse_args(["--options", str(path), "--rate", "0.5"])
    assert (found.data, found.batch_size, found.crop) == ("a b.tar", 7, False)
    assert (found.rate, found.mix) == (0.5, ["b=1", "c=2"])
    monkeypatch.setenv("MINIGPT4_TRY_OPTIONS", str(path))
    assert parser().parse_args([]).rate == 1e-3
    write_settings(tmp_path / "again.yaml", {"data": "ä: b", "rate": 0.25, "crop": True})
    again = parser().parse_args([f"--options={tmp_path / 'again.yaml'}", "--validate", "v.tar"])
    assert (again.data, again.rate, again.crop, again.validate) == ("ä: b", 0.25, True, "v.tar")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: a\nbatchsize: 3", "“batchsize”, which is not an option"),
        ("data: a\nbatch-size: [1, 2]", "must be a single value"),
        ("data: a\nbatch-size: x", "must be an integer"),
        ("data: a\ncrop: maybe", "“crop” in {path} must be on or off (or 1, 0, true"),
        ("data: [", "is not TOML or YAML: check it near line"),
        ("data = 1\nsteps = \n", "check it near line 2 "),
        ("data = ", "check it near its end "),
        ("data: a\nrate: 1\nrate: 2", "has “rate” more than once: remove or rename all but one"),
        ("data: a\nbatch-size: 1\nbatch_size: 2", "has “batch-size” twice, with “-” and “_”"),
        ("data:\n  a: 1", "must have a line"),
        ("- data", "must have a line"),
    ],
)
def test_mistakes_in_a_file_of_options(tmp_path, text, message, capsys):
    path = tmp_path / ("o.TOML" if "=" in text else "o.yaml")
    path.write_text(text)
    with pytest.raises(SystemExit):
        parser().parse_args(["--options", str(path)])
    line = capsys.readouterr().err
    assert message.format(path=path) in line and line.count("\n") == 1


def test_the_command_line_takes_precedence_over_a_file_s_lists(tmp_path, capsys):
    path = tmp_path / "o.yaml"
    for crop, on in (('"yes"', True), ("1", True), ("'off'", False)):
        path.write_text(f"data: a\nmix: [b=1, c=2]\ncrop: {crop}\n")
        found = parser().parse_args(["--options", str(path), "--mix", "d=3"])
        assert found.mix == ["d=3"] and found.crop is on
    with pytest.raises(SystemExit):
        parser().parse_args(["--options", str(path), f"--options={path}"])
    assert "is given twice" in capsys.readouterr().err


def test_a_run_of_the_command(tmp_path, monkeypatch):
    """Everything together, with nano; the file that the run writes starts the same run again."""
    monkeypatch.setattr(validation, "CAPTION_TOKENS", 3)
    write_shard(tmp_path / "train.tar", 4)
    write_shard(tmp_path / "val.tar", 2, first=10)
    more = write_captioned(tmp_path / "more", 3)
    given = {"stage": 1, "data": str(tmp_path / "train.tar"), "mix": [f"{more}=1"], "steps": 2}
    given |= {"batch-size": 2, "accumulate": 2, "validate": str(tmp_path / "val.tar")}
    given |= {"validate-every": 1, "out": str(tmp_path / "run"), "device": "cpu"}
    (tmp_path / "o.yaml").write_text(yaml.safe_dump(given))
    assert main(["train", "--options", str(tmp_path / "o.yaml")]) == 0
    written = tmp_path / "run" / "options.yaml"
    assert {**yaml.safe_load(written.read_text()), **given} == yaml.safe_load(written.read_text())
    assert (tmp_path / "run" / "nano-best.safetensors").exists()
    with (tmp_path / "run" / "validation.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1.0", "2.0"]
    losses = (tmp_path / "run" / "loss.csv").read_text().splitlines()
    again = ["train", "--options", str(written), "--out", str(tmp_path / "again")]
    assert main(again) == 0
    repeated = (tmp_path / "again" / "loss.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in repeated] == [line.split(",")[1] for line in losses]
