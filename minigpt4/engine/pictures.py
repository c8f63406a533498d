"""Pictures on their way through the visual encoder, and the embeddings of those already encoded.

Embeddings are kept by the picture's content, in memory and on disk: a picture is encoded only once,
whoever uploads it.
"""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minigpt4.data.files import replacing
from minigpt4.engine.decoder import empty_cache
from minigpt4.errors import UserError, out_of_memory
from minigpt4.model.image import Encoded, Picture

if TYPE_CHECKING:
    from minigpt4.model.minigpt4 import MiniGPT4

TOGETHER = 4  # encoded in one batch
KEPT = 256  # embeddings in memory, the most recently used: 60 KB each for nano
_SAMPLE = 1024  # numbers of each weight that enter the fingerprint


class Pictures:
    """Any thread may request a picture; one thread of the owner encodes (on a GPU, in a stream of
    its own).

    explain: exception of the encoder -> the error that a user sees. store: also keeps embeddings on
    disk.
    """

    def __init__(
        self,
        model: "MiniGPT4",
        explain: Callable[[Exception], UserError],
        store: "EmbeddingStore | None" = None,
    ) -> None:
        self._model, self._explain, self._store = model, explain, store
        self._lock = threading.Lock()
        self._requested: OrderedDict[str, tuple[Picture, Future]] = OrderedDict()
        self._encoded: OrderedDict[str, Encoded] = OrderedDict()

    def is_waiting(self) -> bool:
        """Is there anything to encode?"""
        return bool(self._requested)

    def find(self, key: str) -> Encoded | None:
        """The picture's embeddings, None if it is not encoded yet."""
        with self._lock:
            return self._find(key)

    def _find(self, key: str) -> Encoded | None:
        if key not in self._encoded and self._store and key not in self._requested:
            stored = self._store.find(key)
            if stored is not None:
                self._remember(key, Encoded(stored))
        if key in self._encoded:
            self._encoded.move_to_end(key)
        return self._encoded.get(key)

    def request(self, picture: Picture) -> Future[Encoded]:
        """A future of the picture's embeddings, or of a UserError; it is done at once, or after
        `encode_some`."""
        with self._lock:
            encoded = self._find(picture.key)
            if encoded is None:
                return self._requested.setdefault(picture.key, (picture, Future()))[1]
        known: Future[Encoded] = Future()
        known.set_result(encoded)
        return known

    def encode_some(self, count: int = TOGETHER) -> None:
        """Encode the up to `count` pictures that have waited longest, and set their futures."""
        with self._lock:
            pictures = [self._requested[key][0] for key in list(self._requested)[:count]]
        if not pictures:
            return
        # All in one batch; if that fails, one by one, so that a bad picture fails alone.
        outcomes = self._encode_together(pictures) or map(self._encode_alone, pictures)
        pairs = list(zip(pictures, outcomes, strict=True))
        futures = []
        with self._lock:
            for picture, outcome in pairs:
                futures.append(self._requested.pop(picture.key, (picture, Future()))[1])
                if not isinstance(outcome, UserError):
                    self._remember(picture.key, outcome)
        # Without the lock: the futures' callbacks may request pictures.
        for future, (_, outcome) in zip(futures, pairs, strict=True):
            if isinstance(outcome, UserError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    def _encode_together(self, pictures: list[Picture]) -> list[Encoded] | None:
        """The embeddings, None if encoding fails. The exception is dropped: it holds tensors."""
        try:
            return self._finite(pictures)
        except Exception as error:
            short = out_of_memory(error)
        if short:
            empty_cache(self._model.device)
        return None

    def _encode_alone(self, picture: Picture) -> Encoded | UserError:
        try:
            return self._finite([picture])[0]
        except Exception as error:
            return self._explain(error)

    def _finite(self, pictures: list[Picture]) -> list[Encoded]:
        """The embeddings. ArithmeticError if they are not finite: these are never used.

        They are on the host, so the GPU's stream has finished with them.
        """
        outcomes = list(self._model.encode_pictures([picture.rgb for picture in pictures]))
        if not all(np.isfinite(encoded.embeds).all() for encoded in outcomes):
            raise ArithmeticError("the encoder's embeddings are not finite")
        if self._store:
            for picture, encoded in zip(pictures, outcomes, strict=True):
                self._store.keep(picture.key, encoded.embeds)
        return outcomes

    def _remember(self, key: str, encoded: Encoded) -> None:
        self._encoded[key] = encoded
        while len(self._encoded) > KEPT:
            self._encoded.popitem(last=False)

    def fail_all(self, error: UserError) -> None:
        """Give all pictures that wait this error."""
        with self._lock:
            futures = [future for _, future in self._requested.values()]
            self._requested.clear()
        for future in futures:
            future.set_exception(error)


# --- on disk --------------------------------------------------------------------------------------


class EmbeddingStore:
    """A folder of embeddings, float32 [image_tokens, llm_hidden_size] each, of all models.

    A file's name consists of hashes of the model's weights and of the picture's content: nothing
    else of a picture is stored. The least recently used are deleted if the folder outgrows its
    limit. A folder that cannot be used, and a damaged file, count as empty.
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
        """Store the embeddings, and delete old ones above the limit."""
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
    """A hash of some numbers of each weight that embeddings depend on, and of their precision."""
    found = hashlib.sha256(repr((model.config.name, model.config.vision)).encode())
    for part in (model.encoder, model.bridge, model.projection):
        for name, weight in part.state_dict().items():
            numbers = weight.flatten()
            sample = numbers[:: max(1, len(numbers) // _SAMPLE)].float().cpu().numpy()
            found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            found.update(sample.tobytes())
    return found.hexdigest()
