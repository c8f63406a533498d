"""Settings and fixtures of several tests."""

import os
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import minigpt4.web  # noqa: F401  before a test imports Gradio itself

# No test of a made-up example may fail because the machine is slow or busy.
too_slow = [HealthCheck.too_slow]
settings.register_profile("any machine", deadline=None, suppress_health_check=too_slow)
settings.load_profile("any machine")

# Processes that run tests side by side share the processors: a thread that waits must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Triton's kernels run in its interpreter, which must be chosen before Triton is first imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

# The tests mean float32 unless they ask for `computing_type`: not what this processor is good at.
os.environ["MINIGPT4_DTYPE"] = "float32"

# A shell's background jobs ignore Ctrl-C, and so would the tests of it, run there.
signal.signal(signal.SIGINT, signal.default_int_handler)


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


@pytest.fixture(scope="session", autouse=True)
def uploads_folder(tmp_path_factory):
    """Each of the processes that run tests has its own, as servers that share one delete files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        yield


@pytest.fixture(params=["float32", "bfloat16"])
def computing_type(request, monkeypatch):
    """Both types that a language model computes in on a CPU, whatever the processor is good at."""
    import torch

    monkeypatch.setenv("MINIGPT4_DTYPE", request.param)
    return getattr(torch, request.param)


@pytest.fixture
def weights(tmp_path, monkeypatch) -> Path:
    """An empty weights folder."""
    folder = tmp_path / "weights"
    folder.mkdir()
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(folder))
    return folder


# Evaluations: a tiny model and a few captioned pictures.


@pytest.fixture
def tiny(monkeypatch):
    from tests.evaluation_case import use_tiny_model

    use_tiny_model(monkeypatch)


@pytest.fixture
def shard(tmp_path) -> Path:
    from tests.training_case import write_shard

    return write_shard(tmp_path / "train-00000.tar", 3)


# The page: a server with an engine that answers the same each time, a browser, visitors.


# Not for the session: while Playwright runs, no test in this thread can use asyncio.run.
@pytest.fixture(scope="module")
def browser():
    from tests.page_case import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def engine():
    """Without a model; `asked` keeps every conversation it was given."""
    from tests.fake_engine import FakeEngine

    return FakeEngine()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the page's visitors' likes are stored."""
    return tmp_path_factory.mktemp("feedback")


@pytest.fixture(scope="module")
def address(engine, folder):
    from minigpt4.web.page import session
    from minigpt4.web.page.feedback import Feedback
    from tests.fake_engine import FakeAnswer
    from tests.page_case import served

    patch = pytest.MonkeyPatch()
    patch.setattr(session, "ask", FakeAnswer)
    with served(engine, Feedback(str(folder))) as address:
        yield address
    patch.undo()


@pytest.fixture
def visit(browser, address, engine):
    """Opens the page as a new visitor; afterwards nothing may have gone wrong in the browser."""
    from tests.page_case import Visitors

    engine.word_seconds, engine.full, engine.ahead = 0.003, False, 0
    visitors = Visitors(browser, address)
    yield visitors
    visitors.check()


@pytest.fixture
def photo(tmp_path):
    from tests.page_case import picture

    return picture(tmp_path / "meadow.png")


_statuses: list[int] = []


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Note the run's status for `pytest_unconfigure`."""
    _statuses.append(int(exitstatus))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """End at once, with the run's own status, once everything has been reported.

    After hundreds of tests the process holds threads of several C++ libraries, and now and then one
    of them has not ended when its library's own data is taken down: the process is then aborted
    ("terminate called without an active exception"), although every test passed.
    """
    if _statuses:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_statuses[-1])
