"""Helpers of the tests of `evaluate`'s experiments: a tiny model, the command."""

import json
from dataclasses import replace
from pathlib import Path

from minigpt4 import start
from minigpt4.__main__ import main
from minigpt4.weights.load import load_model
from tests.parity_case import ParityCase
from tests.training_case import PARITY


def use_tiny_model(monkeypatch) -> None:
    """A parity case's model takes the place of the one that the options name."""

    def open_model(options):
        case = ParityCase(PARITY / "vicuna_qformer_a")
        files = case.files
        if options.projection:
            files = replace(files, projection=Path(options.projection))
        return load_model(case.config, files)

    monkeypatch.setattr(start, "open_model", open_model)


def run(*arguments, out) -> tuple[dict, str]:
    """An experiment's figures and its report."""
    files = ["--json", str(out / "out.json"), "--markdown", str(out / "out.md")]
    assert main(["evaluate", *map(str, arguments), *files]) == 0
    return json.loads((out / "out.json").read_text()), (out / "out.md").read_text()
