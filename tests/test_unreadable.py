"""One picture that cannot be used ends no long job: it is named, counted and left out."""

import errno
import json
import os
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minigpt4 import start
from minigpt4.__main__ import main
from minigpt4.batch import ask_photos, greedy, not_asked_yet
from minigpt4.curation.export import export
from minigpt4.data.examples import read_shards, usable
from minigpt4.data.files import replacing
from minigpt4.data.outputs import write_json
from minigpt4.errors import UserError
from minigpt4.model.words import load_words
from minigpt4.training.extended import ExtendedRecipe
from minigpt4.training.trainer import Recipe
from minigpt4.weights.checkpoint import read_checkpoint
from minigpt4.weights.share import _metadata
from tests.test_training import PROMPTED, train
from tests.training_case import SCHEDULE, write_captioned, write_shard


def damaged(examples, *places: int) -> list:
    """The examples, with pictures at these places that cannot be decoded."""
    return [replace(e, read=lambda: b"x") if i in places else e for i, e in enumerate(examples)]


@pytest.fixture
def examples(tmp_path):
    return damaged(read_shards(str(write_shard(tmp_path / "train-00000.tar"))), 3, 4, 9)


@pytest.mark.parametrize("cached", [False, True])
def test_training_goes_on_and_a_resumed_run_repeats_it(examples, tmp_path, cached, capsys):
    options = {"feature_cache": tmp_path / "cache"} if cached else {}
    whole = train(examples, tmp_path / "whole", **options)
    lines = capsys.readouterr().err
    named = re.findall(r"Picture train-00000/0000(\d) .*left out", lines)
    assert sorted(named) == ["3", "4", "9"]
    assert "3 of 10 pictures could not be used and were left out." in lines
    recipe = replace(PROMPTED, checkpoint_every=3)
    train(examples, tmp_path / "halves", recipe, steps=3, **options)
    halves = train(examples, tmp_path / "halves", recipe, **options)
    assert [r["loss"] for r in halves.rows] == [r["loss"] for r in whole.rows]
    torch.testing.assert_close(
        halves.model.projection.weight, whole.model.projection.weight, atol=0, rtol=0
    )


@pytest.mark.parametrize(
    "recipe", [Recipe(SCHEDULE, crop=True), ExtendedRecipe(SCHEDULE, ("Say.",), eigenbasis=True)]
)
def test_each_recipe_leaves_them_out(examples, tmp_path, recipe):
    trainer = train(examples, tmp_path / "run", recipe)
    assert trainer.step == SCHEDULE.steps
    assert trainer.sources[0].unreadable <= {3, 4, 9}


def test_replayed_pictures_are_replaced_by_replayed_ones(examples, tmp_path):
    recipe = replace(PROMPTED, replay_share=0.5)
    trainer = train(examples[:3], tmp_path / "run", recipe, replay=examples[3:])
    assert trainer.sources[1].unreadable <= {0, 1, 6} and trainer.step == SCHEDULE.steps


def test_too_many_end_the_run(examples, tmp_path):
    with pytest.raises(UserError, match="6 of 10 pictures cannot be used, which is more than 50%"):
        train(damaged(examples, *range(7)), tmp_path / "run")
    with pytest.raises(UserError, match="6 of 10 pictures cannot be used"):
        usable(damaged(examples, 0, 1, 2))


@pytest.fixture
def one_engine(monkeypatch):
    """The first engine that is opened serves every command, and is closed at the end."""
    opened, real = [], start.open_engine

    def once(options):
        if not opened:
            opened.append(real(options))
            monkeypatch.setattr(opened[0], "close", lambda: None)
        return opened[0]

    monkeypatch.setattr(start, "open_engine", once)
    yield
    monkeypatch.undo()
    opened[0].close()


@pytest.mark.usefixtures("one_engine")
def test_photos_that_are_missing_or_damaged(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MINIGPT4_MODEL", "nano")
    folder = write_captioned(tmp_path / "photos", 2)
    (folder / "0.jpg").write_bytes(b"x")
    photos = [str(folder / name) for name in ("0.jpg", "1.jpg", "2.jpg")]
    out = tmp_path / "answers.jsonl"
    for options in (["--out", str(out)], []):
        assert main(["ask", *photos, "What?", *options, "--max-new-tokens", "2"]) == 2
        said, answers = capsys.readouterr()[::-1]
        assert all(f"{photo} is left out: " in said for photo in (photos[0], photos[2]))
        assert "2 of 3 photos got no answer, which is more than 50%" in said
        assert answers.count("\n") == (not options)  # the errors are not among them
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert ["error" in r for r in records] == [True, False, True]
    assert main(["ask", *photos[:2], "What?", "--max-new-tokens", "2"]) == 0
    assert "1 of 2 photos were left out." in capsys.readouterr().err
    assert main(["ask", photos[0], photos[0], "What?", "--max-new-tokens", "2"]) == 2
    assert "None of the photos got an answer: see the reasons above." in capsys.readouterr().err
    (folder / "notes\n.pdf").write_bytes(b"%PDF")
    (folder / "more.jpg").mkdir()
    assert main(["ask", str(folder), "What?", "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr().err
    assert "photos holds 2 photos. Left out, since they are no picture files: " in said
    assert "more.jpg, notes?.pdf" in said
    assert main(["ask", photos[1], "What?", "--out", str(tmp_path / "nowhere" / "a.jsonl")]) == 2
    assert "cannot be opened: check that its folder exists" in capsys.readouterr().err
    # More likely a question without quotes:
    assert main(["ask", photos[1], "What", "is", "this?"]) == 2
    assert "What does not exist" in capsys.readouterr().err


@pytest.mark.usefixtures("one_engine")
def test_an_interrupted_run_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MINIGPT4_MODEL", "nano")
    folder, out = write_captioned(tmp_path / "photos", 2), tmp_path / "answers.jsonl"
    line = json.dumps({"photo": str(folder / "0.jpg"), "question": "What?", "answer": "Kept."})
    failed = {"photo": str(folder / "1.jpg"), "question": "What?", "error": "Busy."}
    out.write_text(f'{line}\n{json.dumps(failed)}\n{{"photo": "cut')
    asked = ["ask", str(folder), "What?", "--out", str(out), "--max-new-tokens", "2"]
    assert main(asked) == 0
    first, second = out.read_text().splitlines()
    assert first == line and json.loads(second)["photo"].endswith("1.jpg")
    monkeypatch.setattr("minigpt4.start.open_engine", lambda _: pytest.fail("nothing is left"))
    assert main(asked) == 0 and out.read_text().count("\n") == 2
    assert "answers about 2 of 2 photos, which are kept: delete it" in capsys.readouterr().err


@pytest.mark.parametrize("cut", ["", '{"pho', '{"photo": "a.j'])
def test_a_run_that_was_cut_in_its_first_line_goes_on(tmp_path, cut):
    out = tmp_path / "answers.jsonl"
    out.write_text(cut)
    with not_asked_yet([Path("a.jpg")], "What?", str(out)) as left:
        assert left == [Path("a.jpg")]
        assert out.read_text() == ""


@pytest.mark.parametrize("cut", ["", '{"photo"'])
def test_two_runs_do_not_write_the_same_file(tmp_path, cut):
    """Also where the first has replaced the file, without its cut line. A link stays a link."""
    out, link = tmp_path / "answers.jsonl", tmp_path / "link.jsonl"
    out.write_text(cut)
    link.symlink_to(out)
    with not_asked_yet([], "What?", str(link)):
        for name in (out, link):
            with (
                pytest.raises(UserError, match="is being written by another run"),
                not_asked_yet([], "What?", str(name)),
            ):
                pass
    with not_asked_yet([], "What?", str(out)):
        assert link.is_symlink() and out.read_text() == ""


def test_names_that_are_not_utf8_are_told_apart(tmp_path):
    out = tmp_path / "answers.jsonl"
    paths = [Path(os.fsdecode(name)) for name in (b"a\xff.jpg", b"a\xfe.jpg", b"a?.jpg")]
    record = {"photo": "a\\xff.jpg", "question": "What?", "answer": "A cat."}
    out.write_text(json.dumps(record) + "\n")
    with not_asked_yet(paths, "What?", str(out)) as left:
        assert left == paths[1:]


@pytest.mark.parametrize(
    ("says", "content"),
    [
        ("something other than answers to this question", "My notes"),
        ("something other than answers to this question", '{"photo": "a", "question": "Who?"}\n'),
        ("something other than answers to this question", '{"photo": "a"}\n'),
        ("is a folder", None),
    ],
)
def test_a_file_of_answers_that_cannot_be_used_is_refused_first(
    tmp_path, capsys, monkeypatch, says, content
):
    monkeypatch.setattr("minigpt4.start.open_engine", lambda _: pytest.fail("it was loaded"))
    photo, out = str(write_captioned(tmp_path / "photos", 1) / "0.jpg"), tmp_path / "a.jsonl"
    out.write_text(content) if content else out.mkdir()
    assert main(["ask", photo, "What?", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1
    assert not content or out.read_text() == content


@pytest.mark.parametrize(
    ("typed", "asked"), [(b"caf\xc3\xa9", "caf\u00e9"), (b"caf\xe9", "caf\ufffd")]
)
def test_a_question_that_is_not_utf8(tmp_path, monkeypatch, typed, asked):
    taken = []
    monkeypatch.setattr("minigpt4.start.open_engine", lambda _: pytest.fail("it was loaded"))
    monkeypatch.setattr(
        "minigpt4.batch.not_asked_yet", lambda *given: nullcontext(taken.extend(given))
    )
    photo = str(write_captioned(tmp_path / "photos", 1) / "0.jpg")
    assert main(["ask", photo, os.fsdecode(typed), "--out", str(tmp_path / "a.jsonl")]) == 0
    assert taken[1] == asked


def test_names_of_photos_on_a_terminal(tmp_path, capsys):
    engine = SimpleNamespace(max_waiting=1, close=lambda: None)  # no picture gets so far
    path, out = tmp_path / "a\n\x1b[31m.jpg", tmp_path / "answers.jsonl"
    for file in (None, str(out)):
        with pytest.raises(UserError, match="None of the photos got an answer"):
            ask_photos(engine, [path], "What?", greedy(1), file)
        assert f"{tmp_path}/a\\n\\x1b[31m.jpg is left out: " in capsys.readouterr().err
    assert json.loads(out.read_text())["photo"] == str(path)


def test_export_leaves_out_what_cannot_be_read(tmp_path, capsys):
    folder = write_captioned(tmp_path / "photos", 3)
    (folder / "1.jpg").write_bytes(b"x")
    records = [
        {"image_id": str(i), "picture": str(folder / f"{i}.jpg"), "text": "A."} for i in range(3)
    ]
    assert export(records, tmp_path / "out") == 2
    annotations = json.loads((tmp_path / "out" / "filter_cap.json").read_text())["annotations"]
    assert [a["image_id"] for a in annotations] == ["0", "2"]
    line = capsys.readouterr().err
    assert "1 is left out: " in line and "1 of 3 pictures cannot be used" in line


@pytest.mark.parametrize("read", [load_words, _metadata, read_checkpoint])
def test_weights_that_cannot_be_read_are_not_called_another_kind(read, tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied")

    path = tmp_path / "a.safetensors"
    path.touch()
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\): change"):
        read(path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    """With the rights of the run's other files, also where a library gives them to the owner."""
    path, beside = tmp_path / "a.bin", tmp_path / "b.txt"
    beside.write_text("b")
    with replacing(path) as partial:
        partial.write_bytes(b"new")
        partial.chmod(0o600)
    assert path.read_bytes() == b"new" and path.stat().st_mode == beside.stat().st_mode
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"new" and {*tmp_path.iterdir()} == {path, beside}


@pytest.mark.parametrize(
    ("named", "number", "said"),
    [
        (True, errno.ENOSPC, "is full: make "),
        (False, errno.ENOSPC, "is full: make "),
        (False, errno.EDQUOT, "is full up to your quota: make "),
        (False, errno.EFBIG, "takes no larger file: raise the limit (ulimit -f)"),
    ],
)
def test_a_full_disk_is_named(tmp_path, capsys, monkeypatch, named, number, said):
    """Also where a library, or a file that is open already, does not say which file it was."""

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    def write(options):
        if not named:
            refuse()
        with pytest.raises(OSError) as caught, replacing(tmp_path / "a.bin"):
            refuse()
        assert caught.value.filename == str(tmp_path / "a.bin")
        monkeypatch.setattr(Path, "write_text", refuse)
        write_json(str(tmp_path / "a.json"), {})

    monkeypatch.setattr("minigpt4.__main__._convert", write)
    out = "elsewhere/a.safetensors" if named else str(tmp_path / "a.safetensors")
    assert main(["convert", "a.pth", out]) == 2
    assert capsys.readouterr().err.startswith(f"minigpt4: The disk of {tmp_path} {said}")
