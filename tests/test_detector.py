"""The detector answers as the graph it comes from; both encoders fit the bridge."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minigpt4.config import get_model
from minigpt4.model.bridge import PooledMapBridge
from minigpt4.model.detector import Detector
from minigpt4.model.parts import CenterNet, PooledMap
from minigpt4.model.vision import build_encoder, suitable_threads
from minigpt4.weights.checkpoint import load_strict, read_checkpoint
from minigpt4.weights.sources import WEIGHTS
from tools.detector_reference import drawn_picture

WEIGHTS = WEIGHTS / "centernet-mobilenetv3.safetensors"


@pytest.fixture(scope="module")
def detector() -> Detector:
    made = Detector(CenterNet()).eval()
    load_strict(made, read_checkpoint(WEIGHTS), WEIGHTS, "detector", torch.float32)
    return made.float()


@torch.inference_mode()
def test_the_detector_answers_as_its_graph(detector):
    expected = load_file(Path(__file__).parent / "parity" / "detector.safetensors")
    features, heat, edges = detector(drawn_picture())
    assert features.shape == expected["features"].shape
    assert (
        features - expected["features"].float()
    ).abs().max() < 0.05  # its constants are in 16 bit
    assert (heat - expected["heat"].float()).abs().max() < 0.004
    assert (edges - expected["edges"].float()).abs().max() < 0.5  # of 61 pixels
    assert expected["features"].float().std() > 0.1


@torch.inference_mode()
def test_sizes_other_than_square(detector):
    features, heat, edges = detector(torch.zeros(2, 3, 64, 160))
    assert features.shape == (2, 480, 2, 5)
    assert heat.shape == (2, 80, 16, 40) and edges.shape == (2, 4, 16, 40)


@torch.inference_mode()
def test_the_bridge_gives_what_the_projection_reads():
    config = get_model("mini")
    torch.manual_seed(0)
    encoder = build_encoder(config.vision).eval()
    bridge = PooledMapBridge(config.bridge, config.features).eval()
    pixels = torch.rand(1, 3, config.vision.image_size, config.vision.image_size) * 2 - 1
    maps = encoder(pixels)
    assert tuple(one.shape[1] for one in maps) == (*config.features.channels, 4)
    vectors = bridge(maps)
    assert vectors.shape == (1, config.image_tokens, config.projection_in)
    classes, objects = vectors[0, -2], vectors[0, -1]
    found = sum(config.features.channels)
    assert classes[found:].sum() == pytest.approx(1, abs=1e-4)
    assert not classes[:found].any() and not objects[found:].any()
    heat = maps[-2].amax((2, 3)).sqrt()[0]
    assert torch.equal(objects[found - 80 : found], heat)
    assert torch.equal(objects[: found - 80], torch.zeros(found - 80))


def test_a_mirrored_picture_has_mirrored_cells():
    """The heat of a cell is the heat of its place, not of another."""
    bridge = PooledMapBridge(PooledMap(), get_model("mini").features)
    maps = [torch.rand(1, c, 20, 20) for c in (*get_model("mini").features.channels, 4)]
    here = bridge(maps)[0, :25].unflatten(0, (5, 5))
    mirrored = bridge([one.flip(-1) for one in maps])[0, :25].unflatten(0, (5, 5))
    assert torch.allclose(mirrored.flip(1), here, atol=1e-5)


@pytest.mark.parametrize(("name", "count"), [("nano", 1), ("mini", 1), ("vicuna-7b", 2)])
def test_small_encoders_use_one_thread(name, count):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with suitable_threads(get_model(name).vision):
            assert torch.get_num_threads() == count
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
