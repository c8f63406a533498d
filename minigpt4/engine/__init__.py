"""Runs the model for conversations: token ids and picture keys in, token ids out."""

from minigpt4.engine.engine import Engine, Request, Stream
from minigpt4.engine.sampling import Sampling

__all__ = ["Engine", "Request", "Sampling", "Stream"]
