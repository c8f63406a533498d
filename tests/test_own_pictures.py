"""From pictures to a model that has learned of them, by the commands of the docs, at small size."""

import csv
import shutil
from importlib import resources
from pathlib import Path

import pytest
from PIL import Image

from minigpt4 import start
from minigpt4.__main__ import main
from minigpt4.config import get_model
from minigpt4.curation.export import chosen
from minigpt4.curation.records import Records, read_records
from minigpt4.curation.review import Review
from minigpt4.data.examples import read_descriptions
from minigpt4.engine import Engine
from minigpt4.model import image
from minigpt4.weights.load import find_weights, load_model
from tests.api_case import served
from tests.docs_case import commands

ROOT = Path(__file__).parent.parent
DRAWN = ROOT / "minigpt4" / "evaluation" / "suite"
SMALL = ["--steps", "4", "--batch-size", "2", "--peak-lr", "0.02", "--device", "cpu"]
SHORT = ["--temperature", "0", "--max-new-tokens", "12"]
STYLE = "In this little picture, painted in water colours, we see this:"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder, and no endpoint named."""
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def make_pictures(folder: Path, count: int) -> list[Path]:
    """Small pictures: this project's drawings, gradio's photographs, and their halves."""
    folder.mkdir()
    brought = resources.files("gradio") / "media_assets" / "images"
    sources = [*sorted(DRAWN.glob("*.jpg")), *(brought / f"{n}.jpg" for n in ("lion", "tower"))]
    whole = [image.load(str(source)).rgb for source in sources]
    for picture in whole:
        picture.thumbnail((320, 320))
    halves = [p.crop((0, 0, p.width // 2, p.height)) for p in whole]
    pictures = [*whole, *halves][:count]
    assert len(pictures) == count
    for number, picture in enumerate(pictures, 1):
        picture.save(folder / f"{number:03d}.jpg")
    return sorted(folder.iterdir())


def said(capsys, arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 0, capsys.readouterr().err
    return capsys.readouterr().out.strip()


def test_from_twelve_pictures_to_another_answer(place, capsys):
    """docs/curation.md: generate, refine at our own endpoint, filter, review, merge, export,
    train, ask. The review stands in for two people at the page, which has tests of its own."""
    make_pictures(place / "photos", 12)
    steps = commands("curation.md")
    names = [c[1] if c[0] == "curate" else c[0] for c in steps]
    expected = ["generate", "refine", "filter", "review", "review", "merge", "export"]
    assert names == [*expected, "train", "ask"]
    generate, refine, sieve, ann, bob, merge, export, train, ask = steps

    assert main([*generate, *SHORT, "--continues", "0"]) == 0
    assert len(read_records("set/generated.jsonl")) == 12
    config = get_model("nano")
    quantize = start.quantize_of("auto", config, start.device_of("cpu"))
    engine = Engine(load_model(config, find_weights(config), quantize=quantize))
    with served(lambda: engine, engine) as address:
        assert main([a.replace("http://127.0.0.1:7860", address) for a in refine]) == 0
    engine.close()
    assert all("refined" in r for r in read_records("set/refined.jsonl").values())
    loose = ["--min-words", "3", "--max-repeated", "0.5", "--max-similarity", "1"]
    assert main([*sieve, *loose]) == 0
    kept = chosen(read_records("set/filtered.jsonl").values())
    assert 2 < len(kept) <= 12

    for command, reviewer in ((ann, "ann"), (bob, "bob")):
        with Records(command[command.index("--out") + 1]) as records:
            review = Review(kept, records, reviewer)
            while image_id := review.next():
                first = review.place(image_id) == 1
                review.decide(image_id, first, f"{STYLE} {review.text(image_id)}")
    assert '"kappa": 1.0' in said(capsys, merge)
    assert main(export) == 0
    examples = read_descriptions("set/stage2")
    assert len(examples) == len(kept) - 1
    assert all(e.texts[0].answer.startswith(STYLE) for e in examples)

    plain = [*ask[: ask.index("--projection")], "--projection", train[train.index("--init") + 1]]
    before = said(capsys, [*plain, *SHORT])
    assert main([*train, *SMALL]) == 0
    with open("runs/mine/loss.csv", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0]
    after = said(capsys, [*ask, *SHORT])
    assert before and after and before != after


def test_own_captions(place, capsys):
    """docs/own-data.md, with four pictures and few steps."""
    paths = make_pictures(place / "my-pictures", 4)
    with open("my-pictures/captions.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "caption"])
        table.writerows((p.name, f"{STYLE} number {p.stem}.") for p in paths)
    before, train, after, again = commands("own-data.md")
    assert [c[0] for c in (before, train, after, again)] == ["ask", "train", "ask", "train"]
    first = said(capsys, [*before, *SHORT])
    assert main([*train, *SMALL]) == 0
    assert first != said(capsys, [*after, *SHORT])
    assert Image.open("runs/mine/loss.png").width > 100
    shutil.copytree("my-pictures", "captioned")  # what is mixed in
    assert main([*again, *SMALL, "--steps", "2"]) == 0
    assert Path("runs/mixed/nano.safetensors").is_file()
