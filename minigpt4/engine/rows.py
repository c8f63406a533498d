"""Names that native.py imports from here; they live in kvcache.py and scheduler.py."""

from minigpt4.engine.kvcache import BLOCK_SIZE as PAGE
from minigpt4.engine.scheduler import Rows

__all__ = ["PAGE", "Rows"]
