"""What several tests share."""

from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--parity-dir",
        default=str(Path(__file__).parent / "parity"),
        help="folder of parity cases computed by the published code",
    )


def pytest_generate_tests(metafunc):
    if "case_dir" in metafunc.fixturenames:
        root = Path(metafunc.config.getoption("--parity-dir"))
        cases = sorted(p.parent for p in root.glob("**/case.json"))
        if not cases:
            raise pytest.UsageError(f"--parity-dir: {root} holds no case.json, at any depth")
        metafunc.parametrize("case_dir", cases, ids=[p.name for p in cases])
