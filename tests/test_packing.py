"""Packed training sequences give the loss and gradient that their prompts give alone."""

from pathlib import Path

import pytest
import torch

from minigpt4.model.prompt import ImageRef, encode_training
from minigpt4.training.packing import Learned, pack
from tests.parity_case import ParityCase


@pytest.fixture(scope="module")
def model():
    case = ParityCase(Path(__file__).parent / "parity" / "vicuna_qformer_a")
    return case.load(llm_dtype=torch.float32)


def prompts_of(model, key: str, texts: list[tuple[str, str]]):
    config = model.config
    return [
        Learned(
            encode_training(
                (ImageRef(key), question),
                answer,
                config.template,
                model.tokenizer,
                config.image_tokens,
                max_text_tokens=40,
            )
        )
        for question, answer in texts
    ]


def loss_and_gradient(model, features, rows):
    model.projection.requires_grad_(True)
    loss = model.training_loss(features, pack(rows))
    gradients = torch.autograd.grad(loss, list(model.projection.parameters()))
    model.projection.requires_grad_(False)
    return loss.detach(), gradients


def test_packed_is_as_alone(model):
    """Five texts of two pictures: two packed rows against five rows of their own."""
    torch.manual_seed(0)
    features = torch.randn(2, model.config.image_tokens, model.config.projection_in)
    first = prompts_of(
        model,
        "a",
        [("Describe.", "A cat."), ("Describe.", "A cat sits."), ("Why?", "A cat. It sleeps.")],
    )
    second = prompts_of(model, "b", [("Describe.", "A dog."), ("Describe.", "A dog.")])
    packed = loss_and_gradient(model, features, [first, second])
    repeated = features[[0] * len(first) + [1] * len(second)]
    alone = loss_and_gradient(model, repeated, [[p] for p in first + second])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_packing_saves_what_is_shared(model):
    rows = prompts_of(model, "a", [("Describe.", f"A cat and {n} dogs.") for n in "12345"])
    batch = pack([rows])
    assert batch.ids.shape[1] < 0.5 * sum(len(p.prompt) for p in rows)
    assert len(batch.targets) == sum(sum(p.prompt.loss_mask) for p in rows)
    assert len(batch.image_rows) == 1


def test_other_pictures_never_merge(model):
    rows = prompts_of(model, "a", [("Why?", "Yes.")]) + prompts_of(model, "b", [("Why?", "Yes.")])
    batch = pack([rows])
    assert len(batch.image_rows) == 2
