"""Image embeddings kept on disk by the picture's content, so that none is encoded twice."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minigpt4.data.files import replacing

if TYPE_CHECKING:
    from minigpt4.model.minigpt4 import MiniGPT4

_SAMPLE = 1024  # numbers of each weight that tell one model from another


class EmbeddingStore:
    """A folder of embeddings, float32 [image_tokens, llm_hidden_size] each, of all models.

    A file's name is that of the model's weights and of the picture's content: nothing else of a
    picture is stored. Those used longest ago are deleted where the folder outgrows its limit. A
    folder that cannot be used, and a damaged file, count as empty.
    """

    def __init__(self, folder: Path, model: "MiniGPT4", megabytes: int = 200) -> None:
        self._folder, self._limit = folder, megabytes * 10**6
        self._mark = fingerprint_of_weights(model)
        self._shape = model.config.image_tokens, model.config.llm_hidden_size

    def _place(self, key: str) -> Path:
        name = hashlib.sha256(f"{self._mark} {key}".encode()).hexdigest()
        return self._folder / f"{name}.npy"

    def find(self, key: str) -> np.ndarray | None:
        """The embeddings of the picture with this key, or None."""
        place = self._place(key)
        try:
            embeds = np.array(np.load(place, mmap_mode="r"))  # no larger than the file
            os.utime(place)  # used now
        except (OSError, ValueError, EOFError):
            return None
        sound = embeds.dtype == np.float32 and embeds.shape == self._shape
        return embeds if sound and np.isfinite(embeds).all() else None

    def keep(self, key: str, embeds: np.ndarray) -> None:
        """Store them, and delete what has become too much."""
        place = self._place(key)
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with replacing(place, shared=True) as partial, partial.open("wb") as file:
                np.save(file, np.ascontiguousarray(embeds, np.float32), allow_pickle=False)
            self._shrink()

    def _shrink(self) -> None:
        files = sorted(
            (
                (s.st_mtime, s.st_size, path)
                for path in self._folder.iterdir()
                if (s := path.stat())
            ),
            reverse=True,
        )
        total = 0
        for _, size, path in files:
            total += size
            if total > self._limit:
                path.unlink(missing_ok=True)


def fingerprint_of_weights(model: "MiniGPT4") -> str:
    """Of all weights that embeddings depend on, by some numbers of each, and of their precision."""
    found = hashlib.sha256(repr((model.config.name, model.config.vision)).encode())
    for part in (model.encoder, model.bridge, model.projection):
        for name, weight in part.state_dict().items():
            numbers = weight.flatten()
            sample = numbers[:: max(1, len(numbers) // _SAMPLE)].float().cpu().numpy()
            found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            found.update(sample.tobytes())
    return found.hexdigest()
