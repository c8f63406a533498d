"""AnyEngine: the interface of every engine, wherever its model runs. `ask`, the page and the API
use no more of it.

No torch.
"""

from typing import Any, Protocol

from minigpt4.config import ModelConfig
from minigpt4.engine.scheduler import Request
from minigpt4.engine.stream import Stream, Totals
from minigpt4.model.image import Encoded, Picture


class ModelInfo(Protocol):
    """What is read of an engine's model: a `MiniGPT4`, or a description of one elsewhere."""

    @property
    def config(self) -> ModelConfig:
        """Its parts, its prompt template, its defaults."""

    @property
    def tokenizer(self) -> Any:
        """Text to token ids and back."""

    @property
    def quantize(self) -> str:
        """How its language model is loaded: one of `config.Quantize`."""

    @property
    def device(self) -> object:
        """Where it runs; `str` names it."""


class AnyEngine(Protocol):
    """`Engine`, `RemoteEngine` and `ZeroEngine`."""

    @property
    def model(self) -> ModelInfo:
        """The model that answers."""

    @property
    def totals(self) -> Totals:
        """What the engine has done since it started."""

    @property
    def decoder_name(self) -> str:
        """What runs the language model, for people: "CUDA graphs", "PyTorch", "remote" …"""

    @property
    def fault(self) -> str:
        """A sentence while the engine cannot answer, else ""."""

    @property
    def cache_use(self) -> float | None:
        """The share of the key-value cache in use; None where it is in another process."""

    @property
    def max_waiting(self) -> int:
        """Requests that may wait."""

    @property
    def most(self) -> int:
        """Requests that may run and wait together."""

    @property
    def waiting(self) -> int:
        """Requests in the queue."""

    @property
    def running(self) -> int:
        """Requests being answered."""

    def encode(self, picture: Picture) -> Encoded | None:
        """What the language model takes of the picture, computed once.

        None where that is computed with the answer. UserError where that fails.
        """

    def submit(self, request: Request) -> Stream:
        """Start answering. UserError where the queue is full or the request can never fit."""

    def refuse_if_full(self) -> None:
        """Raise the error that `submit` would raise now, before any work goes into a request."""

    def health(self, seconds: float = 10.0) -> bool:
        """Whether the engine generates a token within `seconds`."""

    def drain(self, seconds: float) -> bool:
        """Take no more requests. True if those already taken end within `seconds`."""

    def close(self) -> None:
        """End everything; requests that are not answered yet get an error."""
