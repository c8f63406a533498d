"""Sources of a model's weight files: places on this machine, and downloads. No torch."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from minigpt4 import _data
from minigpt4.config import ModelConfig, Source
from minigpt4.errors import UserError

WEIGHTS = _data.folder("weights")  # the projections trained here
PARTS = ".parts"  # within the weights folder: incomplete downloads
ROLES = ("vision", "detector", "words", "qformer", "llm", "projection")
_HUB = re.compile(r"(?P<ref>(spaces/)?[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<member>[\w./-]+))?")
_FILES = (".gguf", ".pth", ".pt", ".bin", ".safetensors")  # how weight files' names end
_UNNAMED = (
    "There is no file {place} here; if you mean a Hugging Face repository, name the file in it: "
    "“--{role} {place}:FILE”."
)


def weights_folder() -> Path:
    """The folder in which fetched weights are kept.

    $MINIGPT4_WEIGHTS; or else `weights/` of the checkout that this package is in; or else, if the
    package is installed, `weights` in the user's cache folder.
    """
    if own := os.environ.get("MINIGPT4_WEIGHTS"):
        return Path(own).expanduser()
    if not _data.INSTALLED:
        return WEIGHTS
    return _data.cache_folder() / "weights"


def mark_of(files: Sequence[Path], *others: object) -> str:
    """A part for a name that changes with these files (by name, size and time) and with
    `others`."""
    facts = [(file.name, (s := file.stat()).st_size, s.st_mtime_ns) for file in files]
    return hashlib.sha256(repr((facts, *others)).encode()).hexdigest()[:8]


def locate(config: ModelConfig, role: str, place: str | None = None) -> Path | None:
    """The local file or folder for this role; None if it must be fetched.

    place: the user's own instead of the model's: a path, the name of a projection that comes with
    this package, or the source that it was fetched from.
    """
    if place and (path := local_place(place)):
        return path
    for name in _names(config, role, place):
        for folder in (weights_folder(), WEIGHTS):
            if (folder / name).exists():
                return folder / name
    return None


def local_place(place: str) -> Path | None:
    """The local file or folder that the user's `place` names."""
    candidates = Path(place).expanduser(), WEIGHTS / place
    return next((path for path in candidates if path.exists()), None)


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
    """The sources of a part, in order of preference.

    UserError if `place` is neither a path, an address nor a repository.
    """
    if not place:
        own = config.files.get(role)
        return (own, *own.mirrors) if own else ()
    if re.match(r"https?://", place):
        return (Source("url", place),)
    found = _HUB.fullmatch(place)
    if not found:
        raise UserError(f"There is no file or folder {place} for “--{role}”: check the path.")
    source = Source("hub", found["ref"], found["member"] or "")
    if not source.member and (role == "projection" or place.endswith(_FILES)):
        raise UserError(_UNNAMED.format(place=place, role=role))
    if role in ("vision", "qformer") and not source.member:
        return (replace(source, tensors=_wanted_tensors(config, role, place)),)
    return (source,)


def _wanted_tensors(config: ModelConfig, role: str, place: str) -> tuple[str, ...]:
    """The tensors that this role needs from a complete repository, as for the model's mirror."""
    own = config.files.get(role)
    for mirror in own.mirrors if own else ():
        if mirror.tensors:
            return mirror.tensors
    raise UserError(_UNNAMED.format(place=place, role=role))


def file_name(config: ModelConfig, role: str, source: Source, place: str | None = None) -> str:
    """The name in the weights folder for the file or folder that is fetched from `source`."""
    if role == "llm":
        name = f"{config.name}-llm"
    elif source.tensors:
        name = f"{source.ref.rsplit('/', 1)[-1]}-{role}.safetensors"
    else:
        name = source.file_name
    if role == "projection":  # two tensors are kept of a training checkpoint
        name = f"{Path(name).stem}.safetensors"
    if place:  # the user's own, which must not be mistaken for the model's
        mark = hashlib.sha256(place.encode()).hexdigest()[:8]
        name = f"{Path(name).stem}-{mark}{Path(name).suffix if role != 'llm' else ''}"
    return name
