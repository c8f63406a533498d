"""The published code's numbers are reproduced: `pytest tests/test_parity.py --parity-dir DIR`."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt4.conversation import penalized
from minigpt4.engine import Engine, Request, Sampling
from minigpt4.engine.kernels.build import library
from minigpt4.engine.native import NativeDecoder, quantize
from minigpt4.engine.scheduler import Rows
from minigpt4.model import image
from minigpt4.model.prompt import ImageRef, encode_chat, encode_training, stop_ids
from minigpt4.training.packing import Learned, pack
from minigpt4.weights.convert import make_blocks
from minigpt4.weights.gguf import BlockLlama
from tests.block_llama import as_transformers
from tests.parity_case import ParityCase

TOLERANCE = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture(scope="module")
def cases():
    """Case folder -> (case, model, pictures), each loaded once."""
    return {}


@pytest.fixture
def loaded(case_dir: Path, cases):
    if case_dir not in cases:
        case = ParityCase(case_dir)
        model = case.load(llm_dtype=torch.float32)
        cases[case_dir] = case, model, [image.load(p) for p in case.image_paths]
    return cases[case_dir]


def test_vision(loaded):
    case, model, pictures = loaded
    pixels = model.pixel_values([p.rgb for p in pictures])
    torch.testing.assert_close(pixels, case.expected["pixel_values"], **TOLERANCE)
    with torch.inference_mode():
        features = model.encoder(pixels)
        embeds = model.projection(model.bridge(features))
    torch.testing.assert_close(features, case.expected["vision_features"], **TOLERANCE)
    torch.testing.assert_close(embeds, case.expected["image_embeds"], **TOLERANCE)


def test_dialogs(loaded):
    """Token ids of every segment, context embeddings, logits, and the generated ids."""
    case, model, pictures = loaded
    engine = Engine(model)
    keys = [p.key for p in pictures]
    embeds = {p.key: torch.from_numpy(engine.encode(p).embeds) for p in pictures}
    for number, dialog in enumerate(case.case["dialogs"]):
        for i, turn in enumerate(dialog["turns"]):
            messages = case.messages(dialog, i, keys)
            config = model.config
            prompt = encode_chat(messages, config.template, model.tokenizer, config.image_tokens)
            assert segments(prompt, config.image_tokens) == turn["segment_token_ids"]

            name = f"dialog{number}_turn{i}"
            with torch.inference_mode():
                context = model.embed(prompt, embeds)
                logits = model.llm(inputs_embeds=context).logits[0, -1]
            torch.testing.assert_close(
                context, case.expected[f"{name}_context_embeds"], **TOLERANCE
            )
            torch.testing.assert_close(logits, case.expected[f"{name}_last_logits"], **TOLERANCE)

            sampling = Sampling(
                temperature=0.0,
                repetition_penalty=dialog["repetition_penalty"],
                num_beams=dialog["num_beams"],
                max_new_tokens=dialog["max_new_tokens"],
            )
            request = Request(
                prompt,
                {p.key: p for p in pictures},
                sampling,
                stop_ids(config.template, model.tokenizer),
                penalized=penalized(prompt, config.template),
            )
            stream = engine.submit(request)
            assert [1, *stream] == turn["generated_ids"]


@pytest.mark.skipif(library() is None, reason="no C compiler: install gcc")
@pytest.mark.parametrize(("kv_bits", "most"), [(16, 0.02), (8, 0.3)])
def test_dialogs_in_4_bit(loaded, kv_bits, most, tmp_path, monkeypatch):
    """The kernels compute what the 4-bit weights say: root mean square of the logits' difference to
    the same weights in float32, in standard deviations. Random weights exaggerate what is rounded,
    so the published logits are only correlated."""
    case, _, _ = loaded
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(tmp_path))
    llm = shutil.copytree(case.folder / "llm", tmp_path / "llm")
    llama = BlockLlama.open(make_blocks(case.config, llm, quantize, 2, lambda *_, **__: None))
    decoder, exact = NativeDecoder(llama, 2048, 128, 2, kv_bits=kv_bits), as_transformers(llama)
    for name, context in case.expected.items():
        if not name.endswith("_context_embeds"):
            continue
        published = case.expected[name.replace("context_embeds", "last_logits")].numpy()
        places = np.arange(context.shape[1], dtype=np.int32)
        table = np.arange(128, dtype=np.int32)[None]
        rows = Rows(-1 - places, context[0].numpy(), places, 0 * places, table, places[-1:])
        found = decoder.forward(rows)[0]
        with torch.inference_mode():
            expected = exact(inputs_embeds=context).logits[0, -1].numpy()
        assert ((found - expected) ** 2).mean() ** 0.5 < most * expected.std()
        assert np.corrcoef(found, published)[0, 1] > 0.4
    decoder.close()


def segments(prompt, image_tokens: int) -> list[list[int]]:
    """The prompt's token ids, cut where pictures stand."""
    result, start = [], 0
    for position, _ in prompt.images:
        result.append(prompt.ids[start:position])
        start = position + image_tokens
    return [*result, prompt.ids[start:]]


def test_training(loaded):
    """Loss and the projection's gradient.

    `wrapped_prompt` is what the published code put around the image in that run: where it is
    empty, the sequence was beginning-of-sequence, image embeddings, answer, whatever `prompt` says.
    """
    case, model, pictures = loaded
    config = model.config
    for number, sample in enumerate(case.case["training"]):
        refs = [ImageRef(pictures[i].key) for i in sample["images"]]
        wrapped = bool(sample["wrapped_prompt"])
        instruction = (sample["prompt"] or "").removeprefix("<Img><ImageHere></Img> ")
        prompts = [
            encode_training(
                (ref, instruction) if instruction else (ref,),
                answer,
                config.template,
                model.tokenizer,
                config.image_tokens,
                sample["max_txt_len"],
                wrap=wrapped,
            )
            for ref, answer in zip(refs, sample["answers"], strict=True)
        ]
        with torch.no_grad():
            chosen = [pictures[i].rgb for i in sample["images"]]
            features = model.encode_features(model.pixel_values(chosen))
        model.projection.requires_grad_(True)
        loss = model.training_loss(features, pack([[Learned(p)] for p in prompts]))
        (gradient,) = torch.autograd.grad(loss, [model.projection.weight])
        model.projection.requires_grad_(False)
        torch.testing.assert_close(loss.item(), sample["loss"], **TOLERANCE)
        expected = case.expected[f"train{number}_proj_weight_grad"]
        torch.testing.assert_close(gradient, expected, **TOLERANCE)
