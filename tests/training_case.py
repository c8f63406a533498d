"""A tiny model and tiny shards to train on; run as a program it is one process of several."""

import io
import json
import sys
import tarfile
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from minigpt4.config import Schedule
from tests.parity_case import ParityCase

PARITY = Path(__file__).parent / "parity"
SCHEDULE = Schedule(
    peak_lr=1e-2,
    floor_lr=1e-3,
    warmup_lr=1e-4,
    warmup_steps=2,
    steps=6,
    batch_size=4,
    max_text_tokens=24,
    clip_norm=1.0,
    texts_per_picture=2,
)


def jpeg(picture: Image.Image) -> bytes:
    """A picture as a JPEG file's content."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def picture(number: int) -> Image.Image:
    """A small picture that differs from number to number."""
    return Image.effect_mandelbrot((60, 44), (-2, -1.5 + 0.1 * number, 1, 1.5), 50).convert("RGB")


def write_shard(path: Path, count: int = 10, first: int = 0) -> Path:
    """A WebDataset shard: KEY.jpg and KEY.json with two captions each."""
    with tarfile.open(path, "w") as shard:
        for i in range(count):
            captions = [f"A dog number {i}.", f"{i} cats sit on {'very ' * i}red sofas"]
            record = {"caption": captions[0], "captions": captions}
            for suffix, content in (
                ("jpg", jpeg(picture(first + i))),
                ("json", json.dumps(record).encode()),
            ):
                member = tarfile.TarInfo(f"{i:05d}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    return path


def write_captioned(folder: Path, count: int = 3) -> Path:
    """Pictures beside a table of captions, two lines each."""
    folder.mkdir()
    lines = ["file_name,caption"]
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(jpeg(picture(i)))
        lines += [f"{i}.jpg,A {('dog', 'cat')[i % 2]}.", f"{i}.jpg,It runs."]
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_descriptions(folder: Path, count: int = 6) -> Path:
    """The published second-stage layout."""
    (folder / "image").mkdir(parents=True)
    annotations = []
    for i in range(count):
        (folder / "image" / f"{i}.jpg").write_bytes(jpeg(picture(i)))
        annotations.append({"image_id": str(i), "caption": f"The image shows pattern {i}."})
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
    return folder


@contextmanager
def room_for(size: int):
    """Files cannot grow above so many bytes meanwhile."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tiny_model(case: str = "vicuna_qformer_a"):
    """A parity case's model in 32 bit."""
    return ParityCase(PARITY / case).load(llm_dtype=torch.float32)


def main(shard: str, out: str) -> None:
    """One process of several: the first step's loss and gradient, saved by the first."""
    from accelerate import Accelerator

    from minigpt4.data.examples import read_shards
    from minigpt4.training.trainer import Recipe, Trainer

    accelerator = Accelerator(cpu=True)
    recipe = Recipe(SCHEDULE, ("Describe.",))
    trainer = Trainer(
        tiny_model(), read_shards(shard), recipe, Path(out).parent / "run", accelerator
    )
    loss = trainer.loss_and_gradient(0, [3, 1, 4, 9])
    if accelerator.is_main_process:
        gradients = [p.grad for p in trainer.model.projection.parameters()]
        torch.save({"loss": loss, "gradients": gradients, "world": accelerator.num_processes}, out)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
