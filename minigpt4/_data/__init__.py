"""Data files of the package: `prompts`, and the projections trained in this repository (`weights`).

In a checkout they are at its root, where people edit them; setup.py copies them into this package
when a wheel is built. No other module needs to know which of the two applies.
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
    """The folder for this user's downloads and builds: in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "minigpt4")
