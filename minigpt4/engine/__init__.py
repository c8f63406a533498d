"""Runs the model for conversations: token ids and picture keys in, token ids out."""

from minigpt4.engine.base import AnyEngine
from minigpt4.engine.engine import Engine
from minigpt4.engine.sampling import Sampling
from minigpt4.engine.scheduler import Request
from minigpt4.engine.stream import Histogram, Stats, Stream, Totals, explain

__all__ = [
    "AnyEngine",
    "Engine",
    "Histogram",
    "Request",
    "Sampling",
    "Stats",
    "Stream",
    "Totals",
    "explain",
]
