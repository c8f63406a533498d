"""Features of the frozen encoder and bridge; cached on disk if a folder is given."""

import hashlib
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from minigpt4.data.examples import NAMED, Example, check_share
from minigpt4.data.files import replacing
from minigpt4.errors import UserError, say
from minigpt4.model.minigpt4 import MiniGPT4
from minigpt4.training.batches import random_resized_crop
from minigpt4.weights.llm import choose_dtype

_ENCODED_AT_ONCE = 8  # pictures; more do not fit into a CPU's cache
_SAMPLED = 32  # pictures whose content is compared to tell two data sets apart
_ABANDONED = 24 * 3600  # seconds after which no run still writes an incomplete file


class Features:
    """The features of one source of examples.

    With a cache folder each picture is encoded once. The features are kept as 16-bit floats
    [examples, views, image_tokens, projection_in] in one file, whose name depends on the model,
    its weights and the pictures. View 0 is the picture, view 1 its mirror image.
    """

    def __init__(
        self,
        model: MiniGPT4,
        examples: Sequence[Example],
        views: int = 1,
        cache: Path | None = None,
        progress: bool = False,
        crop: bool = False,
    ) -> None:
        self._model = model
        self._examples = examples
        self.views = views
        self.crops = crop and cache is None
        self._stored: np.ndarray | None = None
        self._decoded: dict[int, Image.Image] = {}  # by `readable`, until they are encoded
        self.unreadable: set[int] = set()  # examples whose pictures cannot be decoded
        self._tried = self._failed = 0  # in this process
        if cache is not None and examples:
            self._stored = self._fill(cache, progress)

    def __call__(self, chosen: Sequence[tuple[int, int]], seed: str = "") -> Tensor:
        """(example, view) pairs -> features [pictures, image_tokens, projection_in].

        seed: of the random crops.
        """
        if self._stored is not None:
            rows = np.stack([self._stored[example, view] for example, view in chosen])
            return torch.from_numpy(rows).to(self._model.device)
        features = self._encode(chosen, seed)
        self._decoded.clear()
        return features

    def usable(self) -> list[int]:
        """The examples whose pictures could be decoded when they were encoded into the cache."""
        if self._stored is None:
            return list(range(len(self._examples)))
        return np.flatnonzero(~np.isnan(self._stored[:, 0, 0, 0])).tolist()

    def readable(self, indices: Sequence[int]) -> list[int]:
        """The same examples, but the next one whose picture can be decoded instead of one whose
        picture cannot.

        This depends only on the pictures, so a resumed run repeats it. UserError if too many
        cannot be decoded.
        """
        self._decoded.clear()
        return [self._next_readable(index) for index in indices]

    def _next_readable(self, index: int) -> int:
        for place in range(index, index + len(self._examples)):
            place %= len(self._examples)
            if self._is_readable(place):
                return place
        raise UserError("None of the pictures can be used: provide readable ones.")

    def _is_readable(self, index: int) -> bool:
        if index in self.unreadable:
            return False
        self._tried += index not in self._decoded
        if self._stored is not None:
            readable = not np.isnan(self._stored[index]).any()
            if not readable:
                self._leave_out(index, f"Picture {self._examples[index].key} is left out.")
            return readable
        if index not in self._decoded:
            try:
                self._decoded[index] = self._examples[index].picture()
            except UserError as error:
                self._leave_out(index, f"{error} It is left out.")
                return False
        return True

    def _leave_out(self, index: int, line: str) -> None:
        self.unreadable.add(index)
        self._failed += 1
        if len(self.unreadable) <= NAMED:
            say(line)
        check_share(len(self.unreadable), len(self._examples))
        if self._failed > NAMED:  # fail early, not after half of a large set
            check_share(self._failed, self._tried)

    def _encode(self, chosen: Sequence[tuple[int, int]], seed: str = "") -> Tensor:
        pictures = [
            self._decoded.get(example) or self._examples[example].picture() for example, _ in chosen
        ]
        if self.crops:
            draws = (random.Random(f"{seed} {example}") for example, _ in chosen)
            pictures = [random_resized_crop(p, d) for p, d in zip(pictures, draws, strict=True)]
        device = self._model.device
        # On a GPU, the encoder's weights have 16 bits anyway. On a CPU, it computes in the language
        # model's type, but in bfloat16 only if that is native: otherwise it takes 20 times as long.
        native = device.type == "cpu" and choose_dtype("auto") == torch.bfloat16
        wanted = native and self._model.torch_llm.dtype == torch.bfloat16
        fast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=wanted)
        with torch.inference_mode(), fast:
            pixels = self._model.pixel_values(pictures)
            flip = torch.tensor([view for _, view in chosen], device=device).bool()
            pixels[flip] = pixels[flip].flip(-1)
            features = self._model.encode_features(pixels)
        return features.clone()

    def _fill(self, cache: Path, progress: bool) -> np.ndarray:
        config = self._model.config
        shape = (len(self._examples), self.views, config.image_tokens, config.projection_in)
        what = [config.name, repr(config.vision), repr(config.bridge), str(shape)]
        what += [_fingerprint_of_weights(self._model), fingerprint(self._examples)]
        what += [_fingerprint_of_some(self._examples)]
        name = hashlib.sha256(" ".join(what).encode()).hexdigest()[:16]
        cache.mkdir(parents=True, exist_ok=True)
        path = cache / f"features-{config.name}-{name}.npy"
        if not path.exists():
            for left in path.parent.glob(f"{path.stem}.*.part"):  # files of runs that were killed
                if time.time() - left.stat().st_mtime > _ABANDONED:
                    left.unlink(missing_ok=True)
            with replacing(path, shared=True) as partial:
                stored = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
                self._encode_all(stored, progress)
        return np.load(path, mmap_mode="r")

    def _encode_all(self, stored: np.memmap, progress: bool) -> None:
        starts = range(0, len(self._examples), _ENCODED_AT_ONCE)
        for start in tqdm(starts, desc="encoding pictures", disable=not progress):
            numbers = range(start, min(start + _ENCODED_AT_ONCE, len(self._examples)))
            self._decoded.clear()
            usable = [number for number in numbers if self._is_readable(number)]
            for view in range(self.views if usable else 0):
                encoded = self._encode([(i, view) for i in usable])
                stored[usable, view] = encoded.half().cpu().numpy()
        self._decoded.clear()
        stored[sorted(self.unreadable)] = np.nan
        stored.flush()


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of the examples' keys, and of their files' sizes and samples, in order."""
    lines = "\n".join(f"{example.key} {example.version}" for example in examples)
    return hashlib.sha256(lines.encode("utf-8", "replace")).hexdigest()[:16]


def _fingerprint_of_some(examples: Sequence[Example]) -> str:
    """A hash of some pictures' complete content, since Hugging Face's data sets have no `version`
    of each picture."""
    found = hashlib.sha256()
    for example in examples[:: max(1, len(examples) // _SAMPLED)]:
        with suppress(UserError):
            found.update(hashlib.sha256(example.read()).digest())
    return found.hexdigest()[:16]


def _fingerprint_of_weights(model: MiniGPT4) -> str:
    """A hash of the first numbers of each tensor of the frozen encoder and bridge.

    They are rounded to 16 bits, so that all devices agree.
    """
    tensors = [*model.encoder.state_dict().values(), *model.bridge.state_dict().values()]
    first = torch.cat([tensor.flatten()[:16].half() for tensor in tensors])
    return hashlib.sha256(first.cpu().numpy().tobytes()).hexdigest()[:16]
