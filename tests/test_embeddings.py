"""Embeddings kept on disk: found by another engine, never for other weights, within the limit."""

import io
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from minigpt4 import start
from minigpt4.__main__ import main
from minigpt4.config import get_model
from minigpt4.engine.pictures import EmbeddingStore, Pictures
from minigpt4.errors import UserError
from minigpt4.model.image import Encoded, hold
from minigpt4.model.parts import EvaViT

SHAPE = 32, 4096  # of vicuna-7b


class Model:
    """Counts what it encodes."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.config = get_model("vicuna-7b")
        self.device = torch.device("cpu")
        self.encoder, self.bridge, self.projection = (nn.Linear(30, 5) for _ in range(3))
        self.encoded = 0

    def encode_pictures(self, pictures) -> list[Encoded]:
        self.encoded += len(pictures)
        return [Encoded(np.full(SHAPE, np.asarray(p).mean(), np.float32)) for p in pictures]


def picture(shade: int):
    return hold(Image.new("RGB", (4, 4), (shade,) * 3), f"{shade:064x}")


def encode(pictures: Pictures, it) -> np.ndarray:
    future = pictures.request(it)
    pictures.encode_some(1)
    return future.result().embeds


def opened(folder, model, megabytes: int = 200) -> Pictures:
    return Pictures(model, lambda error: UserError("x"), EmbeddingStore(folder, model, megabytes))


def test_the_next_program_finds_them(tmp_path):
    first, second, other = Model(), Model(), Model(seed=1)
    expected = encode(opened(tmp_path / "e", first), picture(9))
    found = encode(opened(tmp_path / "e", second), picture(9))
    assert np.array_equal(found, expected) and (first.encoded, second.encoded) == (1, 0)
    encode(opened(tmp_path / "e", other), picture(9))  # other weights
    encode(opened(tmp_path / "e", second), picture(8))  # another picture
    assert (other.encoded, second.encoded) == (1, 1)
    assert (tmp_path / "e").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("end", ["encode_some", "fail_all"])
def test_who_waits_is_told_without_the_lock(tmp_path, end):
    pictures, found, at_once = opened(tmp_path, Model()), [], []

    def look(_):
        other = threading.Thread(target=lambda: found.append(pictures.find("x")))
        other.start()
        other.join(2)
        at_once.extend(found)

    pictures.request(picture(9)).add_done_callback(look)
    getattr(pictures, end)(1 if end == "encode_some" else UserError("x"))
    assert at_once == [None]


def test_other_precision_is_another_model(tmp_path):
    model = Model()
    encode(opened(tmp_path, model), picture(9))
    model.encoder.bfloat16()
    encode(opened(tmp_path, model), picture(9))
    assert model.encoded == 2


def test_the_folder_keeps_its_limit(tmp_path):
    """Those used longest ago go first: 0.5 MB each, 2 MB in all."""
    model = Model()
    for shade in range(1, 4):
        encode(opened(tmp_path, model, 2), picture(shade))
    for age, path in enumerate(sorted(tmp_path.iterdir(), key=lambda p: p.stat().st_mtime_ns)):
        os.utime(path, (1000 + age, 1000 + age))
    encode(opened(tmp_path, model, 2), picture(1))  # used again
    encode(opened(tmp_path, model, 2), picture(4))
    assert len(list(tmp_path.iterdir())) == 3
    count = model.encoded
    encode(opened(tmp_path, model, 2), picture(1))
    encode(opened(tmp_path, model, 2), picture(4))
    assert model.encoded == count
    encode(opened(tmp_path, model, 0), picture(5))
    assert not list(tmp_path.iterdir())


def claiming(*shape: int) -> bytes:
    """The header of a file that says that this much follows."""
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", bytes(500), claiming(2**40, 4096)])
def test_a_damaged_file_counts_as_none(tmp_path, content):
    model = Model()
    encode(opened(tmp_path, model), picture(9))
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    assert encode(opened(tmp_path, model), picture(9)).mean() == 9 and model.encoded == 2
    np.save(file.open("wb"), np.full(SHAPE, np.nan, np.float32))
    encode(opened(tmp_path, model), picture(9))
    np.save(file.open("wb"), np.zeros((1, 2), np.float32))
    encode(opened(tmp_path, model), picture(9))
    assert model.encoded == 4


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    assert encode(opened(tmp_path / "file", Model()), picture(9)).mean() == 9


def test_for_slow_encoders_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert start._embedding_store(Model(), 1) is not None
    nano = SimpleNamespace(config=get_model("nano"), device=torch.device("cpu"))
    assert not isinstance(nano.config.vision, EvaViT) and start._embedding_store(nano, 1) is None
    monkeypatch.setenv("MINIGPT4_EMBEDDINGS_MB", "lots")
    with pytest.raises(SystemExit):
        main(["chat"])
    assert "MINIGPT4_EMBEDDINGS_MB must be an integer from 0" in capsys.readouterr().err
