"""curate: the files between the steps, generating, filtering, agreement, export."""

import json
import math
import os
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from minigpt4 import start
from minigpt4.__main__ import main
from minigpt4.batch import Batch, PictureQuestion, greedy
from minigpt4.curation import filters
from minigpt4.curation import merge as merging
from minigpt4.curation.export import chosen, export
from minigpt4.curation.generate import Generator, paper_template
from minigpt4.curation.pictures import find_pictures, is_same, load_picture
from minigpt4.curation.records import Records, read_records, write_records
from minigpt4.curation.refine import LocalRefiner
from minigpt4.data.examples import read_descriptions
from minigpt4.data.files import prompt_text
from minigpt4.engine import Engine, Sampling
from minigpt4.errors import UserError
from minigpt4.model.prompt import CHATML, VICUNA
from tests.training_case import picture, room_for, tiny_model, write_shard

GREEDY = Sampling(0.0, 1.0, repetition_penalty=1.0, max_new_tokens=6)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def engine(model):
    engine = Engine(model)
    yield engine
    engine.close()


@pytest.fixture
def folder(tmp_path):
    """Five pictures, one of them broken, two of one name."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        picture(i).save(folder / f"p{i}.jpg")
    picture(3).save(folder / "p1.png")
    (folder / "wrong.jpg").write_text("no picture")
    return folder


# --- the files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["", "byte-order mark"])
def test_a_cut_last_line_is_taken_away(tmp_path, start):
    path = tmp_path / "new" / "records.jsonl"
    with Records(path) as records:
        records.append({"image_id": "a", "text": "ünïcode\nand a line"})
        records.append({"image_id": "b", "text": "öööö"})
    whole = start + path.read_bytes()
    for cut in range(whole.index(b"\n") + 2, len(whole) - 2):  # wherever the crash was
        path.write_bytes(whole[:cut])
        assert set(read_records(path)) == {"a"}
        with Records(path) as records:
            assert set(records.records) == {"a"}
            records.append({"image_id": "b", "text": "öööö"})
        assert path.read_bytes() == whole


def test_a_last_line_without_its_end_is_kept(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('\ufeff{"image_id": "a", "text": "by hand"}', encoding="utf-8")
    with Records(path) as records:
        records.append({"image_id": "a", "text": "again"})
        assert records.records["a"]["text"] == "again"
    assert read_records(path) == {"a": {"image_id": "a", "text": "again"}}
    assert path.read_text(encoding="utf-8").count("\n") == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "^Line 2 of .* is not JSON"),
        ("[]", "^Line 2 of .* must be a JSON object with “image_id”"),
        ('{"image_id": "c", "text": "A", "text": ""}', "^Line 2 of .* has “text” more than once"),
        ('{"text": "no id"}', "^Line 2 of .* must be a JSON object with “image_id”"),
        ('{"image_id": ["no"]}', "^The record of line 2 of .* needs a text as “image_id”"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path, line, said):
    path = tmp_path / "records.jsonl"
    path.write_text('{"image_id": "a"}\n' + line + '\n{"image_id": "b"}\n')
    for read in (read_records, Records):
        with pytest.raises(UserError, match=said):
            read(path)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ('"decision": "Drop"', "“decision” of “b” .line 2 of .* must be “keep”, “edit” or “drop”"),
        ('"decision": null', "“decision” of “b”"),
        ('"kept": "false"', "“kept” of “b” .line 2 of .* must be true or false, without quotes"),
        ('"text": 123', "record of “b” .line 2 of .* needs a text as “text”"),
        ('"text": "Ein B\xe4r"', "is not in UTF-8: save it as UTF-8"),
    ],
)
def test_what_was_edited_by_hand_is_understood_or_refused(tmp_path, field, said):
    path = tmp_path / "records.jsonl"
    content = f'{{"image_id": "a", "decision": "drop"}}\n{{"image_id": "b", {field}}}'
    path.write_bytes(content.encode("latin-1"))
    for read in (read_records, Records):
        with pytest.raises(UserError, match=said):
            read(path)
    assert path.read_bytes() == content.encode("latin-1")


@pytest.mark.trust("Faults", "a full disk")
def test_a_full_disk_leaves_whole_lines(tmp_path):
    """The system takes a part of a line and refuses the rest, as where a disk is full."""
    path = tmp_path / "records.jsonl"
    with Records(path) as records:
        records.append({"image_id": "a", "text": "one"})
        with room_for(path.stat().st_size + 10):
            with pytest.raises(UserError, match="cannot be written .*: make room"):
                records.append({"image_id": "b", "text": "two"})
            assert set(records.records) == {"a"}
        records.append({"image_id": "b", "text": "two"})
    assert [record["text"] for record in read_records(path).values()] == ["one", "two"]
    assert path.read_text().count("\n") == 2


def test_two_programs_do_not_write_one_file(tmp_path):
    with Records(tmp_path / "a.jsonl"), pytest.raises(UserError, match="another program"):
        Records(tmp_path / "a.jsonl")
    Records(tmp_path / "a.jsonl").close()


# --- generate ----------------------------------------------------------------------------------


def test_pictures_of_folders_and_shards(folder, tmp_path, capsys):
    for inner in ("more", ".hidden"):
        (folder / inner).mkdir()
        shutil.copy(folder / "p0.jpg", folder / inner)
    found = find_pictures(str(folder))
    assert [s.image_id for s in found] == ["p0", "p1", "p1-2", "p2", "wrong"]
    assert f"Pictures in folders of {folder} are left out (1)" in capsys.readouterr().err
    assert load_picture(found[0].picture).rgb.size == (60, 44)
    with pytest.raises(UserError, match=r"wrong\.jpg"):
        load_picture(found[4].picture)
    write_shard(tmp_path / "s-00000.tar", 2)
    write_shard(tmp_path / "s-00001.tar", 1, first=2)
    found = find_pictures(str(tmp_path / "s-*.tar"))
    assert [s.image_id for s in found] == ["s-00000-00000", "s-00000-00001", "s-00001-00000"]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("s-00000.tar", "s-00001.tar"):
        (tmp_path / name).rename(moved / name)
    with pytest.raises(UserError, match="--pictures"):
        load_picture(found[2].picture)
    assert load_picture(found[2].picture, str(moved)).rgb.size == (60, 44)
    for wrong in ("nowhere", "nowhere*.tar", str(tmp_path / "none.tar")):
        with pytest.raises(UserError):
            find_pictures(wrong)


def test_ids_can_be_names_of_files_everywhere(tmp_path):
    """What cannot is replaced at the start, not refused at the end; plain names stay theirs."""
    names = ["a*b.jpg", "a-b.jpg", 'a"b.jpg', "2024-05-01 12:30:15.jpg", "What?.jpg", "ü (1).jpg"]
    for name in names:
        picture(1).save(tmp_path / name)
    found = find_pictures(str(tmp_path))
    ids = {os.path.basename(s.picture): s.image_id for s in found}
    assert list(ids) == sorted(names) and ids["a-b.jpg"] == "a-b" and ids["ü (1).jpg"] == "ü (1)"
    assert ids["2024-05-01 12:30:15.jpg"] == "2024-05-01 12-30-15" and ids["What?.jpg"] == "What-"
    assert {ids['a"b.jpg'], ids["a*b.jpg"]} == {"a-b-2", "a-b-3"}
    (tmp_path / ".hidden.jpg").write_bytes((tmp_path / "What?.jpg").read_bytes())
    assert [s.image_id for s in find_pictures(str(tmp_path / ".hidden.jpg"))] == ["-hidden"]
    assert export([vars(s) | {"text": "A pattern."} for s in found], tmp_path / "set") == len(names)


def test_links_keep_their_names(tmp_path):
    picture(1).save(tmp_path / "abc.jpg")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "photo0.jpg").symlink_to(tmp_path / "abc.jpg")
    (found,) = find_pictures(str(tmp_path / "photos"))
    assert found.image_id == "photo0" and is_same(str(tmp_path / "abc.jpg"), found.picture)
    with pytest.raises(UserError, match="path is empty"):
        find_pictures("")


def test_another_picture_of_the_same_id_is_not_described(model, folder, tmp_path, monkeypatch):
    """Another folder's, or another file's of that name: moving the folder makes none."""
    out, other = tmp_path / "out.jsonl", tmp_path / "others"
    monkeypatch.setattr(start, "open_model", lambda options: model)

    def generate(pictures) -> int:
        options = ["--max-new-tokens", "2", "--continues", "0"]
        return main(["curate", "generate", str(pictures), "--out", str(out), *options])

    (folder / "p1.jpg").rename(tmp_path / "p1.jpg")
    assert generate(folder) == 0
    done = read_records(out)
    (tmp_path / "p1.jpg").rename(folder / "p1.jpg")
    assert generate(folder) == 2  # p1 was p1.png
    (folder / "p1.jpg").unlink()
    shutil.copytree(folder, other)
    assert generate(other) == 2
    shutil.copytree(folder, other / "photos")
    assert generate(other / "photos") == 2  # a folder of the same name, beside the first
    assert read_records(out) == done
    shutil.rmtree(folder)
    assert generate(other / "photos") == 0
    described = {i: r for i, r in read_records(out).items() if "error" not in r}
    assert described == {i: r for i, r in done.items() if "error" not in r}


def test_which_pictures_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.jpg").touch()
    assert is_same("a/1.jpg", str(tmp_path / "a" / "1.jpg"))
    assert not is_same("a/1.jpg", "/elsewhere/a/1.jpg")
    assert is_same("gone/1.jpg", "/elsewhere/gone/1.jpg")
    assert not is_same("gone/1.jpg", "/elsewhere/a/1.jpg")
    assert not is_same("gone/1.jpg", "gone/1.png")
    assert is_same("gone/s.tar:b/c/1.jpg", "/elsewhere/gone/s.tar:b/c/1.jpg")
    assert not is_same("gone/s.tar:b/c/1.jpg", "gone/s.tar:a/c/1.jpg")
    assert not is_same("gone/s.tar:b/c/1.jpg", "gone/t.tar:b/c/1.jpg")


def test_an_answer_that_ran_out_of_time_is_cut(engine, folder, monkeypatch):
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda r: submit(replace(r, max_seconds=0.0)))
    [record] = Generator(Batch(engine), GREEDY, continues=0)(find_pictures(str(folder / "p0.jpg")))
    assert record["tokens"] < 6 and record["cut"]
    assert LocalRefiner(engine)("Correct this.", 100).truncated
    asked = [PictureQuestion("a", "What is this?", lambda: folder / "p0.jpg")]
    found = Batch(engine).answer(asked, greedy(100))
    assert [completion.truncated for _, completion in found] == [True]


def test_the_papers_prompt(engine, folder, monkeypatch):
    """Word for word: ###Human: <Img>…</Img> … ###Assistant: … ###Human: Continue ###Assistant:"""
    asked = []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda r: asked.append(r.prompt) or submit(r))
    generator = Generator(Batch(engine), GREEDY, min_tokens=80, continues=1)
    [record] = generator(find_pictures(str(folder / "p0.jpg")))
    first, second = (
        engine.model.tokenizer.decode([i for i in prompt.ids if i >= 0]) for prompt in asked
    )
    question = (
        "<s> ###Human: <Img></Img> Describe this image in detail. Give as many details as "
        "possible. Say everything you see. ###Assistant: "
    )
    assert first.replace("<s>###", "<s> ###").replace("<Img> </Img>", "<Img></Img>") == question
    said = record["text"]
    assert second.rstrip().endswith(" ###Human: Continue ###Assistant:")
    assert second.count("###Assistant:") == 2 and "######" not in second
    assert record["continued"] == 1 and record["tokens"] <= 12 and said
    assert paper_template(CHATML) == CHATML
    assert paper_template(VICUNA).stop == VICUNA.stop


def test_only_what_is_short_goes_on(engine, folder):
    source = find_pictures(str(folder / "p0.jpg"))
    [once] = Generator(Batch(engine), GREEDY, min_tokens=1)(source)
    [never] = Generator(Batch(engine), GREEDY, continues=0)(source)
    assert once["continued"] == never["continued"] == 0 and once["text"] == never["text"]
    [often] = Generator(Batch(engine), GREEDY, continues=3)(source)
    assert often["continued"] == 3 and often["text"].startswith(once["text"])
    assert often["cut"] and often["tokens"] > once["tokens"]


def test_generate_resumes(model, folder, tmp_path, monkeypatch, capsys):
    """Stopped anywhere and begun again, it writes what an uninterrupted run writes."""
    monkeypatch.setattr(start, "open_model", lambda options: model)
    whole, halves = tmp_path / "whole.jsonl", tmp_path / "halves.jsonl"
    # Drawn, not greedy: a picture's draws depend on the seed alone, not on its neighbours.
    options = ["--max-new-tokens", "6", "--seed", "3", "--continues", "1"]
    assert main(["curate", "generate", str(folder), "--out", str(whole), *options]) == 0
    assert "4 described" in capsys.readouterr().err
    halves.write_bytes(whole.read_bytes()[:2000])
    before = read_records(halves)
    assert 0 < len(before) < 5
    assert main(["curate", "generate", str(folder), "--out", str(halves), *options]) == 0
    said = capsys.readouterr().err
    assert "1 could not be read" in said
    assert f"of 5 are described in {halves} and stay as they are" in said
    assert read_records(halves) == read_records(whole)
    assert halves.read_text().count("\n") >= 5
    lines = len(halves.read_text().splitlines())
    assert main(["curate", "generate", str(folder), "--out", str(halves), *options]) == 0
    assert len(halves.read_text().splitlines()) == lines + 1  # the broken one is tried again

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_text("no picture")
    none = ["curate", "generate", str(tmp_path / "broken"), "--out", str(tmp_path / "none.jsonl")]
    assert main(none) == 2
    assert "1 of 1 pictures cannot be used, which is more than 50%" in capsys.readouterr().err

    # Another seed's, prompt's or projection's descriptions do not get into the same file.
    recorded = read_records(whole)["p0"]["options"]
    assert (recorded["seed"], recorded["max_new_tokens"], recorded["min_tokens"]) == (3, 6, 80)
    other = [*options, "--seed", "4"]
    assert main(["curate", "generate", str(folder), "--out", str(halves), *other]) == 2
    said = capsys.readouterr().err
    assert "contains descriptions with “--seed” 3, but now it is 4: choose another file" in said
    for file in ("describe.txt", "continue.txt"):
        with monkeypatch.context() as patch:
            patch.setattr(
                "minigpt4.curation.generate.prompt_text",
                lambda name, file=file: "What?" if name == file else prompt_text(name),
            )
            assert main(["curate", "generate", str(folder), "--out", str(halves), *options]) == 2
        assert f"before prompts/{file} was changed" in capsys.readouterr().err
    other = tiny_model()
    other.projection.weight.data += 0.1
    monkeypatch.setattr(start, "open_model", lambda options: other)
    assert main(["curate", "generate", str(folder), "--out", str(halves), *options]) == 2
    assert "another file" in capsys.readouterr().err


# --- filter ------------------------------------------------------------------------------------

GOOD = (
    "A brown dog with long ears runs across a wet lawn towards the camera, a yellow ball in its "
    "mouth. Behind it stands a low wooden fence, and two children in red coats look on from the "
    "terrace of a white house. Long shadows show that the sun stands low."
)
BAD = {
    "too_short": "A brown dog runs across a wet lawn.",
    "repetition": GOOD + " Long shadows show that the sun stands low.",
    "repeated_ngrams": GOOD + " A brown dog with long ears runs across a wet lawn towards the fence"
    " of the terrace of a white house, a yellow ball in its coat.",
    "breaks_off": GOOD + " In the background there is a",
    "language": "Ein brauner Hund mit langen Ohren läuft über einen nassen Rasen auf die Kamera zu,"
    " einen gelben Ball im Maul. Dahinter steht ein niedriger Zaun aus Holz, und zwei Kinder in"
    " roten Mänteln schauen von der Terrasse eines weißen Hauses aus zu.",
    "refusal": "I’m sorry, but I do not see anything else here. " + GOOD,
    "near_duplicate": GOOD.replace("yellow", "green"),
    "no_text": " … ",
}


def records(*texts: str) -> list[dict]:
    return [{"image_id": str(i), "picture": "p", "text": text} for i, text in enumerate(texts)]


def test_each_rule_finds_its_fault_and_no_other():
    assert BAD.keys() == filters.RULES.keys()
    done = filters.apply(records(GOOD, *BAD.values()), filters.Thresholds())
    assert done[0]["kept"] and done[0]["rules"] == []
    for name, record in zip(BAD, done[1:], strict=True):
        assert name in record["rules"] and not record["kept"], (name, record["rules"])
        extra = set(record["rules"]) - {name}
        assert extra <= {"repeated_ngrams"} if name == "repetition" else not extra, (name, extra)
    assert done[-2]["duplicate_of"] == "0"
    assert sum(filters.counts(done).values()) >= len(BAD)
    again = filters.apply(done, filters.Thresholds(max_similarity=0.99))
    assert again[-2]["kept"] and "duplicate_of" not in again[-2]


def test_thresholds_are_what_they_say():
    length = len(filters.words(GOOD))
    strict = replace(filters.Thresholds(), min_words=length + 1)
    assert filters.broken_rules(records(GOOD)[0], strict) == ["too_short"]
    assert not filters.broken_rules(records(GOOD)[0], replace(strict, min_words=length))
    german = records(BAD["language"])[0]
    assert not filters.broken_rules(german, filters.Thresholds(language="de"))
    assert not filters.broken_rules(german, filters.Thresholds(language=""))
    assert filters.broken_rules(records(GOOD)[0], filters.Thresholds(language="de")) == ["language"]
    cut = {"image_id": "0", "text": GOOD.rstrip("."), "cut": True}
    assert filters.broken_rules(cut, filters.Thresholds()) == ["breaks_off"]
    assert not filters.broken_rules(cut | {"cut": False}, filters.Thresholds())
    assert filters.refusal("A parrot, as an air show goes on") == ""
    assert filters.repeated_share("a b c a b c") == 0.25


def test_near_duplicates_are_those_that_comparing_all_pairs_finds():
    """The prefix filter misses none: against the plain definition, on texts of a few words."""
    import random

    draw = random.Random(5)
    texts = []
    for _ in range(120):
        if texts and draw.random() < 0.5:
            words = draw.choice(texts).split()
            words[draw.randrange(len(words))] = draw.choice("abcdef")
            texts.append(" ".join(words))
        else:
            texts.append(" ".join(draw.choice("abcdefgh") for _ in range(draw.randrange(3, 20))))
    sets = [set(filters.shingles(text)) for text in texts]
    for similarity in (0.25, 0.5, 0.7, 1.0):
        expected = {}
        for i, found in enumerate(sets):
            for j in range(i):
                same = len(found & sets[j]) / len(found | sets[j])
                if j not in expected and same >= similarity:
                    expected[i] = j
                    break
        assert len(expected) > 2
        assert filters.near_duplicates(texts, similarity) == expected


def test_filter_on_the_command_line(tmp_path, capsys):
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_records(given, [*records(GOOD, *BAD.values()), {"image_id": "x", "error": "broken"}])
    assert main(["curate", "filter", str(given), "--out", str(out)]) == 0
    said = capsys.readouterr().err
    assert "1 of 10 kept" in said and "2 no_text" in said and "1 near_duplicate" in said
    assert len(chosen(read_records(out).values())) == 1
    arguments = ["curate", "filter", str(given), "--out", str(out), "--min-words", "5"]
    assert main([*arguments, "--language", "any"]) == 0
    assert "0 too_short" in (said := capsys.readouterr().err) and "0 language" in said
    assert main([*arguments, "--language", "klingon"]) == 2
    assert "two letters" in capsys.readouterr().err


# --- several reviewers -------------------------------------------------------------------------


def test_kappas_are_those_of_the_literature():
    # Fleiss' own example layout: 14 raters, 10 subjects, 5 categories; kappa 0.210.
    table = """0 0 0 0 14|0 2 6 4 2|0 0 3 5 6|0 3 9 2 0|2 2 8 1 1|7 7 0 0 0|3 2 6 3 0|2 5 3 2 2
    |6 5 2 1 0|0 2 2 3 7"""
    ratings = [
        [label for label, n in enumerate(map(int, row.split())) for _ in range(n)]
        for row in table.split("|")
    ]
    assert merging.fleiss_kappa(ratings) == pytest.approx(0.210, abs=5e-4)
    # Two readers of 50 grant proposals: both yes 20, both no 15, 5 and 10 otherwise; kappa 0.4.
    first = [1] * 20 + [1] * 5 + [0] * 10 + [0] * 15
    second = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert merging.cohen_kappa(first, second) == pytest.approx(0.4)
    assert merging.raw_agreement(list(zip(first, second, strict=True))) == pytest.approx(0.7)
    assert math.isnan(merging.cohen_kappa([1, 1], [1, 1]))
    assert merging.cohen_kappa([1, 0], [0, 1]) == pytest.approx(-1)


def reviewed(name: str, **decisions: str) -> dict[str, dict]:
    return {
        i: {
            "image_id": i,
            "picture": f"{i}.jpg",
            "decision": d.split(":")[0],
            "text": d.split(":")[1] if ":" in d else f"text {i}",
            "before": f"text {i}",
            "reviewer": name,
        }
        for i, d in decisions.items()
    }


def test_merging_reviews(tmp_path, capsys):
    ann = reviewed("ann", a="keep", b="drop", c="edit:by ann", d="drop", e="keep")
    bob = reviewed("bob", a="keep", b="keep", c="edit:by bob", d="drop")
    cleo = reviewed("cleo", a="drop", b="drop", c="keep", d="drop")
    files = []
    for name, found in (("ann", ann), ("bob", bob), ("cleo", cleo)):
        files.append(str(tmp_path / f"{name}.jsonl"))
        write_records(files[-1], found.values())
    out, scores = tmp_path / "merged.jsonl", tmp_path / "scores.json"
    arguments = ["curate", "merge", *files, "--out", str(out), "--json", str(scores)]
    assert main(arguments) == 0
    merged = read_records(out)
    assert {i: r["decision"] for i, r in merged.items()} == {
        "a": "keep",
        "b": "drop",
        "c": "edit",
        "d": "drop",
        "e": "keep",
    }
    assert merged["c"]["text"] == "by ann"
    assert merged["b"]["votes"] == {"ann": "drop", "bob": "keep", "cleo": "drop"}
    found = json.loads(scores.read_text())
    assert (found["reviewers"], found["n"], found["statistic"]) == (3, 4, "Fleiss' kappa")
    assert found["raw"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 3 + 1) / 4)
    assert found["raw_drop"] == pytest.approx((1 / 3 + 1 / 3 + 1 + 1) / 4)
    assert main(["curate", "merge", *files[:2], "--out", str(out)]) == 0
    assert "Cohen" in capsys.readouterr().out
    assert read_records(out)["b"]["decision"] == "drop"  # half of the votes
    assert main(["curate", "merge", files[0], files[0], "--out", str(out)]) == 2
    assert "Two reviews are by “ann”" in capsys.readouterr().err
    write_records(files[0], records(GOOD))
    assert main(["curate", "merge", *files, "--out", str(out)]) == 2
    assert "is not a review" in capsys.readouterr().err


def test_no_step_writes_over_a_file_that_it_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("ann", "bob"):
        write_records(f"{name}.jsonl", reviewed(name, a="keep").values())
    before, out = read_records("bob.jsonl"), str(tmp_path / "bob.jsonl")
    merge = ["merge", "ann.jsonl", "bob.jsonl"]
    for command in (
        [*merge, "--out", out],
        [*merge, "--out", "m.jsonl", "--json", out],
        [*merge, "--out", "m.jsonl", "--json", "m.jsonl"],
        *([step, "bob.jsonl", "--out", out] for step in ("refine", "filter", "review")),
    ):
        assert main(["curate", *command]) == 2
        assert "would overwrite" in capsys.readouterr().err
    assert read_records("bob.jsonl") == before and len(os.listdir()) == 2


def test_nothing_is_kept_without_a_text(tmp_path, capsys):
    blank = reviewed("ann", a="edit: ")
    write_records(tmp_path / "ann.jsonl", blank.values())
    command = ["curate", "merge", str(tmp_path / "ann.jsonl"), "--out", str(tmp_path / "m.jsonl")]
    assert main(command) == 2
    assert "is kept without a text" in capsys.readouterr().err
    assert chosen(blank.values()) == []


# --- export ------------------------------------------------------------------------------------


def test_the_published_layout_comes_out(folder, tmp_path):
    found = [vars(s) | {"text": f"Text {s.image_id}."} for s in find_pictures(str(folder))[:4]]
    found[0]["decision"], found[3]["kept"] = "drop", False
    target = tmp_path / "stage2"
    assert export(chosen(found), target) == 2
    examples = read_descriptions(target)
    assert [(e.key, e.texts[0].answer) for e in examples] == [
        ("p1", "Text p1."),
        ("p1-2", "Text p1-2."),
    ]
    assert (target / "image" / "p1.jpg").read_bytes() == (folder / "p1.jpg").read_bytes()
    assert Image.open(target / "image" / "p1-2.jpg").format == "JPEG"
    # What was dropped since is not left behind.
    found[1]["decision"] = "drop"
    assert export(chosen(found), target) == 1
    assert os.listdir(target / "image") == ["p1-2.jpg"]
    for wrong in ("../up", "a/b", ".hidden"):
        with pytest.raises(UserError, match="be a file name"):
            export([found[2] | {"image_id": wrong}], target)
    with pytest.raises(UserError, match="nothing to export"):
        export([], target)


def test_a_set_of_another_program_is_not_replaced(folder, tmp_path):
    found = [vars(s) | {"text": "A \ud83d text."} for s in find_pictures(str(folder))[:2]]
    for name in ("filter_cap.json", "image/7.jpg"):
        (own := tmp_path / name / "set" / name).parent.mkdir(parents=True)
        own.write_text('{"annotations": [{"image_id": "7", "caption": "Own."}]}')
        with pytest.raises(UserError, match="did not write"):
            export(found, tmp_path / name / "set")
        assert "Own." in own.read_text() and not (own.parent / "image").exists()
    for _ in range(2):  # its own may be replaced; what UTF-8 cannot hold becomes a “?”
        assert export(found, tmp_path / "out") == 2
    assert read_descriptions(tmp_path / "out")[0].texts[0].answer == "A ? text."


@pytest.mark.parametrize("lacking", ["picture", "text", "image_id"])
def test_a_record_that_lacks_a_field_is_named(tmp_path, capsys, lacking):
    """As one written by hand may."""
    given, out = tmp_path / "own.jsonl", str(tmp_path / "out")
    record = {"image_id": "a", "picture": "a.jpg", "text": "A dog."}
    left_out = [{"image_id": "b", "text": "", "picture": "p"}, {"image_id": "c", "error": "broken"}]
    write_records(given, [record | {lacking: 5}, *left_out])
    assert main(["curate", "export", str(given), "--out", out]) == 2
    assert f"a text as “{lacking}”" in capsys.readouterr().err
    assert chosen([record, *left_out]) == [record]
    if lacking != "image_id":
        del record[lacking]
        write_records(given, [record])
        assert main(["curate", "export", str(given), "--out", out]) == 2
        assert f"“a” needs a text as “{lacking}”" in capsys.readouterr().err


def test_a_set_is_not_exported_over_its_own_pictures(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [vars(s) | {"text": f"Text {s.image_id}."} for s in find_pictures(str(folder))[:2]]
    export(found, "stage2")
    again = [vars(s) | {"text": f"Text {s.image_id}."} for s in find_pictures("stage2/image")]
    again[0]["decision"] = "drop"
    for records in (again, [again[0], found[1]]):  # the one in the way may be the dropped one
        with pytest.raises(UserError, match="own pictures"):
            export(records, "stage2")
    assert sorted(os.listdir("stage2/image")) == ["p0.jpg", "p1.jpg"]
    assert export(again, "stage3") == 1
    shutil.copytree("stage2/image", "copied")
    assert export(again, "stage2", pictures="copied") == 1
