"""The experiments of `evaluate`, on tiny shards and tiny random models, by their commands."""

import json
from functools import partial

import pytest

from minigpt4.__main__ import main
from minigpt4.batch import Batch, PictureQuestion, greedy
from minigpt4.data import outputs
from minigpt4.data.examples import Example
from minigpt4.data.files import read_jsonl
from minigpt4.engine import Engine
from minigpt4.errors import UserError
from minigpt4.evaluation import captions, chair, pope, report, stages
from minigpt4.evaluation.metrics import sentences
from minigpt4.evaluation.objects import ObjectList
from minigpt4.weights.checkpoint import read_projection, save_projection
from tests.evaluation_case import run
from tests.parity_case import ParityCase
from tests.training_case import PARITY, jpeg, picture, write_captioned, write_shard


@pytest.fixture
def other_projection(tmp_path):
    """A projection file for the tiny model, not its own."""
    tensors = read_projection(ParityCase(PARITY / "vicuna_qformer_a").files.projection)
    path = tmp_path / "other.safetensors"
    save_projection({k: -2 * v for k, v in tensors.items()}, path)
    return path


def test_stages(tiny, other_projection, shard, tmp_path):
    answers = tmp_path / "answers.jsonl"
    options = ["--experiment", "stages", "--limit", 2, "--answers", answers]
    options += ["--stage1", other_projection]
    result, page = run(shard, *options, out=tmp_path)
    lines = read_jsonl(answers, "stage", "answer")
    assert len(lines) == 2 * 2 * 2 and result["n"] == 2
    assert result["experiment"] == "stages" and result["machine"] and result["date"]
    for stage, kinds in result["rates"].items():
        for kind, rate in kinds.items():
            of = [x for x in lines if (x["stage"], x["request"]) == (stage, kind)]
            assert rate["repetition"] == sum(x["repetition"] for x in of) / 2
            assert rate["words"] == sum(len(x["answer"].split()) for x in of) / 2 > 0
            assert rate["failed"] >= max(rate[k] for k in ("repetition", "fragment", "meaningless"))
    # The two projections are really two.
    first, second = ([x["answer"] for x in lines if x["stage"] == f"stage {i}"] for i in (1, 2))
    assert first != second
    assert page.count("| description |") == 2 + 2 and result["command"] in page


def test_a_folder_with_a_table_of_captions_and_a_damaged_picture(
    tiny, other_projection, tmp_path, monkeypatch, capsys
):
    folder = write_captioned(tmp_path / "pictures", 4)
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:200])
    monkeypatch.setattr(stages, "TOKENS", 3)
    monkeypatch.setattr(pope, "TOKENS", 3)
    monkeypatch.setattr(captions, "CAPTION_TOKENS", 3)
    result, _ = run(folder, "--experiment", "stages", "--stage1", other_projection, out=tmp_path)
    assert result["n"] == 3
    (tmp_path / "out.md").unlink()
    result, _ = run(folder, "--experiment", "pope", out=tmp_path)
    assert result["n"] == 3
    assert main(["evaluate", str(folder), "--json", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert (scores["n"], scores["left_out"], scores["projection"]) == (3, 1, None)
    assert scores["date"] and scores["command"] and scores["machine"]
    said = capsys.readouterr().err
    assert said.count("Picture 1.jpg of the data cannot be used") == 3
    assert said.count("1 of 4 pictures cannot be used and are left out.") == 3


def test_objects_that_a_description_invents():
    objects = ObjectList()
    captions = ("A dog chases a frisbee.", "An animal on the grass, no cat.")
    example = Example("a", bytes, (), captions)
    one = chair.judge(objects, example, "A dog and two cats sit on a bench. A horse?")
    assert one == chair.Judged({"a dog"}, {"a bench"}, {"a frisbee"})
    other = chair.judge(objects, example, "A dog with a frisbee.")
    result = chair.rates([one, other])
    assert (result["chair_i"], result["chair_s"], result["recall"]) == (1 / 4, 1 / 2, 3 / 4)
    assert result["most_often_wrong"] == {"a bench": 1}
    text = chair.as_text(result | {"instruction": "Describe."})
    assert "| CHAIR_i |" in text.replace("  ", " ") and "| a bench |" in text.replace("  ", " ")


def test_chair(tiny, shard, tmp_path, monkeypatch):
    monkeypatch.setattr(chair, "TOKENS", 20)
    monkeypatch.setattr(captions, "DETAIL_TOKENS", 20)
    answers = tmp_path / "answers.jsonl"
    run(shard, "--experiment", "captions", "--detail", "--answers", answers, out=tmp_path)
    (tmp_path / "out.md").unlink()
    words = [w for x in read_jsonl(answers) for w in x["answer"].split()]
    word = next(w for w in words if w.isascii() and w.isalpha() and len(w) > 2)
    (tmp_path / "objects.txt").write_text(f"a thing: {word}\na dog: dog\n")
    result, _ = run(
        shard, "--experiment", "chair", "--objects", tmp_path / "objects.txt", out=tmp_path
    )
    assert result["n"] == 3 and result["chair_s"] > 0 and result["chair_i"] == 1


@pytest.mark.parametrize("experiment", ["chair", "pope"])
def test_captions_that_name_no_object(experiment, tmp_path, capsys):
    """As those in another language: every object would count as invented."""
    folder = write_captioned(tmp_path / "pictures", 2)
    (folder / "captions.csv").write_text("file_name,caption\n0.jpg,Ein Hund.\n1.jpg,Er schläft.\n")
    assert main(["evaluate", str(folder), "--experiment", experiment]) == 2
    assert "captions name no object of the list" in capsys.readouterr().err


def test_where_all_pictures_are_damaged(tmp_path, capsys):
    folder = write_captioned(tmp_path / "pictures", 1)
    (folder / "0.jpg").write_bytes(b"no picture")
    assert main(["evaluate", str(folder)]) == 2
    assert capsys.readouterr().err.count("minigpt4: None of the pictures can be used") == 1


def test_no_more_are_asked_at_once_than_the_engine_lets_wait():
    case = ParityCase(PARITY / "vicuna_qformer_a")
    examples = [Example(str(i), partial(jpeg, picture(i)), ()) for i in range(6)]
    questions = [PictureQuestion(e.key, "What is this?", e.read) for e in examples]
    with Batch(Engine(case.load(), max_running=1, max_waiting=2), together=128) as batch:
        assert [q for q, _ in batch.answer(questions, greedy(2))] == questions
        asked = [(i, "a dog") for i in range(6)]
        assert [p for p, _ in pope.ask_all(batch, examples, asked, "Is there {}?")] == asked


def test_captions(tiny, shard, tmp_path):
    result, page = run(shard, "--experiment", "captions", "--limit", 2, out=tmp_path)
    assert {"bleu1", "bleu4", "cider", "repetition_rate", "fragment_rate", "n"} <= result.keys()
    assert f"| CIDEr | {result['cider']:.3f} |" in page


def test_a_single_picture_has_no_cider(tiny, tmp_path, capsys):
    shard = write_shard(tmp_path / "one.tar", 1)
    _, page = run(shard, "--experiment", "captions", out=tmp_path)
    assert "CIDEr is 0 for a single picture" in capsys.readouterr().err and "1 picture\n" in page


def test_the_engine_is_closed_after_an_error(tiny, shard, monkeypatch):
    closed = []
    monkeypatch.setattr(captions, "greedy", lambda limit: 1 / 0)
    close = Engine.close
    monkeypatch.setattr(Engine, "close", lambda self: closed.append(close(self)))
    with pytest.raises(ZeroDivisionError):
        main(["evaluate", str(shard)])
    assert len(closed) == 1


def test_the_architecture_experiment_says_where_it_is(shard, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", str(shard), "--experiment", "architecture"])
    assert "research.architecture" in capsys.readouterr().err


def test_mistakes(shard, tmp_path, capsys):
    for arguments in (
        [],
        ["--experiment", "stages"],
        [shard, "--experiment", "stages", "--stage1", tmp_path / "none.pth"],
        [shard, "--experiment", "stages", "--model", "vicuna-7b"],
        [shard, "--experiment", "pope", "--question", "Is it there?"],
        [shard, "--experiment", "pope", "--judge", "http://127.0.0.1/v1"],
        [shard, "--experiment", "stages", "--detail"],
        [shard, "--markdown", tmp_path / "page.md"],
        [shard, "--experiment", "pope", "--objects", tmp_path / "none.txt"],
    ):
        assert main(["evaluate", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("minigpt4: "), said
    assert main(["evaluate", str(shard), "--markdown", "page.md"]) == 2
    assert "chair or pope or stages”: give that, too, or leave it out." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", str(shard), "--batch-size", "65"])
    assert "from 1 to 64, not “65”" in capsys.readouterr().err


@pytest.mark.parametrize(
    "written",
    [
        "train-00000.tar --answers {0}/train-00000.tar",
        "more/captions.csv --json {0}/more/../more/captions.csv",
        "more --answers {0}/more/captions.csv",
        "more --answers {0}/more/captions.jsonl",
        "more --json {0}/more/instances.json",
        "more --json {0}/more/0.txt",
        "more/captions.csv --json {0}/more/0.jpg",
        "train-00000.tar --json {0}/s.json --answers {0}/s.json",
        "train-00000.tar --experiment chair --objects {0}/other.csv --json {0}/other.csv",
    ],
)
def test_an_output_is_no_input_and_no_other_output(shard, tmp_path, written, capsys):
    files = [shard, write_captioned(tmp_path / "more") / "captions.csv", tmp_path / "other.csv"]
    files += [tmp_path / "more" / name for name in ("captions.jsonl", "instances.json", "0.txt")]
    for file in files[2:]:
        file.write_text("dog: dog\n")
    before = [file.read_bytes() for file in files]
    assert main(["evaluate", *f"{{0}}/{written}".format(tmp_path).split()]) == 2
    said = capsys.readouterr().err
    assert "would overwrite" in said and said.count("\n") == 1
    assert [file.read_bytes() for file in files] == before


def test_outputs_may_go_to_a_device_or_beside_the_data(tmp_path):
    data = write_captioned(tmp_path / "more")
    null = {"json": "/dev/null", "answers": "/dev/null"}
    (data / "scores.json").touch()  # of the same command before, which failed
    (data / "page.md").write_text("A page.")
    for given in (str(data), str(data / "captions.*")):
        written = {"review": str(data / "scores.json"), "markdown": str(data / "page.md")}
        outputs.check_outputs(null | written, [given, None])
        with pytest.raises(UserError, match="would overwrite"):
            outputs.check_outputs({"json": str(data / "captions.csv")}, [given])
    with pytest.raises(UserError, match="is a folder"):
        outputs.check_outputs({"answers": str(data)}, [])


def test_tables():
    assert report.table(["a", "b"], [["x|y\nz", 0.5], [None, "<i>"]]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| x\\|y<br>z | 0.500 |",
        "| – | &lt;i> |",
    ]
    assert report.interval(0, 50) == pytest.approx((0.0, 0.0713), abs=1e-4)
    assert report.interval(25, 50) == pytest.approx((0.3664, 0.6336), abs=1e-4)
    assert len(sentences("A dog. It runs!\nAnd runs…")) == 3 and not sentences("")


def test_answers_may_hold_any_line_end(tmp_path):
    path = tmp_path / "answers.jsonl"
    written = [{"id": "1", "answer": "a\u2028b\u0085c\r\nd\x0be"}, {"id": "2", "answer": ""}]
    outputs.write_lines(path, written)
    assert read_jsonl(path, "id", "answer") == written
    outputs.write_lines(path, [{"answer": "half a pair: \ud83d"}])
    assert read_jsonl(path) == [{"answer": "half a pair: ?"}]


def test_a_report_goes_into_the_page_that_has_a_place_for_it(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n<!-- pope -->\nold\n<!-- /pope -->\n\nend\n")
    report.write_markdown(str(page), "pope", "new\n")
    report.write_markdown(str(page), "pope", "newer")
    assert page.read_text() == "# A\n\n<!-- pope -->\nnewer\n<!-- /pope -->\n\nend\n"
    with pytest.raises(UserError, match="<!-- stages -->"):
        report.write_markdown(str(page), "stages", "alone")
    assert page.read_text() == "# A\n\n<!-- pope -->\nnewer\n<!-- /pope -->\n\nend\n"
    for text in ("alone", "again"):  # a new page has a place for what replaces it
        report.write_markdown(str(tmp_path / "new.md"), "stages", text)
    assert (tmp_path / "new.md").read_text() == "<!-- stages -->\nagain\n<!-- /stages -->\n"


def test_a_page_without_a_place_is_refused_before_anything_runs(shard, tmp_path, capsys):
    (tmp_path / "page.md").write_text("My own text.\n")
    options = ["--experiment", "stages", "--markdown", tmp_path / "page.md"]
    options += ["--json", tmp_path / "out.json"]
    assert main(["evaluate", *map(str, [shard, *options])]) == 2
    assert "<!-- stages -->" in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == "My own text.\n"
    assert not (tmp_path / "out.json").exists()
