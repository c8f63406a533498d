"""Where the weight files of a model are, or can be fetched. Nothing here imports torch."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from minigpt4.config import ModelConfig, Source
from minigpt4.errors import UserError
from minigpt4.weights.gguf import INDEX

REPOSITORY_WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
ROLES = ("vision", "detector", "words", "qformer", "llm", "projection")
_HUB = re.compile(r"(?P<ref>(spaces/)?[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<member>[\w./-]+))?")


def weights_folder() -> Path:
    """Where weights are kept: $MINIGPT4_WEIGHTS, else the repository's `weights/`."""
    return Path(os.environ.get("MINIGPT4_WEIGHTS") or REPOSITORY_WEIGHTS)


def locate(config: ModelConfig, role: str, place: str | None = None) -> Path | None:
    """The file or folder that has this role, where it is here; None where it must be fetched.

    place: the user's own, for this model's: a path, or from where it was fetched.
    """
    if place and Path(place).expanduser().exists():
        return Path(place).expanduser()
    for name in _names(config, role, place):
        for folder in (weights_folder(), REPOSITORY_WEIGHTS):
            if (folder / name).exists() and not _is_old(config, role, folder / name):
                return folder / name
    return None


def _is_old(config: ModelConfig, role: str, path: Path) -> bool:
    """Was it fetched before the GGUF file itself was kept?"""
    blocks = role == "llm" and "llm" in config.files and config.files["llm"].member
    return bool(blocks) and not (path / INDEX).exists()


def missing(config: ModelConfig, given: Mapping[str, str]) -> list[str]:
    """The roles that must be fetched; given: role -> the user's own place for it."""
    roles = [r for r in ROLES if r in config.files or (r == "projection" and given.get(r))]
    return [role for role in roles if locate(config, role, given.get(role)) is None]


def _names(config: ModelConfig, role: str, place: str | None) -> Iterator[str]:
    for source in sources(config, role, place):
        yield file_name(config, role, source, place)
    if role == "projection" and not place:
        yield config.projection_file


def sources(config: ModelConfig, role: str, place: str | None = None) -> tuple[Source, ...]:
    """Where to fetch it, the first choice first. UserError where `place` makes no sense."""
    if not place:
        own = config.files.get(role)
        return (own, *own.mirrors) if own else ()
    if re.match(r"https?://", place):
        return (Source("url", place),)
    found = _HUB.fullmatch(place)
    if not found:
        raise UserError(f"There is no file or folder {place} for “--{role}”: check the path.")
    source = Source("hub", found["ref"], found["member"] or "")
    if role in ("vision", "qformer") and not source.member:
        own = config.files[role]
        return (replace(source, tensors=next(m.tensors for m in own.mirrors if m.tensors)),)
    if role == "projection" and not source.member:
        raise UserError(
            f"There is no file {place} here; if you mean a Hugging Face repository, name the file "
            f"in it: “--projection {place}:FILE”."
        )
    return (source,)


def file_name(config: ModelConfig, role: str, source: Source, place: str | None = None) -> str:
    """What a thing fetched from `source` is called in the weights folder."""
    if role == "llm":
        name = f"{config.name}-llm"
    elif source.tensors:
        name = f"{source.ref.rsplit('/', 1)[-1]}-{role}.safetensors"
    else:
        name = (source.member or source.ref).rsplit("/", 1)[-1]
    if role == "projection":  # two tensors are kept of a training checkpoint
        name = f"{Path(name).stem}.safetensors"
    if place:  # another than the model's own, which it must not be taken for
        mark = hashlib.sha256(place.encode()).hexdigest()[:8]
        name = f"{Path(name).stem}-{mark}{Path(name).suffix if role != 'llm' else ''}"
    return name
