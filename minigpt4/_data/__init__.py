"""Data files of the package: `prompts`, and the projections trained in this repository (`weights`).

In a checkout they lie at its root, where people edit them; setup.py copies them into this package
when a wheel is built. Nobody else needs to know which of the two applies.
"""

import os
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSTALLED = (HERE / "prompts").is_dir()
ROOT = HERE if INSTALLED else HERE.parents[1]


def folder(name: str) -> Path:
    """The folder "prompts" or "weights"."""
    return ROOT / name


def cache_folder() -> Path:
    """Where what can be made or fetched again is kept, for this user. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "minigpt4")
