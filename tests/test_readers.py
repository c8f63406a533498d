"""Data sets as people really have them: nothing is left out or taken in without a word."""

import io
import json
import logging
import shutil
import sys
import tarfile
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import pytest

from minigpt4.__main__ import main
from minigpt4.data import captions
from minigpt4.data.captions import Reading, captions_in
from minigpt4.data.datasets import read_captioned
from minigpt4.data.examples import read_descriptions, read_instructions
from minigpt4.data.files import SHOWN, printable, shortened
from minigpt4.data.huggingface import _pictures_in_rows
from minigpt4.data.names import PictureFinder, is_hidden
from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.training.run import read_examples
from tests.training_case import jpeg, picture


def shard(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return str(path)


def saved(name: str, number: int = 0) -> bytes:
    """A picture's file in the format of its ending."""
    file = io.BytesIO()
    kind = {"jpg": "JPEG", "jpeg": "JPEG", "jfif": "JPEG", "tif": "TIFF", "heic": "HEIF"}
    suffix = name.rpartition(".")[2].lower()
    picture(number).save(file, kind.get(suffix, suffix.upper()))
    return file.getvalue()


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(saved(name, len(name)))


def answers(examples) -> dict[str, list[str]]:
    return {e.key: [t.answer for t in e.texts] for e in examples}


# --- captions -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (" A dog. ", ["A dog."]),
        (["A dog.", ["A cat.", None, " "]], ["A dog.", "A cat."]),
        ("['A dog.', \"A cat's.\"]", ["A dog.", "A cat's."]),
        ('["A dog.", "A \\"wet\\" cat."]', ["A dog.", 'A "wet" cat.']),
        ("['A dog.'\n 'A cat.']", ["A dog.", "A cat."]),
        ("('A dog.', \"A cat's.\")", ["A dog.", "A cat's."]),
        ("{'A dog.'}", ["A dog."]),
        ("array(['A dog.', 'A cat.'], dtype='<U6')", ["A dog.", "A cat."]),
        ("[np.str_('A dog.'), np.str_('A cat.')]", ["A dog.", "A cat."]),
        ("[['A dog.'], ('A cat.', nan)]", ["A dog.", "A cat."]),
        ('("Stop" is on the sign)', ['("Stop" is on the sign)']),
        ("#NAME?", []),
        ("#DIV/0!", []),
        ("[]", []),
        ("[A red box]", ["[A red box]"]),
        ("", []),
        (None, []),
        (float("nan"), []),
        ("nan", []),
        ([], []),
    ],
)
def test_captions_in_a_field(value, found):
    assert captions_in(value) == found


@pytest.mark.parametrize(
    "value",
    [
        *(7, 1.5, True, {"raw": "A dog."}, ["A dog.", 7], "['A dog.', 7]", "('A dog.', 7)"),
        *("[{'raw': 'A dog.'}]", '{"raw": "A dog."}', "array(['A dog.', 7], dtype=object)"),
    ],
)
def test_what_is_no_caption(value):
    with pytest.raises(ValueError):
        captions_in(value)


def test_captions_are_found_at_any_depth():
    value = "A dog."
    for _ in range(10_000):
        value = [value]
    assert captions_in(value) == ["A dog."]


@pytest.mark.parametrize("value", ["None", "null", "N/A", "['a', 'b']", "['a', 7]"])
def test_texts_that_are_no_cells(value):
    assert captions_in([f" {value} ", " ", None], cells=False) == [value]


# --- shards -------------------------------------------------------------------------------------


def test_the_next_source_is_tried(tmp_path):
    content = jpeg(picture(0))
    texts = [
        b'{"caption": null}',
        b'{"caption": ""}',
        b'{"captions": [], "width": 3}',
        b'{"caption": 7}',
        b"{damaged",
        b'\xef\xbb\xbf{"caption": "  "}',
        b"[1]",
    ]
    files = {}
    for i, text in enumerate(texts):
        files |= {f"{i}.jpg": content, f"{i}.json": text}
        files[f"{i}.txt"] = f"\ufeffGrün {i}.\r\n".encode("utf-16" if i % 2 else "utf-8")
    found = read_captioned(shard(tmp_path / "a.tar", files))
    assert [e.captions for e in found] == [(f"Grün {i}.",) for i in range(len(texts))]


def test_every_kind_of_picture_is_read_from_shards(tmp_path):
    names = ["a.JPG", "b.jpeg", "c.png", "d.webp", "e.avif", "f.heic", "g.gif", "h.bmp", "i.tif"]
    names += ["j.jfif", "cam_22.5mm.jpg"]
    files = {}
    for i, name in enumerate(names):
        files |= {name: saved(name, i), name.rpartition(".")[0] + ".txt": name.encode()}
    found = read_captioned(shard(tmp_path / "a.tar", files))
    assert [e.captions for e in found] == [(name,) for name in names]
    assert all(e.picture().size == (60, 44) for e in found)


def test_what_is_left_out_is_named_and_counted(tmp_path, capsys):
    content = jpeg(picture(0))
    files = {"0.jpg": content, "0.txt": b"A dog."}
    files |= {f"none-{i}.jpg": content for i in range(5)}
    files |= {
        "x.svg": b"<svg/>",
        "x.txt": b"A drawing.",
        "latin.jpg": content,
        "latin.txt": b"\xff",
    }
    files |= {"alone.txt": b"No picture.", "0.png": saved("0.png")}
    files |= {"._0.jpg": b"x", "__MACOSX/0.jpg": b"x", ".hidden/0.jpg": content}
    assert len(read_captioned(shard(tmp_path / "a.tar", files))) == 1
    line = capsys.readouterr().err
    assert "a.tar: 1 picture read; 9 left out: " in line and line.count("\n") == 1
    for part in (
        "5 without a caption (none-0.jpg; none-1.jpg; none-2.jpg; …)",
        "1 of a kind that is not read (x.svg)",
        "1 with a caption that is not in UTF-8 (latin.jpg)",
        "1 without a picture (alone.txt)",
        "1 with the name of another picture (0.png)",
    ):
        assert part in line


def test_the_account_of_a_large_set(capsys):
    reading = Reading("captions.csv")
    for number in range(7):
        reading.leave_out(f"line {number}", captions.NO_CAPTION)
    for number in range(5):
        reading.leave_out(f"{number}.svg", captions.OTHER_KIND)
    assert reading.finish(range(8091), "it needs captions") == [*range(8091)]
    assert capsys.readouterr().err == (
        "captions.csv: 8,091 pictures read; 12 left out: 7 without a caption (line 0; line 1; "
        "line 2; …), 5 of a kind that is not read (0.svg; 1.svg; 2.svg; …).\n"
    )


def test_links_in_shards(tmp_path, capsys):
    """They lead to files there, before them or after; the others are empty files."""
    links = {"in/b.jpg": "../a.jpg", "in/c.jpg": "no.jpg"}
    with tarfile.open(shard(tmp_path / "a.tar", {"./a.jpg": jpeg(picture(0))}), "a") as tar:
        for name, target in (links | {"d.jpg": "./a.jpg"}).items():
            member = tarfile.TarInfo(name)
            member.type = tarfile.SYMTYPE if name in links else tarfile.LNKTYPE
            member.linkname = target
            tar.addfile(member)
        for name in ("a", "in/b", "in/c", "d"):
            member = tarfile.TarInfo(f"{name}.txt")
            member.size = 1
            tar.addfile(member, io.BytesIO(b"A"))
    found = {e.key: e.read() for e in read_captioned(str(tmp_path / "a.tar"))}
    assert found.pop("a/in/c") == b"" and len(found) == 3
    assert {*found.values()} == {jpeg(picture(0))}
    assert "cut short" not in capsys.readouterr().err


@pytest.mark.parametrize("rest", [b"", b"x" * 512])
def test_a_shard_that_ends_between_two_files(tmp_path, rest, capsys):
    path = Path(shard(tmp_path / "a.tar", {"0.jpg": jpeg(picture(0)), "0.txt": b"A dog."}))
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"A dog.") + 512] + rest)
    assert answers(read_captioned(str(path))) == {"a/0": ["A dog."]}
    assert "a.tar is damaged or cut short after 2 files" in capsys.readouterr().err


def test_nothing_to_read_says_why(tmp_path):
    path = shard(tmp_path / "a.tar", {"0.jpg": jpeg(picture(0)), "0.json": b'{"caption": 3}'})
    with pytest.raises(UserError, match="1 with a caption that is not text .0.jpg"):
        read_captioned(path)


@pytest.mark.parametrize("pattern", ["s-{00..01}.tar", "s-{00,01}.tar", "s-0{1,0}.{tar,tar}"])
def test_braces(tmp_path, pattern):
    for name in ("s-00", "s-01"):
        shard(tmp_path / f"{name}.tar", {"0.jpg": jpeg(picture(0)), "0.txt": name.encode()})
    found = answers(read_captioned(str(tmp_path / pattern)))
    assert found == {"s-00/0": ["s-00"], "s-01/0": ["s-01"]}


def test_shards_of_the_same_name(tmp_path):
    names = ("a/0.tar", "b/0.tar", "b/0")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shard(tmp_path / name, {"0.jpg": jpeg(picture(0)), "0.txt": name.encode()})
    found = answers(read_captioned(str(tmp_path / "*" / "0.tar")))
    assert found == {"a/0/0": ["a/0.tar"], "b/0/0": ["b/0.tar"]}
    assert len(answers(read_captioned(str(tmp_path / "*" / "0*")))) == 3


def test_names_with_brackets_and_braces(tmp_path):
    (tmp_path / "{a,b}").mkdir()
    path = shard(tmp_path / "{a,b}" / "s[1].tar", {"0.jpg": jpeg(picture(0)), "0.txt": b"A dog."})
    for where in (path, str(tmp_path / "{a,b}")):
        assert answers(read_captioned(where)) == {"s[1]/0": ["A dog."]}


def test_deep_json_in_shards(tmp_path, capsys):
    files = {f"{i}.jpg": jpeg(picture(0)) for i in range(2)}
    files["0.json"] = b'{"caption": ' + b"[" * 900 + b'"A dog."' + b"]" * 900 + b"}"
    files["1.json"] = b"[" * 100_000
    assert answers(read_captioned(shard(tmp_path / "a.tar", files))) == {"a/0": ["A dog."]}
    assert "1 with damaged JSON (1.jpg)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("", "A path is empty: check the variable"),
        ("s-{0..99999999}.tar", "more than 300,000 shards"),
        ("s-{0..999}{0..999}.tar", "more than 300,000 shards"),
        ("~no-such-user/x", "cannot be read .no home folder"),
        ("x" * 5000, "cannot be read .File name too long"),
        ("https://example.org/s-{0..1}.tar", "is an address"),
        ("no-such-folder", "There is no file or folder no-such-folder"),
        ("nothing\x1b.csv", r"nothing\\x1b.csv cannot be read"),
    ],
)
def test_places_that_cannot_be(where, said):
    with pytest.raises(UserError, match=said) as error:
        read_captioned(where)
    assert len(str(error.value)) < 400


# --- the second stage's layout ------------------------------------------------------------------


def described(folder: Path, annotations: list, encoding: str = "utf-8") -> Path:
    folder.mkdir(exist_ok=True)
    content = json.dumps({"annotations": annotations}, ensure_ascii=False)
    (folder / "filter_cap.json").write_text(content, encoding=encoding)
    return folder


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_descriptions(tmp_path, encoding, capsys):
    put(tmp_path / "image", "1.jpg", "2.PNG", "3.jpeg", "4.jpg", "5.webp", "6.jpg")
    annotations = [
        {"image_id": "1", "caption": ["A dog.", "A wet dog."]},
        {"image_id": 2, "caption": "A cät."},
        {"image_id": "3", "caption": None},
        {"image_id": "4", "caption": {"text": "A"}},
        {"image_id": 5.0, "caption": "A hen."},
        {"image_id": "6.jpg", "caption": "A cow."},
        {"image_id": "1", "caption": "Again."},
        {"image_id": None, "caption": "A hen."},
        "A hen.",
    ]
    found = read_descriptions(described(tmp_path, annotations, encoding))
    assert answers(found) == {
        "1": ["A dog.", "A wet dog.", "Again."],
        "2": ["A cät."],
        "5": ["A hen."],
        "6.jpg": ["A cow."],
    }
    line = capsys.readouterr().err
    assert "4 pictures read; 4 left out: 1 without a caption (image/3.jpg)" in line
    assert "2 without an “image_id” (annotation 8; annotation 9)" in line
    assert "1 with a caption that is not text (image/4.jpg)" in line


@pytest.mark.parametrize(("stage", "limit"), [(1, None), (2, None), (1, 1), (2, 1)])
def test_what_training_reads(tmp_path, stage, limit):
    put(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "t.csv").write_text("image,caption\na.jpg,A dog.\nb.jpg,A cat.\n")
    given = SimpleNamespace(stage=stage, data=str(tmp_path), instructions=None)
    read = read_examples(given, limit) if limit else read_examples(given)
    assert answers(read) == dict([("a.jpg", ["A dog."]), ("b.jpg", ["A cat."])][:limit])


def test_data_are_read_before_the_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minigpt4.training.run._open", lambda *_: pytest.fail("it was loaded"))
    put(tmp_path / "image", "1.jpg")
    data = described(tmp_path, [{"image_id": "1", "caption": None}])
    start = Path(__file__).parent.parent / "weights" / "nano.safetensors"
    given = ["train", "--stage", "2", "--data", str(data), "--init", str(start)]
    assert main([*given, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "1 without a caption (image/1.jpg)" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("image_id", "there"),
    [("1", "images/1.jpg"), ("image/1.jpg", "image/1.jpg"), ("images/1", "images/1.png")],
)
def test_other_places_of_described_pictures(tmp_path, image_id, there):
    put(tmp_path, there)
    found = read_descriptions(described(tmp_path, [{"image_id": image_id, "caption": "A dog."}]))
    assert answers(found) == {image_id: ["A dog."]}


def test_instructions(tmp_path, capsys):
    put(tmp_path / "image", "1.png", "2.jpg")
    pairs = [
        {"instruction": "Why?", "answer": ["Because.", "So."]},
        {"instruction": " ", "answer": "Left out."},
        {"instruction": "How?", "answer": None},
        {"instruction": "What?", "answer": "None"},
        {"instruction": "Who?"},
        "Who?",
    ]
    lines = [{"image_id": 1, "pairs": pairs}, {"image_id": "2", "pairs": []}]
    lines += [{"image_id": None, "pairs": pairs}, {"image_id": "2", "pairs": {"Why?": "So."}}]
    file = tmp_path / "asked.jsonl"
    file.write_bytes("\n".join(map(json.dumps, lines)).encode("utf-8-sig"))
    found = read_instructions(file, tmp_path)
    assert answers(found) == {"1": ["Because.", "So.", "None"]}
    assert found[0].texts[0].instructions == ("Why?",)
    line = capsys.readouterr().err
    assert "1 picture read; 7 left out: 6 without a caption (line 1: 1; " in line
    assert "1 without an “image_id” (line 3)" in line


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "there"),
    [
        (r"bilder\a.jpg", "bilder/a.jpg"),
        ("./bilder//a.jpg", "bilder/a.jpg"),
        (r"C:\Users\me\bilder\a.jpg", "bilder/a.jpg"),
        ("/home/me/set/bilder/a.jpg", "bilder/a.jpg"),
        ("file:///home/me/bilder/a.jpg", "bilder/a.jpg"),
        ("BILDER/A.JPG", "bilder/a.jpg"),
        (unicodedata.normalize("NFD", "Grün.jpg"), unicodedata.normalize("NFC", "Grün.jpg")),
        (unicodedata.normalize("NFC", "grün.jpg"), unicodedata.normalize("NFD", "GRÜN.jpg")),
        ("a", "a.jpg"),
        ("a.jpg", "a.jpeg"),
        ("a.jpg", "a.PNG"),
        ("cam_22.5mm", "cam_22.5mm.webp"),
        ('"a.jpg"', "a.jpg"),
        (" a.jpg", " a.jpg"),
        ("'q'.jpg", "'q'.jpg"),
        ("a.jpg#4", "a.jpg"),
        ("file:///home/me/bilder/a%20b.jpg", "bilder/a b.jpg"),
        ("bilder/a%20b%C3%BC.JPG", "bilder/a bü.jpg"),
        ("a%20b.jpg", "a%20b.jpg"),
        ("my dog.jpg", "my%20dog.jpg"),
        ("1.0", "1.jpg"),
        ("bilder/1.0.jpg", "bilder/1.jpg"),
        ("1.0", "1.0.jpg"),
        ("at 3.07 PM.png", "at 3.07\u202fPM.png"),  # a screenshot of macOS
        ("a\xa0b.jpg", "a b.jpg"),
        ("\u202aC:\\me\\a.jpg\u202c", "a.jpg"),  # a path copied in Windows' properties
        ("\ufeffa\u200b.jpg", "a.jpg"),
    ],
)
def test_names_from_other_systems(tmp_path, name, there):
    put(tmp_path, there)
    (found,) = PictureFinder([[tmp_path]]).find(name)
    assert found.samefile(tmp_path / there)


@pytest.mark.parametrize(
    ("name", "there", "found"),
    [
        ("a", ("a.jpg", "a.png"), {"a.jpg", "a.png"}),
        ("A.JPG", ("a.jpg", "a.Jpg"), {"a.jpg", "a.Jpg"}),
        ("b.jpg", ("a.jpg",), set()),
        ("a%20b", ("a b.jpg", "a b.png"), {"a b.jpg", "a b.png"}),
        ("a%2520b.jpg", ("a b.jpg",), set()),
        ("1.0", ("1.jpg", "1.png"), {"1.jpg", "1.png"}),
        ("1.05", ("1.jpg", "15.jpg"), set()),
        ("v1.0.jpg", ("v1.jpg",), set()),
        ("a b%20c.jpg", ("a b c.jpg", "a%20b%2520c.jpg"), {"a b c.jpg", "a%20b%2520c.jpg"}),
        ("\ud83d.jpg", ("a.jpg",), set()),
        ("a b.jpg", ("a\xa0b.jpg", "a\u202fb.jpg"), {"a\xa0b.jpg", "a\u202fb.jpg"}),
        ("ab.jpg", ("a b.jpg",), set()),
    ],
)
def test_names_of_several_files_and_of_none(tmp_path, name, there, found):
    put(tmp_path, *there)
    assert {p.name for p in PictureFinder([[tmp_path]]).find(name)} == found


def test_the_name_itself_comes_before_those_like_it(tmp_path):
    put(tmp_path, "A.jpg", "a.jpg")
    for name in ("A", "a"):
        assert PictureFinder([[tmp_path]]).find(name) == [tmp_path / f"{name}.jpg"]


def test_splits_that_use_the_same_names(tmp_path):
    """A file's own folder counts; where none is, nothing is guessed."""
    put(tmp_path, "train/0.jpg", "val/0.jpg", "test/0.jpg")
    content = {
        "images": [{"id": 1, "file_name": "0.jpg"}],
        "annotations": [{"image_id": 1, "caption": "A dog."}],
    }
    (tmp_path / "annotations").mkdir()
    for name, key in (("captions_val2017", "../val/0.jpg"), ("captions-train", "../train/0.jpg")):
        file = tmp_path / "annotations" / f"{name}.json"
        file.write_text(json.dumps(content))
        assert answers(read_captioned(str(file))) == {key: ["A dog."]}
    file = file.rename(tmp_path / "annotations" / "captions.json")
    said = "annotation 1: 0.jpg, which is ../test/0.jpg or ../train/0.jpg. Write folders"
    with pytest.raises(UserError, match=f"names have the names of several files: {said}"):
        read_captioned(str(file))
    file.write_text(json.dumps(content).replace("0.jpg", "1.jpg"))
    file = file.rename(file.with_name("captions_val.json"))
    with pytest.raises(UserError, match="looked for in ") as error:
        read_captioned(str(file))
    assert str(error.value).endswith("/annotations and in .., ../val, ../test, ../train.")
    file = file.rename(file.with_name("captions.json"))
    file.write_text(json.dumps(content))
    put(tmp_path / "images", "0.jpg")
    assert list(answers(read_captioned(str(file)))) == ["../images/0.jpg"]


@pytest.mark.parametrize("inner", ["Images", "flickr30k_images"])
def test_tables_beside_a_folder_of_pictures(tmp_path, inner):
    put(tmp_path / inner, "a.jpg")
    table = tmp_path / "results.csv"
    table.write_text("image_name| comment_number| comment\na.jpg#0| 0| A dog.\na.jpg| 1| A cat.\n")
    assert answers(read_captioned(str(tmp_path))) == {f"{inner}/a.jpg": ["A dog.", "A cat."]}
    table.write_text("image,caption\nb.jpg,A dog.\n")
    with pytest.raises(
        UserError, match=f"missing: line 2: b.jpg.* looked for in .* and in {inner}"
    ):
        read_captioned(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Grün, 3\u202fPM 👩\u200d🔬.jpg", "Grün, 3\u202fPM 👩\u200d🔬.jpg"),
        ("a\n\x1b[31mb\u202e\x9b.jpg", r"a\n\x1b[31mb\u202e\x9b.jpg"),
        ("\udcff.jpg", "?.jpg"),
    ],
)
def test_printable_names(name, shown):
    assert printable(Path(name)) == shortened(name) == shown


def test_long_names_keep_their_ends():
    shown = shortened(f"begin {'x' * 1000}, line 7")
    assert len(shown) == SHOWN and shown.startswith("begin x") and shown.endswith("x, line 7")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"image": f"data:image/jpeg;base64,{'A' * 200_000}"}, "inside the file .*save them as"),
        ({"image": "A" * 200_000}, "inside the file .*save them as files"),
        ({"image": {"bytes": "AAAA", "path": None}}, "inside the file .*save them as files"),
        ({"image": "https://example.org/a.jpg"}, "on the web .*not fetched"),
        ({"image": "s3://bucket/a.jpg"}, "on the web .*not fetched"),
        ({"image": "zz\n\x1b[31m" + "x" * 1000 + ".jpg"}, r"missing: line 1: zz\\n\\x1b.*x.jpg"),
    ],
)
def test_pictures_that_are_no_files(tmp_path, record, said):
    (tmp_path / "t.jsonl").write_text(json.dumps(record | {"caption": "A dog."}))
    with pytest.raises(UserError, match=said) as error:
        read_captioned(str(tmp_path / "t.jsonl"))
    sentence = str(error.value).replace(str(tmp_path), "")
    assert len(sentence) < 250 and sentence == printable(sentence)


def test_links_that_lead_nowhere(tmp_path, capsys):
    for i in range(10):
        put(tmp_path, f"{i}.jpg")
        (tmp_path / f"{i}.txt").write_text("A dog.")
    for name in ("x.jpg", "9.txt", "odd.json"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    (tmp_path / "x.txt").write_text("A cat.")
    assert len(read_captioned(str(tmp_path))) == 9
    line = capsys.readouterr().err
    assert "1 with a missing picture (x.jpg)" in line and "1 without a caption (9.jpg)" in line


def test_texts_beside_pictures_in_another_case_or_form(tmp_path, capsys):
    """Of several that fit, none is taken."""
    put(tmp_path, "caf\u00e9.jpg", "B.JPG", "x.jpg", "X.jpg", "y.jpg")
    for name in ("cafe\u0301.txt", "b.TXT", "x.txt", "Y.txt", "Y.json"):
        (tmp_path / name).write_text(json.dumps(name))
    (tmp_path / "z.txt").write_text("z")
    assert answers(read_captioned(str(tmp_path))) == {
        "caf\u00e9": ['"cafe\\u0301.txt"'],
        "B": ['"b.TXT"'],
        "x": ['"x.txt"'],
        "y": ["Y.json"],
    }
    line = capsys.readouterr().err
    assert "2 left out: 1 without a caption (X.jpg), 1 without a picture (z.txt)" in line


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"
PAGE = b"\n<!DOCTYPE html><html>404</html>"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [(f"c.{end}", POINTER, "run “git lfs pull”") for end in ("csv", "json", "tar", "parquet")]
    + [("c.json", b"[{'image': 'a.jpg'}]", "not JSON: correct it at line 1, column 3, or check")]
    + [(f"c.{end}", PAGE, "a web page, not the file itself: download") for end in ("csv", "json")],
)
def test_what_stands_in_place_of_a_file(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    for place in (tmp_path / name, tmp_path):
        with pytest.raises(UserError, match=said):
            read_captioned(str(place))


def test_what_stands_in_place_of_a_picture(tmp_path):
    (tmp_path / "a.jpg").write_bytes(POINTER)
    (tmp_path / "a.txt").write_text("A dog.")
    (example,) = read_captioned(str(tmp_path))
    with pytest.raises(UserError, match="Picture a of the data .*run “git lfs pull”"):
        example.picture()
    with pytest.raises(UserError, match="is a Git LFS pointer"):
        image.load(POINTER)


def test_hidden_names():
    assert all(map(is_hidden, ("._a.csv", "x/._a.jpg", ".git/a.jpg", "__MACOSX/a.jpg")))
    assert not any(map(is_hidden, ("./a.jpg", "../a.jpg", "a.b.jpg")))


def test_files_that_were_joined(tmp_path):
    """Each with its byte-order mark."""
    put(tmp_path, "a.jpg", "b.jpg")
    lines = [{"image": name, "caption": "x"} for name in ("a.jpg", "b.jpg")]
    (tmp_path / "t.jsonl").write_text("\n".join("\ufeff" + json.dumps(line) for line in lines))
    assert answers(read_captioned(str(tmp_path))) == {"a.jpg": ["x"], "b.jpg": ["x"]}


def test_text_tables_of_excel(tmp_path):
    put(tmp_path, "a.jpg")
    table = "file_name\tcaption\r\na.jpg\tEin Hund, grün.\r\n"
    (tmp_path / "captions.txt").write_bytes(table.encode("utf-16"))
    for place in (tmp_path, tmp_path / "captions.txt"):
        assert answers(read_captioned(str(place))) == {"a.jpg": ["Ein Hund, grün."]}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', None])
def test_tables_of_spreadsheets(tmp_path, encoding, end, first):
    put(tmp_path, "a.jpg", "b.png")
    (tmp_path / "._captions.csv").write_bytes(b"\0\5\26\7")
    lines = ["File_Name;Caption", "a.jpg;Ein Hund, grün.", "b.jpg;\"['Eine Katze.', 'Nass.']\""]
    text = end.join([first, *lines] if first else lines)
    (tmp_path / "captions.csv").write_bytes(text.encode(encoding))
    assert answers(read_captioned(str(tmp_path))) == {
        "a.jpg": ["Ein Hund, grün."],
        "b.png": ["Eine Katze.", "Nass."],
    }


def test_lines_without_a_caption_are_left_out(tmp_path, capsys):
    put(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    (tmp_path / "t.csv").write_text("file_name,caption\na.jpg,A dog.\nb.jpg,\nc.jpg,nan\n,A cat.\n")
    assert answers(read_captioned(str(tmp_path))) == {"a.jpg": ["A dog."]}
    line = capsys.readouterr().err
    assert "2 without a caption (line 3; line 4), 1 without a picture (line 5)" in line


@pytest.mark.parametrize(
    ("columns", "read"),
    [
        ("caption,caption_2", ["A dog.", "Wet."]),
        ("caption1,Caption 2", ["A dog.", "Wet."]),
        ("answer,answer_2", ["A dog."]),
    ],
)
def test_numbered_columns_of_captions(tmp_path, columns, read):
    put(tmp_path, "a.jpg")
    (tmp_path / "t.csv").write_text(f"image,{columns}\na.jpg,A dog.,Wet.\n")
    assert answers(read_captioned(str(tmp_path))) == {"a.jpg": read}


def test_a_few_missing_pictures_are_left_out(tmp_path, capsys):
    put(tmp_path, *(f"{i}.jpg" for i in range(10)))
    lines = [f"{i}.jpg,A dog." for i in range(11)]
    table = tmp_path / "t.csv"
    table.write_text("\n".join(["file_name,caption", *lines]))
    assert len(read_captioned(str(tmp_path))) == 10
    assert "1 with a missing picture (line 12: 10.jpg)" in capsys.readouterr().err
    table.write_text("\n".join(["file_name,caption", *lines, "11.jpg,A cat."]))
    with pytest.raises(UserError, match="2 of 12 pictures .* are missing: line 12: 10.jpg"):
        read_captioned(str(tmp_path))


# --- formats ------------------------------------------------------------------------------------


def test_coco(tmp_path, capsys):
    put(tmp_path / "val2017", "000000000007.jpg", "000000000008.jpg")
    (tmp_path / "annotations").mkdir()
    images = [
        {"id": 7, "file_name": "000000000007.jpg"},
        {"id": 8, "file_name": "000000000008.jpg"},
    ]
    annotations = [
        {"id": 1, "image_id": 7, "caption": "A dog."},
        {"id": 2, "image_id": 8, "caption": "A cat. "},
        {"id": 3, "image_id": 7, "caption": "A wet dog."},
        {"id": 4, "image_id": 8, "caption": ""},
    ]
    file = tmp_path / "annotations" / "captions_val2017.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    found = read_captioned(str(file))
    assert [e.captions for e in found] == [("A dog.", "A wet dog."), ("A cat.",)]
    assert "1 without a caption" in capsys.readouterr().err
    boxes = [{"image_id": 7, "bbox": [1, 2, 3, 4]}]
    file.write_text(json.dumps({"images": images, "annotations": boxes}))
    with pytest.raises(UserError, match="COCO's object boxes"):
        read_captioned(str(file))


@pytest.mark.parametrize("ids", [(7, "7"), (7, 7.0), ("7", 7)])
def test_coco_ids_of_any_type(tmp_path, ids, capsys):
    put(tmp_path, "a.jpg")
    annotations = [{"image_id": ids[1], "caption": "A dog."}, {"caption": "A cat."}]
    content = {"images": [{"id": ids[0], "file_name": "a.jpg"}], "annotations": annotations}
    (tmp_path / "c.json").write_text(json.dumps(content))
    assert answers(read_captioned(str(tmp_path / "c.json"))) == {"a.jpg": ["A dog."]}
    assert "1 without an “image_id” (annotation 2)" in capsys.readouterr().err


def test_images_of_coco_that_cannot_be_used(tmp_path, capsys):
    put(tmp_path, "a.jpg", "b.jpg", "c.jpg", "d.jpg")
    ids = {"a.jpg": 1, "b.jpg": None, "c.jpg": 2, "d.jpg": 2}
    images = [{"id": number, "file_name": name} for name, number in ids.items()]
    images += [{"id": 1, "file_name": "a.jpg"}, {"id": 3, "file_name": "b.jpg"}]
    annotations = [{"image_id": 1, "caption": "A dog."}, {"image_id": 2, "caption": "A cat."}]
    annotations += [{"image_id": 9, "caption": "A hen."}]
    annotations += [{"image_id": 1, "caption": "Blurred.", "is_rejected": True}]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    assert answers(read_captioned(str(tmp_path / "c.json"))) == {"a.jpg": ["A dog."]}
    assert (
        "5 left out: 1 without a usable “id” or “file_name” (image 2), 1 with an “image_id” that "
        "several pictures have (annotation 2), 1 with an “image_id” that is not in “images” "
        "(annotation 3), 1 marked as rejected (“is_rejected”) (annotation 4), 1 without a caption "
        "(b.jpg)"
    ) in capsys.readouterr().err


RECORDS = [{"image": "a.jpg", "caption": "A dog."}, {"image": "b.jpg", "caption": "A cat."}]


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(map(json.dumps, RECORDS)),
        json.dumps({"licenses": [{"id": 1, "name": "CC"}], "data": RECORDS, "info": []}),
        json.dumps(RECORDS, indent=1),
    ],
)
def test_records_in_json(tmp_path, text):
    put(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "d.json").write_text(text)
    assert answers(read_captioned(str(tmp_path))) == {"a.jpg": ["A dog."], "b.jpg": ["A cat."]}


def test_one_record_in_json(tmp_path):
    put(tmp_path, "a.jpg")
    (tmp_path / "d.json").write_text(json.dumps({"image": "a.jpg", "conversations": LLAVA}))
    assert answers(read_captioned(str(tmp_path))) == {"a.jpg": ["A red box.", "On a field."]}


def test_several_lists_are_not_guessed_between(tmp_path):
    (tmp_path / "d.json").write_text(json.dumps({"train": RECORDS[:1], "val": RECORDS[1:]}))
    with pytest.raises(UserError, match="2 lists .*“train”, “val”.*: save the one"):
        read_captioned(str(tmp_path / "d.json"))


def test_karpathy(tmp_path):
    put(tmp_path, "val2014/a.jpg")
    sentences = [{"raw": "A dog."}, {"raw": "A wet dog."}]
    record = {"filepath": "val2014", "filename": "a.jpg", "sentences": sentences}
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": [record], "dataset": "coco"}))
    assert answers(read_captioned(str(tmp_path))) == {"val2014/a.jpg": ["A dog.", "A wet dog."]}


LLAVA = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A red box."},
    {"from": "human", "value": "Where?"},
    {"from": "gpt", "value": "On a field."},
]
TURNS = [("What is it?",), ("Where?",)]


def test_a_greeting_is_no_description(tmp_path):
    """Chats that a chatbot begins; an answer that is alone is a caption, as in ms-swift's data."""
    put(tmp_path, "a.jpg")
    greeting = {"from": "gpt", "value": "Hello!"}
    (tmp_path / "t.json").write_text(
        json.dumps(
            [{"image": "a.jpg", "conversations": c} for c in ([greeting, *LLAVA], [LLAVA[1]])]
        )
    )
    (example,) = read_captioned(str(tmp_path / "t.json"))
    assert [(t.answer, len(t.earlier)) for t in example.texts] == [
        ("A red box.", 1),
        ("On a field.", 2),
        ("A red box.", 0),
    ]


def test_pictures_by_their_marks(tmp_path, capsys):
    """As MiniCPM-V's trainer has them."""
    put(tmp_path, "a.jpg", "b.jpg")
    turns = [{"role": "user", "content": "<image_00>\nq"}, {"role": "assistant", "content": "a"}]
    one, two = {"<image_00>": "a.jpg"}, {"<image_00>": "a.jpg", "<image_01>": "b.jpg"}
    records = [{"image": image, "conversations": turns} for image in (one, two)]
    (tmp_path / "t.json").write_text(json.dumps(records))
    assert answers(read_captioned(str(tmp_path / "t.json"))) == {"a.jpg": ["a"]}
    assert "1 with several pictures (record 2)" in capsys.readouterr().err


def test_llava(tmp_path, capsys):
    put(tmp_path / "coco" / "train2017", "a.jpg")
    records = [
        {"id": "0", "image": "coco/train2017/a.jpg", "conversations": LLAVA},
        {"id": "1", "conversations": LLAVA},
        {"id": "2", "image": ["coco/train2017/a.jpg"] * 2, "conversations": LLAVA},
        {"id": "3", "image": "coco/train2017/a.jpg", "conversations": LLAVA[:1]},
        {"id": "4", "image": "coco/train2017/a.jpg", "conversations": [{"from": "tool"}]},
        {"id": "5", "image": "coco/train2017/a.jpg", "conversations": [{"from": "chatbot"}]},
        {"id": "6", "conversations": [{"from": "user", "value": "<img>a.jpg</img>\nWhat?"}]},
        {
            "id": "7",
            "image": "coco/train2017/a.jpg",
            "conversation": [{"input": "q", "output": ""}],
        },
    ]
    (tmp_path / "llava.json").write_text(json.dumps(records))
    (example,) = read_captioned(str(tmp_path / "llava.json"))
    assert [t.instructions for t in example.texts] == TURNS
    assert [t.answer for t in example.texts] == ["A red box.", "On a field."]
    assert [t.earlier for t in example.texts] == [(), (("What is it?", "A red box."),)]
    line = capsys.readouterr().err
    for part in (
        "1 without a picture (record 2)",
        "1 with several pictures (record 3)",
        "1 without a caption (record 4)",
        "1 with calls of tools (record 5)",
        "2 with a role other than user, human, assistant, gpt, model, system, developer (record 6: "
        "“chatbot”; record 8: none)",
        "1 with a picture named inside the text (<img>…</img>), which is not read (record 7)",
    ):
        assert part in line


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<image>What is it?"},
    {"role": "assistant", "content": "A red box."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "On a field."},
]
PARTS = [
    {
        "role": "user",
        "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What is it?"}],
    },
    *MESSAGES[2:],
]


@pytest.mark.parametrize(
    ("record", "first"),
    [
        ({"messages": MESSAGES, "images": ["a.jpg"]}, "Be brief.\nWhat is it?"),
        ({"messages": PARTS}, "What is it?"),
        ({"conversations": LLAVA, "images": [{"path": "a.jpg"}]}, "What is it?"),
        (
            {
                "query": "Where?",
                "response": "On a field.",
                "history": [["<image>What is it?", "A red box."]],
                "images": ["a.jpg"],
            },
            "What is it?",
        ),
    ],
)
def test_json_lines_of_trainers(tmp_path, record, first):
    put(tmp_path, "a.jpg")
    (tmp_path / "train.jsonl").write_text(json.dumps(record))
    (example,) = read_captioned(str(tmp_path / "train.jsonl"))
    last = example.texts[-1]
    assert (last.answer, last.instructions) == ("On a field.", ("Where?",))
    assert last.earlier == ((first, "A red box."),)


@pytest.mark.parametrize(
    ("turns", "read"),
    [
        (["<image>\nHTML's <img> tag?", "It is <img> or <image>."], ["HTML's <img> tag?"]),
        (["What?\n<|image|>", "a"], ["What?"]),
        (["See <image 1>", "a", "<image 1> again?", "b"], ["See", "again?"]),
        (["<img> What?", "a"], ["What?"]),
        (["<|vision_start|><|image_pad|><|vision_end|>What?", "a"], ["What?"]),
        (["[IMG]What?", "a"], ["What?"]),
        (["<image_soft_token>\nIs <video> an HTML tag?", "a"], ["Is <video> an HTML tag?"]),
        (["<|image_pad|><|image_pad|>What?", "a"], None),
        (["<image>\nWhat?", "a", "<image>\nWhere?", "b"], ["What?", "Where?"]),
        (["<image_1>What?", "a", "And <image_2>?", "b"], None),
        (["<image>\n<image>\nWhat?", "a"], None),
        (["<image>\nWhat?", "a", "<image> or <image>?", "b"], None),
    ],
)
def test_marks_that_stand_for_the_picture(tmp_path, turns, read, capsys):
    """They are taken out of questions alone; those of more pictures than one are not learned."""
    put(tmp_path, "a.jpg")
    said = [{"from": ("user", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    history = [[turns[i], turns[i + 1]] for i in range(0, len(turns) - 2, 2)]
    asked = {"query": turns[-2], "response": turns[-1], "history": history}
    for record in ({"conversations": said}, asked):
        lines = (record | {"image": "a.jpg"}, {"image": "a.jpg", "caption": "A dog."})
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (example,) = read_captioned(str(tmp_path))
        *learned, _ = example.texts
        assert ("1 with more marks" in capsys.readouterr().err) == (read is None)
        if read:
            last = learned[-1]
            assert [*(q for q, _ in last.earlier), *last.instructions] == read
            assert last.answer == turns[-1]
        else:
            assert not learned


def about(question: object, answer: object, **fields) -> dict:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "images": ["a.jpg"], **fields}


UNLEARNED = {"role": "assistant", "content": "a", "weight": 0}


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (about("q", "a", label=False), "1 marked as bad"),
        ({"image": "a.jpg", "conversations": LLAVA, "kto_tag": False}, "1 marked as bad"),
        ({"image": "a.jpg", "caption": "b", "is_rejected": True}, "1 marked as rejected"),
        ({"image": "a.jpg", "question": "q", "answers": ["a", "b"]}, "1 with several “answers”"),
        (about("q", "a", rejected_response="b"), "1 with a chosen and a rejected answer"),
        ({"image": "a.jpg", "chosen": "a", "rejected": "b"}, "1 with a chosen and a rejected"),
        ({"messages": [UNLEARNED], "image": "a.jpg"}, "1 whose answers are marked as not to be"),
        (about("<image><video>q", "a", videos=["b.mp4"]), "1 with a video or sound"),
        (about("q", "a", audios=["b.mp3"]), "1 with a video or sound"),
        (about("<image>\n<video>\nq", "a"), "1 with a video or sound"),
        (about("<|vision_start|><|video_pad|><|vision_end|>q", "a"), "1 with a video or sound"),
        (about([{"type": "video_url", "video_url": {"url": "b.mp4"}}], "a"), "1 with a video"),
        ({"video": "b.mp4", "caption": "A dog."}, "1 with a video or sound"),
        (about("<image>Find <ref-object>", "<bbox>", objects={}), "1 with boxes"),
        (about("q", "<|box_start|>(1,2),(3,4)<|box_end|>"), "1 with boxes"),
        ({"image": "a.jpg", "query": "q", "response": "<box>[[1, 2, 3, 4]]</box>"}, "1 with boxes"),
    ],
)
def test_records_that_are_not_to_be_learned(tmp_path, record, why, capsys):
    put(tmp_path, "a.jpg")
    lines = map(json.dumps, (record, {"image": "a.jpg", "caption": "A dog.", "video": "of.mp4"}))
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    assert answers(read_captioned(str(tmp_path))) == {"a.jpg": ["A dog."]}
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("mark", [{"loss": False}, {"weight": 0}, {"loss": True}, {"weight": 1}])
def test_turns_that_are_not_to_be_learned(tmp_path, mark):
    put(tmp_path, "a.jpg")
    record = about("q", "a")
    record["messages"][1] |= mark
    record["messages"] += about("r", "b")["messages"]
    (tmp_path / "t.jsonl").write_text(json.dumps(record))
    (example,) = read_captioned(str(tmp_path))
    learned = ["a", "b"] if any(mark.values()) else ["b"]
    assert [t.answer for t in example.texts] == learned
    assert example.texts[-1].earlier == (("q", "a"),)


@pytest.mark.parametrize(
    "record",
    [
        about("q", "a", system="Be brief."),
        about("q", "a", system_prompt="Be brief."),
        {"image": "a.jpg", "system": "Be brief.", "query": "q", "response": "a"},
        {"image": "a.jpg", "system": "Be brief.", "instruction": "q", "output": "a"},
        {
            "image": "a.jpg",
            "messages": [
                {"role": "developer", "content": "Be brief."},
                *about("q", "a")["messages"],
            ],
        },
    ],
)
def test_system_texts(tmp_path, record):
    """Those of a record are part of the first question, as those of messages are."""
    put(tmp_path, "a.jpg")
    (tmp_path / "t.jsonl").write_text(json.dumps(record))
    (example,) = read_captioned(str(tmp_path))
    assert [(t.instructions, t.answer) for t in example.texts] == [(("Be brief.\nq",), "a")]


@pytest.mark.parametrize("answer", ["None", "null", "N/A", "['a','b']"])
def test_answers_are_no_cells(tmp_path, answer):
    put(tmp_path, "a.jpg")
    turns = [("human", "Cell?"), ("gpt", answer), ("human", "q"), ("gpt", " "), ("human", "r")]
    turns = [{"from": role, "value": text} for role, text in [*turns, ("gpt", "b")]]
    records = [
        {"image": "a.jpg", "conversations": turns},
        {"image": "a.jpg", "question": "Cell?", "answer": answer},
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, records)))
    (example,) = read_captioned(str(tmp_path))
    assert [(t.answer, t.instructions, t.earlier) for t in example.texts] == [
        (answer, ("Cell?",), ()),
        ("b", ("r",), (("Cell?", answer),)),
        (answer, ("Cell?",), ()),
    ]


@pytest.mark.parametrize(
    ("history", "earlier"),
    [
        ([["<image>q", "None"]], (("q", "None"),)),
        ([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], (("q", "a"),)),
        ([], ()),
        (None, ()),
        (["ab", "cd"], None),
        ([["q", "a", "b"]], None),
        ([["q", 7]], None),
        ({"q": "a"}, None),
        ([{"question": "q", "answer": "a"}], None),
    ],
)
def test_histories(tmp_path, history, earlier, capsys):
    put(tmp_path, "a.jpg")
    record = {"image": "a.jpg", "query": "q", "response": "r", "history": history}
    lines = (record, {"image": "a.jpg", "caption": "x"})
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (example,) = read_captioned(str(tmp_path))
    said = capsys.readouterr().err
    assert [t.earlier for t in example.texts] == [*([] if earlier is None else [earlier]), ()]
    assert ("1 left out: 1 with a" in said and "(line 1" in said) == (earlier is None)


def test_instruction_records(tmp_path):
    put(tmp_path, "a.jpg")
    record = {"instruction": "Translate:", "input": "chien", "output": "dog", "images": ["a.jpg"]}
    (tmp_path / "alpaca.json").write_text(json.dumps([record]))
    (example,) = read_captioned(str(tmp_path / "alpaca.json"))
    assert (example.texts[0].answer, example.texts[0].instructions) == (
        "dog",
        ("Translate:\nchien",),
    )


@pytest.mark.parametrize(
    ("name", "text", "place"),
    [
        ("d.jsonl", '{"image": "a.jpg", TWICE}\n{"image": "b.jpg", ONCE}', "line 1"),
        ("d.jsonl", '{"image": "b.jpg", ONCE}\n{"image": "a.jpg", CASES}', "line 2"),
        ("d.jsonl", '[{"image": "a.jpg", CASES}, {"image": "b.jpg", ONCE}]', "record 1"),
        ("d.json", '[{"image": "a.jpg", TURNS}, {"image": "b.jpg", ONCE}]', "record 1"),
        ("d.json", '{"images": [IMAGES], "annotations": [A, {"image_id": 2, ONCE}]}', "ann"),
        ("d.json", '{"images": [IDS, IMAGES], "annotations": [{"image_id": 2, ONCE}]}', "image 1"),
        ("filter_cap.json", '{"annotations": [A, {"image_id": "b", ONCE}]}', "annotation 1"),
        ("a.json", "{TWICE}", "a.jpg"),
        ("a.json", "{CASES}", "a.jpg"),
    ],
)
def test_fields_that_are_there_more_than_once(tmp_path, name, text, place, capsys):
    """Of such a record, none is taken; the other is read."""
    put(tmp_path, "a.jpg", "b.jpg")
    for mark, what in {
        "TWICE": '"caption": "x", "caption": "y"',
        "CASES": '"caption": "x", "Caption": "y"',
        "ONCE": '"caption": "A cat.", "id": 1, "ID": 2',
        "TURNS": '"conversations": [{"from": "user", "value": "x", "value": "y"}]',
        "IMAGES": '{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}',
        "IDS": '{"id": 3, "id": 4, "file_name": "a.jpg"}',
        "A,": '{"image_id": 1, "caption": "x", "caption": "y"},',
    }.items():
        text = text.replace(mark, what)
    (tmp_path / name).write_text(text)
    if name == "a.json":
        (tmp_path / "b.json").write_text('{"caption": "A cat."}')
    assert [*answers(read_captioned(str(tmp_path))).values()] == [["A cat."]]
    said = capsys.readouterr().err
    assert f"1 with a field that is there more than once ({place}" in said


@pytest.mark.parametrize("name", ["d.json", "filter_cap.json"])
def test_lists_that_are_there_more_than_once(tmp_path, name):
    (tmp_path / name).write_text('{"annotations": [], "annotations": []}')
    with pytest.raises(UserError, match="json has “annotations” more than once: remove or rename"):
        read_captioned(str(tmp_path))


def test_files_of_img2dataset(tmp_path, capsys):
    for i in range(3):
        put(tmp_path / "00000", f"00000000{i}.jpg")
        record = {"caption": None if i else "A dog.", "status": "success"}
        (tmp_path / "00000" / f"00000000{i}.json").write_text(json.dumps(record))
    (tmp_path / "00000" / "000000001.txt").write_text("A cat.")
    (tmp_path / "00000_stats.json").write_text('{"count": 3}')
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    found = read_captioned(str(tmp_path))
    assert answers(found) == {"00000/000000000": ["A dog."], "00000/000000001": ["A cat."]}
    assert "1 without a caption (00000/000000002.jpg)" in capsys.readouterr().err
    assert len(read_captioned(str(tmp_path / "00000"))) == 2


def test_a_folder_of_shards(tmp_path):
    for name in ("a", "b"):
        shard(tmp_path / f"{name}.tar", {"0.jpg": jpeg(picture(0)), "0.txt": name.encode()})
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    assert answers(read_captioned(str(tmp_path))) == {"a/0": ["a"], "b/0": ["b"]}


def test_imagefolder(tmp_path):
    put(tmp_path / "train", "a.jpg")
    line = json.dumps({"file_name": "a.jpg", "text": "A dog."})
    (tmp_path / "train" / "metadata.jsonl").write_text(line)
    assert answers(read_captioned(str(tmp_path))) == {"a.jpg": ["A dog."]}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.parquet", "a Parquet file"),
        ("a.zip", "an archive"),
        ("a.tar.gz", "a compressed tar file"),
        ("a.xlsx", "a spreadsheet"),
        ("a.tfrecord", "a TFRecord file"),
        ("a.jpg", "a single picture"),
        ("a.txt", "a text file"),
        ("a.mp4", "a video"),
        ("a.jsonl.gz", "a compressed file: unpack it"),
        ("a.docx", "a file of a kind that is not read"),
    ],
)
def test_other_kinds_are_called_by_their_names(tmp_path, name, kind):
    (tmp_path / name).write_bytes(b"PK\3\4")
    with pytest.raises(UserError, match=kind):
        read_captioned(str(tmp_path / name))


def test_folders_without_captions_say_what_they_are(tmp_path):
    put(tmp_path / "classes", "cat/1.jpg", "dog/1.jpg")
    with pytest.raises(UserError, match="seem to be classes"):
        read_captioned(str(tmp_path / "classes"))
    put(tmp_path / "bare", "1.jpg")
    with pytest.raises(UserError, match="no table of captions"):
        read_captioned(str(tmp_path / "bare"))
    (tmp_path / "odd.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="JSON in no known format"):
        read_captioned(str(tmp_path / "odd.json"))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("annotations/captions_val.json", "{}", "name annotations/captions_val.json itself"),
        ("said/captions.txt", "image,caption\n1.jpg,A dog.", "name said/captions.txt itself"),
        ("validation/metadata.csv", "file_name,text", "Name validation/metadata.csv itself"),
        ("dataset_info.json", "{}", "a.arrow in it is an Arrow file: .*save_to_disk"),
        ("readme.txt", "Pictures of dogs.", ": put KEY.txt"),
    ],
)
def test_folders_name_the_file_of_their_captions(tmp_path, name, content, said):
    put(tmp_path / "val", "1.jpg")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    (tmp_path / "a.arrow").touch()
    with pytest.raises(UserError, match=said):
        read_captioned(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "header", "line"),
    [
        ("captions.txt", "image,caption\n", '{},"A dog, wet."\n'),  # Kaggle's Flickr8k
        ("results.csv", "image_name| comment_number| comment\n", "{}| 0| A dog, wet.\n"),
        ("Flickr8k.token.txt", "", '{}#0\t" A dog, wet.\n'),
        ("results_20130124.token", "", '{}#0\tA dog, "wet".\n'),
    ],
)
def test_flickrs_own_tables(tmp_path, name, header, line):
    put(tmp_path, "Images/1.jpg", "Images/2.jpg")
    (tmp_path / "readme.txt").write_text("Pictures, and captions.\nOf dogs.")
    (tmp_path / "Flickr8k.lemma.token.txt").write_text("1.jpg#0\tA dog be wet.\n")
    said = "A dog, wet." if header else line.strip().partition("\t")[2]
    lines = [line.format(picture) for picture in ("1.jpg", "2.jpg", "2.jpg")]
    (tmp_path / name).write_text(header + "".join(lines))
    for where in (tmp_path, tmp_path / name):
        found = answers(read_captioned(str(where)))
        assert [*found.values()] == [[said], [said] * 2]
    (tmp_path / "more.csv").write_text("image,caption\n")
    (tmp_path / "others.csv").write_text("image,caption\n")
    with pytest.raises(UserError, match=r"tables \(.*: name one of them\."):
        read_captioned(str(tmp_path))


def test_kinds_that_are_no_captions_are_named(tmp_path):
    put(tmp_path, "1.jpg", "2.jpg")
    question = {"image_id": 1, "question_id": 1}
    for content, said in (
        ({"annotations": [question | {"answers": []}]}, "VQA's answers alone"),
        ({"questions": [question | {"question": "What?"}]}, "VQA's questions alone"),
    ):
        (tmp_path / "d.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=said):
            read_captioned(str(tmp_path / "d.json"))
    with pytest.raises(UserError, match="names pictures, not shards"):
        read_captioned(str(tmp_path / "*.jpg"))
    caption = {"image_id": "1", "caption_str": "A dog."}
    (tmp_path / "d.json").write_text(json.dumps({"data": [caption]}))
    assert answers(read_captioned(str(tmp_path))) == {"1.jpg": ["A dog."]}
    (tmp_path / "d.json").rename(tmp_path / "d.jsonl")
    rows = [{"file_names": names, "text": "A dog."} for names in (["1.jpg"], ["1.jpg", "2.jpg"])]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert answers(read_captioned(str(tmp_path))) == {"1.jpg": ["A dog."]}


def test_without_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setattr("minigpt4.data.huggingface.find_spec", lambda name: None)
    with pytest.raises(UserError, match="install its library first"):
        read_captioned("hf:user/name")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(UserError, match="install its library first"):
        read_captioned(str(tmp_path))
    (tmp_path / "state.json").rename(tmp_path / "00000_stats.json")  # img2dataset's Parquet files
    (tmp_path / "00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="install its library first"):
        read_captioned(str(tmp_path))


def test_a_hub_that_cannot_be_reached(monkeypatch, capsys):
    """The library's own warnings of each try are not shown."""

    def load_dataset(*_, **__):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise ConnectionError("Refused.")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("minigpt4.data.huggingface.find_spec", lambda name: True)
    shown = logging.StreamHandler(sys.stderr)
    logging.getLogger("huggingface_hub").addHandler(shown)
    with pytest.raises(UserError, match="cannot be loaded .Refused.: check its name .*connection"):
        read_captioned("hf:user/name")
    logging.getLogger("huggingface_hub").removeHandler(shown)
    assert capsys.readouterr().err == "Looking for user/name on the Hugging Face hub …\n"


def test_a_saved_dataset(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    put(tmp_path, "a.jpg", "b.jpg")
    rows = {"image": [str(tmp_path / "a.jpg"), str(tmp_path / "b.jpg")], "text": ["A dog.", None]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.save_to_disk(str(tmp_path / "saved"))
    (example,) = read_captioned(str(tmp_path / "saved"))
    assert example.captions == ("A dog.",) and example.picture().size == (60, 44)
    assert "1 without a caption (row 1)" in capsys.readouterr().err
    shutil.copytree(tmp_path / "saved", tmp_path / "copy")
    (copied,) = read_captioned(str(tmp_path / "copy"))
    assert (copied.key, copied.version) == (example.key, example.version) and copied.version
    (tmp_path / "hub" / "data").mkdir(parents=True)
    table.to_parquet(str(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet"))
    (example,) = read_captioned(str(tmp_path / "hub"))
    assert example.captions == ("A dog.",) and example.picture().size == (60, 44)
    for limit, what in ((None, "downloaded"), (1, "streamed")):  # by its name: a folder's serves
        (example,) = read_captioned(f"hf:{tmp_path / 'hub'}", limit=limit)
        assert example.captions == ("A dog.",) and example.picture().size == (60, 44), what


def test_kinds_of_columns_of_pictures(tmp_path, capsys):
    """Lists, bytes, and names of files beside; of two columns the one that is called a picture."""
    datasets = pytest.importorskip("datasets")
    put(tmp_path, "a.jpg", "b.jpg")
    first, second = ((tmp_path / name).read_bytes() for name in ("a.jpg", "b.jpg"))
    coded, images = {"bytes": first, "path": None}, datasets.Image()
    text = {"text": ["A dog."] * 3}
    kinds = {
        "list": ({"images": [[coded], [coded] * 2, None]}, {"images": datasets.List(images)}),
        "bytes": ({"image": [first, None, None]}, {"image": datasets.Value("binary")}),
        "img2dataset": ({"jpg": [first, None, None]}, {"jpg": datasets.Value("binary")}),
        "name": ({"file_name": ["a.jpg", None, None]}, {"file_name": datasets.Value("string")}),
        "two": (
            {"mask": [{"bytes": second, "path": None}] * 3, "image": [coded, None, None]},
            {"mask": images, "image": images},
        ),
        "odd": ({"x": [coded] * 3, "y": [coded] * 3}, {"x": images, "y": images}),
    }
    for name, (rows, features) in kinds.items():
        features = datasets.Features(features | {"text": datasets.Value("string")})
        folder = tmp_path / name
        put(folder, "a.jpg")
        datasets.Dataset.from_dict(rows | text, features=features).to_parquet(folder / "a.parquet")
        if name == "odd":
            with pytest.raises(UserError, match="several columns of pictures: .*x, y, text.* Ren"):
                read_captioned(str(folder))
            continue
        (example,) = read_captioned(str(folder))
        assert example.read() == first and "2 left out" in capsys.readouterr().err
    assert example.captions == ("A dog.",)
    addresses = datasets.Dataset.from_dict({"URL": ["http://a/b.jpg"], "TEXT": ["A dog."]})
    addresses.to_parquet(tmp_path / "laion.parquet")
    with pytest.raises(UserError, match="only names addresses of pictures: download them with"):
        read_captioned(str(tmp_path))
    with pytest.raises(UserError, match="pictures of .*name are texts .*file_name: save them as"):
        read_captioned(f"hf:{tmp_path / 'name'}")  # not those of the current folder
    row = {"image": [{"bytes": None, "path": "a.jpg"}], "text": ["A dog."]}
    features = datasets.Features({"image": images, "text": datasets.Value("string")})
    (tmp_path / "path").mkdir()
    table = datasets.Dataset.from_dict(row, features=features).data.table
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "path" / "a.parquet")
    (example,) = read_captioned(f"hf:{tmp_path / 'path'}")
    with pytest.raises(UserError, match="Row 0 only names its picture, a.jpg"):
        example.read()


def test_pictures_are_counted_in_lists_of_each_kind():
    pa = pytest.importorskip("pyarrow")
    content = pa.binary()
    for kind in (pa.list_(content), pa.large_list(content), pa.list_(content, 2)):
        batch = {"c": pa.chunked_array([pa.array([[b"x", b"y"], None], kind)])}
        assert _pictures_in_rows(SimpleNamespace(iter=lambda n, b=batch: [b]), "c") == [2, 0]


def test_damaged_data_sets_of_the_library(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="cannot be loaded .*check that its files are complete"):
        read_captioned(str(tmp_path))
    with pytest.raises(UserError, match="Name the data set"):
        read_captioned("hf:")
