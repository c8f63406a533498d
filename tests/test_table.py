"""One's own captions: a folder of pictures with a CSV or JSON-lines file."""

import json

import pytest

from minigpt4.__main__ import main
from minigpt4.data.table import is_table, read_table
from minigpt4.errors import UserError
from tests.training_case import picture


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.png", "sub/c.jpg"):
        picture(len(name)).save(folder / name)
    return folder


def texts(examples) -> dict[str, list]:
    return {e.key: [(t.answer, *t.instructions) for t in e.texts] for e in examples}


@pytest.mark.parametrize(
    "content",
    [
        'file_name,caption\na.jpg,"One, or ""two""\nlines."\nb.png,Three.\na.jpg, Four. \n',
        '\ufefffile_name;caption\r\na.jpg;"One, or ""two""\nlines."\r\nb.png;Three.\r\n'
        "a.jpg;Four.\r\n",
        'Image\tText\na.jpg\t"One, or ""two""\nlines."\nb\tThree.\na\tFour.\n',
    ],
    ids=["comma", "semicolon, as spreadsheets write it", "tab, names without endings"],
)
def test_csv(folder, content):
    (folder / "captions.csv").write_text(content, encoding="utf-8", newline="")
    assert is_table(folder) and is_table(folder / "captions.csv")
    for where in (folder, folder / "captions.csv"):
        found = read_table(where)
        assert texts(found) == {
            "a.jpg": [('One, or "two"\nlines.',), ("Four.",)],
            "b.png": [("Three.",)],
        }
        assert found[0].captions == ('One, or "two"\nlines.', "Four.")
        assert found[1].picture().size == (60, 44)


def test_json_lines(folder):
    rows = [
        {"file_name": "a.jpg", "captions": ["One.", "Two."]},
        {"file_name": "sub/c.jpg", "text": "Three.", "instruction": "How many?"},
        {"file_name": "a.jpg", "caption": "Four.", "instruction": ""},
    ]
    (folder / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert texts(read_table(folder)) == {
        "a.jpg": [("One.",), ("Two.",), ("Four.",)],
        "sub/c.jpg": [("Three.", "How many?")],
    }


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("c.csv", "a.jpg,One.\n", "must name the columns"),
        (
            "c.csv",
            "file_name,caption\na.jpg,One.\nz.jpg,Two.\n",
            "1 of 2 pictures .* line 3: z.jpg",
        ),
        ("c.csv", "file_name,caption\na.jpg,\n", "without a caption .line 2"),
        ("c.csv", "file_name,caption\n,One.\n", "without a picture .line 2"),
        ("c.csv", "file_name,caption\n", "no pictures with captions"),
        ("c.csv", "file_name,caption\na.jpg,A dog, wet.\n", "Line 2 .* quotes"),
        ("c.csv", 'file_name,caption\na.jpg,"A dog\nb.png,x\n', "Line 2 .* quotes"),
        ("c.csv", 'file_name,caption\na.jpg,x\nb.png,"A dog\n', "Line 3 .* quotes"),
        ("c.csv", 'sep=,\nfile_name,caption\na.jpg,"A\n"b.png","x"\n', "Line 3 .* quotes"),
        ("c.csv", f"file_name,caption\n\na.jpg,{'x ' * 70_000}\n", "Line 3 .* more than 131,072"),
        ("c.tsv", f"image\tcaption\n{'QmFz' * 40_000}\tx\n", "Line 2 .* picture inside the file"),
        ("c.csv", "file_name,caption, Caption\na.jpg,x,y\n", "column “caption” more than once"),
        ("c.jsonl", '{"caption": ' + "[" * 100_000 + "\n{}", "Line 1 .* JSON"),
        ("c.jsonl", '{\n"file_name": "a.jpg",\n"caption": "x"\n}', "name it “c.json”"),
        ("c.jsonl", '["a.jpg", "x"]', "Line 1 .* object"),
        ("c.csv", b"file_name,caption\na.jpg,gr\xfcn\n", "UTF-8"),
        ("c.jsonl", '{"file_name": "a.jpg", "caption": "One."}\n{"file\n', "Line 2 .* JSON"),
        ("c.jsonl", '{"file_name": "a.jpg"},\n{}', "Line 1 .* by itself: correct it at column 23"),
        (
            "c.jsonl",
            '{"question_id": 1, "image": "a.jpg", "text": "A dog?", "label": "no"}\n',
            "without a caption .line 1",
        ),
        (
            "c.jsonl",
            '{"file_name": "a.jpg", "captions": [7]}\n',
            "caption that is not text .line 1",
        ),
        (
            "c.jsonl",
            '{"file_name": "a.jpg", "caption": "x", "caption_2": 7}\n',
            "caption that is not text .line 1",
        ),
        (
            "c.jsonl",
            '{"file_name": ["a.jpg", "b.png"], "caption": "x"}\n',
            "several pictures .line 1",
        ),
    ],
)
def test_mistakes_are_named(folder, name, content, said):
    content = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_table(folder)


def test_quotes_and_columns_that_are_no_mistakes(folder):
    lines = [
        "id,file_name,caption,note,note",
        '1,a.jpg,"One\n\n""two"" lines",,',
        "",
        '2,b.png,"3" x,,',
    ]
    (folder / "c.csv").write_text("\n".join(lines))
    assert texts(read_table(folder)) == {"a.jpg": [('One\n\n"two" lines',)], "b.png": [('"3" x',)]}
    (folder / "c.csv").rename(folder / "c.tsv")
    (folder / "c.tsv").write_text('file_name\tcaption\n"a.jpg"\t"Stop" sign, a 12" ruler\n')
    assert texts(read_table(folder)) == {"a.jpg": [('"Stop" sign, a 12" ruler',)]}


@pytest.mark.parametrize(
    ("more", "line", "caption"),
    [
        ("", 'a.jpg,"A dog, wet" ', "A dog, wet"),
        ("", 'a.jpg,"A dog" ', "A dog"),
        ("", 'a.jpg,"A dog,\nwet" ', "A dog,\nwet"),
        ("", 'a.jpg, "A dog, wet"', "A dog, wet"),
        (",n", '"a.jpg", "A dog" , 5', "A dog"),
        (",n", 'a.jpg, "Stop" sign,"5, 6"', '"Stop" sign'),
        (",n", 'a.jpg,"A ""big"" dog" ,5', 'A "big" dog'),
        ("", '"a.jpg","A dog, and a "cat" here"', 'A dog, and a cat" here"'),
        ("", 'a.jpg\t"Stop" sign on the road', '"Stop" sign on the road'),
        ("\tm\tn", 'a.jpg\t"Stop" \t\t', "Stop"),
    ],
)
def test_lines_that_are_not_strictly_csv(folder, more, line, caption):
    mark = "\t" if "\t" in line else ","
    (folder / "c.csv").write_text(f"file_name{mark}caption{more}\n{line}\n")
    assert texts(read_table(folder)) == {"a.jpg": [(caption,)]}


@pytest.mark.parametrize("name", ["c.jsonl", "c.ndjson"])
@pytest.mark.parametrize("form", ["{}\n{}\n", "[{},\n{}]", "[{}, {}]"])
def test_json_lines_and_lists(folder, name, form):
    rows = (
        '{"file_name": "a.jpg", "caption": "One."}',
        '{"file_name": "b.png", "caption": "Two."}',
    )
    (folder / name).write_text(form.replace("{}", "%s") % rows)
    assert texts(read_table(folder)) == {"a.jpg": [("One.",)], "b.png": [("Two.",)]}


def test_two_tables_are_not_guessed_between(folder, capsys):
    (folder / "a.csv").write_text("file_name,caption\na.jpg,One.\n")
    (folder / "b.csv").write_text("file_name,caption\na.jpg,Two.\n")
    with pytest.raises(UserError, match="2 tables"):
        read_table(folder)
    assert texts(read_table(folder / "b.csv")) == {"a.jpg": [("Two.",)]}
    assert main(["train", "--stage", "1", "--data", str(folder / "sub")]) == 2
    assert "no table of captions" in capsys.readouterr().err
