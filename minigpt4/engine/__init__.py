"""Runs the model for conversations: token ids and picture keys in, token ids out."""

from minigpt4.engine.engine import Engine
from minigpt4.engine.sampling import Sampling
from minigpt4.engine.stream import Stats, Stream
from minigpt4.engine.task import Request

__all__ = ["Engine", "Request", "Sampling", "Stats", "Stream"]
