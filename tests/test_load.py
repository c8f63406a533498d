"""The package in Python: load, ask, stream, chat. And the notebook that shows it."""

import copy
import json
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import ExifTags, Image

import minigpt4
from minigpt4 import conversation
from minigpt4.errors import UserError
from minigpt4.model import image
from tests.running import python

ROOT = Path(__file__).parent.parent
BEAST = str(resources.files("gradio") / "media_assets" / "images" / "cheetah1.jpg")
GREEDY = {"temperature": 0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def model():
    if not (ROOT / "weights" / "nano-llm").exists():
        pytest.skip("nano's weights are missing: python -m minigpt4 download nano")
    with minigpt4.load("nano", device="cpu") as model:
        yield model


def test_importing_the_package_imports_no_torch():
    code = "import sys, minigpt4; sys.exit(bool({'torch', 'numpy', 'PIL'} & sys.modules.keys()))"
    python("-c", code)


def test_ask_and_stream(model):
    assert model.name == "nano"
    answer = model.ask(BEAST, "What is this?", **GREEDY)
    parts = [*model.stream(BEAST, "What is this?", **GREEDY)]
    assert len(parts) > 2 and "".join(parts) == answer


def test_what_a_picture_may_be(model):
    """A path, a file's content or a picture of Pillow; several of them."""
    answer = model.ask(BEAST, "What is this?", **GREEDY)
    assert model.ask(Path(BEAST), "What is this?", **GREEDY) == answer
    assert model.ask(Path(BEAST).read_bytes(), "What is this?", **GREEDY) == answer
    with Image.open(BEAST) as picture:
        assert model.ask(picture, "What is this?", **GREEDY) == answer
    with open(BEAST, "rb") as file:
        for _ in range(2):  # from its start each time
            assert model.ask(file, "What is this?", **GREEDY) == answer
    red = Image.new("RGB", (64, 64), "red")
    chat = model.chat([BEAST, red])
    chat.ask("What is this?", **GREEDY)
    assert len(chat.conversation.pictures) == 2


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L", "P", "RGBA", "I;16", "F", "turned"])
def test_a_picture_of_pillow_is_its_file(mode, tmp_path):
    """Upright, in the same colours; and it stays as it was."""
    grey = np.linspace(0, 255, 40 * 30).reshape(30, 40)
    if mode in ("I;16", "F"):
        kinds = {"I;16": np.uint16, "F": np.float32}
        made = Image.fromarray((grey * 20).astype(kinds[mode]))
    else:
        made = Image.fromarray(grey.astype(np.uint8)).convert("RGB" if mode == "turned" else mode)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6 if mode == "turned" else 1
    path = tmp_path / ("a.tif" if mode in ("F", "CMYK") else "a.png")
    made.save(path, exif=exif)
    with Image.open(path) as opened:
        found, expected = image.convert(opened), image.load(path)
        assert found.rgb.size == ((30, 40) if mode == "turned" else (40, 30))
        assert found.key == expected.key and opened.size == (40, 30)
    assert image.convert(made).rgb.size in ((30, 40), (40, 30))


def test_mistakes_in_python(model, tmp_path):
    other = minigpt4.Model(model.engine)
    (tmp_path / "a.txt").write_text(BEAST)
    for name in (BEAST, tmp_path / "a.txt"):
        with open(name) as text, pytest.raises(UserError, match="binary mode"):
            other.ask(text, "What is this?")
    with pytest.raises(UserError, match="system prompt must be text, not “int”"):
        other.chat(BEAST, system=5)
    chat = other.chat(BEAST)
    other.engine = SimpleNamespace(close=lambda: None)
    other.close()
    with pytest.raises(UserError, match="closed: load it again"):
        chat.ask("What is this?")


def test_a_chat_remembers(model):
    chat = model.chat(BEAST, system="Be brief.")
    chat.ask("What is this?", **GREEDY)
    chat.show(Image.new("RGB", (64, 64), "red"))
    chat.ask("And this?", **GREEDY)
    messages = chat.conversation.messages
    assert [m.role for m in messages] == ["user", "assistant"] * 2
    assert [len(m.images) for m in messages] == [1, 0, 1, 0]
    assert chat.conversation.system == "Be brief."


def test_a_copy_of_a_chat_goes_on_by_itself(model):
    chat = model.chat(BEAST)
    other = copy.deepcopy(chat)
    settings = {"temperature": np.float32(0), "max_new_tokens": np.int64(4), "seed": np.int64(1)}
    assert other.ask("What is this?", **settings, top_p=None)
    assert not chat.conversation.messages and chat.ask("What is this?", **GREEDY)
    closed = minigpt4.Model(model.engine)
    failing = closed.chat(BEAST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversation, "ask", lambda *_: Ending(closed))
        with pytest.raises(UserError, match="This model is closed: load it again"):
            failing.ask("What is this?")


class Ending:
    """An answer during which the model is closed."""

    text = ""

    def __init__(self, model) -> None:
        self.model = model

    def __iter__(self):
        self.model.closed = True
        raise UserError("The program is ending.")


def test_an_answer_that_is_not_read_to_its_end(model):
    """It stops, and what came of it is remembered; a question that fails is forgotten."""
    chat = model.chat(BEAST)
    parts = chat.stream("Describe this image in detail.", temperature=0, max_new_tokens=200)
    first = next(parts)
    parts.close()
    assert chat.conversation.messages[-1].parts == (first.strip(),)
    with pytest.raises(UserError, match="question is empty"):
        chat.ask(" ")
    with pytest.raises(UserError, match="temperature"):
        chat.ask("And?", temperature=-1)
    assert len(chat.conversation.messages) == 2


def test_mistakes(model, tmp_path):
    with pytest.raises(UserError, match="nowhere.jpg"):
        model.ask("nowhere.jpg", "What is this?")
    with pytest.raises(UserError, match="no model called"):
        minigpt4.load("gpt-5")
    with pytest.raises(UserError, match="dtype must be one of"):
        minigpt4.load("nano", dtype="float8")
    with open(BEAST, "rb") as read, Image.open(BEAST) as opened:
        pass
    closed = Image.open(BEAST).copy()
    closed.close()
    for source, said in (
        ("https://example.org/a.jpg", "https:/+example.org/a.jpg is on the web: save the picture"),
        (tmp_path / "gone.jpg", f"{tmp_path}/gone.jpg does not exist"),
        ("", "name of a picture is empty"),
        (read, "file is closed: open it again"),
        (opened, "Pillow image is closed"),
        (closed, "Pillow image is closed"),
        (np.zeros((8, 8, 3), np.uint8), "not “ndarray”"),
        (None, "not “NoneType”"),
        ([[BEAST]], "not “list”"),
        (Image.new("RGB", (0, 4)), "damaged"),
    ):
        with pytest.raises(UserError, match=said):
            model.ask(source, "What is this?")
    with pytest.raises(UserError, match="question is empty"):
        model.ask(BEAST, " ")
    with pytest.raises(UserError, match="must be text, not “bytes”"):
        model.ask(BEAST, b"What is this?")
    with pytest.raises(UserError, match="no sampling option “max_tokens”: choose .*max_new_tokens"):
        model.ask(BEAST, "What is this?", max_tokens=3)


def test_a_closed_model_refuses(tmp_path):
    """`with` ends the engine's threads."""
    with minigpt4.load("nano", device="cpu", quantize="none", dtype="float32") as model:
        assert model.engine.model.llm.dtype.is_floating_point
    with pytest.raises(UserError):
        model.ask(BEAST, "What is this?")


def test_the_notebook(monkeypatch, tmp_path):
    """All of its code, in order, in an empty folder, but for the installation; less is trained."""
    if not (ROOT / "weights" / "nano-llm").exists():
        pytest.skip("nano's weights are missing: python -m minigpt4 download nano")
    path = ROOT / "notebooks" / "minigpt4.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    sources = ["".join(cell["source"]) for cell in cells]
    installing = [source for source in sources if source.startswith("%pip install")]
    assert len(installing) == 1 and "{REPOSITORY}" in installing[0]
    with pytest.raises(SystemExit, match="^Fill in REPOSITORY: "):
        exec(sources[0], {})
    sources[0] = sources[0].replace('""', '"https://example.org/minigpt4"', 1)
    script = tmp_path / "notebook.py"
    code = "\n".join(s for s in sources if s not in installing)
    long, short = "--steps 8 --batch-size 5", "--steps 2 --batch-size 2"
    assert long in code
    script.write_text(code.replace(long, short), encoding="utf-8")
    done = python(str(script), cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert (tmp_path / "run" / "nano.safetensors").exists()
    assert len(done.stdout.splitlines()) >= 5
