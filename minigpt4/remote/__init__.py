"""Engines whose language model runs in other processes, or whose GPU belongs to these."""
