"""MiniGPT-4: a frozen visual encoder, one trained linear projection, a frozen language model."""

__version__ = "0.1.0"
