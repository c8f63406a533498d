"""Batches of a step: order, crops, prompts, the published clean-up of captions."""

import math
import random
import re
from collections.abc import Iterator, Sequence

from PIL import Image

from minigpt4.data.examples import Text
from minigpt4.errors import UserError
from minigpt4.model.minigpt4 import MiniGPT4
from minigpt4.model.prompt import ImageRef, Prompt, encode_training

PUBLISHED_STAGE1_END = "\n"  # default of `end_sym` in the published configuration


def batches(count: int, size: int, seed: int, start: int = 0) -> Iterator[list[int]]:
    """Endless batches of `size` indices below `count`, from batch `start` on.

    Each epoch has a new order, which depends only on seed, count and size: a resumed run repeats
    it.
    """
    step = start
    per_epoch = max(1, count // size)
    while True:
        epoch, place = divmod(step, per_epoch)
        order = list(range(count))
        random.Random(f"{seed} {epoch}").shuffle(order)
        while len(order) < size:  # fewer examples than a batch: repeat them
            order += order[: size - len(order)]
        yield from (order[i * size : (i + 1) * size] for i in range(place, per_epoch))
        step = (epoch + 1) * per_epoch


def mixed_batches(
    counts: Sequence[int], sizes: Sequence[int], seed: int, start: int = 0
) -> Iterator[list[int]]:
    """Endless batches with `sizes[k]` indices from source k, which has `counts[k]` examples.

    An index counts through all sources, one after the other.
    """
    offsets = [sum(counts[:k]) for k in range(len(counts))]
    streams = [batches(c, s, seed, start) for c, s in zip(counts, sizes, strict=True) if s]
    used = [o for o, s in zip(offsets, sizes, strict=True) if s]
    while True:
        yield [o + i for o, stream in zip(used, streams, strict=True) for i in next(stream)]


def divide(size: int, weights: Sequence[float]) -> list[int]:
    """A batch of `size` divided by weights, by largest remainders.

    UserError if a data set would get no place in it.
    """
    shares = [size * weight / sum(weights) for weight in weights]
    sizes = [int(share) for share in shares]
    order = sorted(range(len(shares)), key=lambda k: sizes[k] - shares[k])
    for k in order[: size - sum(sizes)]:
        sizes[k] += 1
    if 0 in sizes:
        raise UserError(
            f"A batch of {size} pictures is too small for these weights: raise “--batch-size”, or "
            "give the rarest data set a larger weight."
        )
    return sizes


def published_caption(caption: str, max_words: int = 50) -> str:
    """The clean-up of captions in stage 1 of the published code (BLIP's caption processor)."""
    caption = re.sub(r"([.!\"()*#:;~])", " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
    return " ".join(caption.split(" ")[:max_words])


def training_prompt(
    model: MiniGPT4, ref: ImageRef, text: Text, instructions: Sequence[str], pick: float, limit: int
) -> Prompt:
    """The training prompt of one text, cut at `limit` tokens.

    instructions: for texts without their own; if this is empty, too, the text is learned as in the
    published first stage. pick: a number from 0 to 1 that chooses the instruction.
    """
    choices = text.instructions or instructions or ("",)
    instruction = choices[int(pick * len(choices))]
    config = model.config
    return encode_training(
        (ref, instruction) if instruction else (ref,),
        text.answer.strip() if instruction else published_caption(text.answer),
        config.template,
        model.tokenizer,
        config.image_tokens,
        limit,
        wrap=bool(instruction),
        end=None if instruction else PUBLISHED_STAGE1_END,
        earlier=text.earlier,
    )


def random_resized_crop(picture: Image.Image, draw: random.Random) -> Image.Image:
    """The augmentation of the published training: a random part of the picture.

    It has 50 to 100 % of the area and an aspect ratio of 3:4 to 4:3; `vision.preprocess` then
    squashes it to the encoder's size.
    """
    width, height = picture.size
    for _ in range(10):
        area = width * height * draw.uniform(0.5, 1.0)
        ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = draw.randint(0, width - w), draw.randint(0, height - h)
            return picture.crop((left, top, left + w, top + h))
    return picture
