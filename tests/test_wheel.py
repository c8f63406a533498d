"""The package as people install it: a wheel, in an empty folder, far from the checkout."""

import json
import shutil
import subprocess
import zipfile
from importlib import machinery, util
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement

from tests.api_case import free_port
from tests.running import python, server

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "minigpt4" / "web" / "page" / "examples" / "tower.jpg"


def tracked(*folders: str) -> list[str]:
    """What git knows of, or would add."""
    command = ["git", "ls-files", "-co", "--exclude-standard", "--deduplicate", *folders]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in names.splitlines() if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what is committed: a checkout holds downloads and old builds as well."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(out), str(source)]
    python("-m", "pip", *build)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    install = ["install", "--no-deps", "--no-compile", "--quiet", "--target", str(target)]
    python("-m", "pip", *install, str(wheel))
    return target


@pytest.fixture(scope="module")
def environment(installed, tmp_path_factory) -> dict[str, str]:
    """Only the installed package can be imported; what must be downloaded of nano is there, and
    nothing else of the checkout's weights."""
    downloaded = tmp_path_factory.mktemp("downloaded")
    for name in ("nano-llm", "efficientnet-lite2-9656183e.pth"):
        if not (ROOT / "weights" / name).exists():
            pytest.skip("nano's weights are missing: python -m minigpt4 download nano")
        (downloaded / name).symlink_to(ROOT / "weights" / name)
    offline = {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    places = {"PYTHONPATH": str(installed), "MINIGPT4_WEIGHTS": str(downloaded)}
    return offline | places


def test_the_wheel_holds_all_that_is_committed(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    data = tracked("prompts") + [n for n in tracked("weights") if n.count("/") == 1]
    expected = {*tracked("minigpt4"), *(f"minigpt4/_data/{name}" for name in data)}
    assert held == expected
    assert "minigpt4/_data/weights/centernet-LICENSE" in held  # MIT: a copy has the notice


def test_ask(installed, environment, tmp_path):
    """With the trained projection: the same answer as in the checkout."""
    script, module = [str(installed / "bin" / "minigpt4")], ["-m", "minigpt4"]
    question = ["ask", str(EXAMPLE), "What is this?", "--model", "nano", "--temperature", "0"]
    question += ["--max-new-tokens", "16"]
    answers = []
    for command, folder, settings in (
        (script, tmp_path, environment),
        (module, ROOT, environment | {"PYTHONPATH": "", "PYTHONSAFEPATH": ""}),
    ):
        answers.append(python(*command, *question, cwd=folder, **settings).stdout)
    assert answers[0] == answers[1] and len(answers[0].split()) > 2


def test_the_page(installed, environment, tmp_path):
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = ["-m", "minigpt4", "serve", "--model", "nano", "--port", str(port)]
    with server(*command, address=address, log=tmp_path / "log", cwd=tmp_path, **environment):
        assert "MiniGPT-4" in httpx.get(address, timeout=30).text
        assert EXAMPLE.name in httpx.get(f"{address}/config", timeout=30).text
        body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 5}
        reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=120)
        assert reply.json()["choices"][0]["message"]["content"]


def test_everything_in_the_package_is_imported_from_there(installed, environment, tmp_path):
    """Prompts, too; and `import minigpt4` alone brings no torch."""
    code = (
        "import sys, json, minigpt4; light = 'torch' not in sys.modules\n"
        "from minigpt4.data.files import prompt_lines\n"
        "from minigpt4.evaluation.suite import SUITE\n"
        "print(json.dumps([light, minigpt4.__file__, prompt_lines('describe.txt'), str(SUITE)]))"
    )
    done = python("-c", code, cwd=tmp_path, **environment)
    light, file, prompts, suite = json.loads(done.stdout)
    assert light and prompts
    assert Path(file).is_relative_to(installed) and Path(suite).is_relative_to(installed)


# --- requirements ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lock():
    """scripts/lock as a module."""
    loader = machinery.SourceFileLoader("lock", str(ROOT / "scripts" / "lock"))
    module = util.module_from_spec(util.spec_from_loader("lock", loader))
    loader.exec_module(module)
    return module


def test_locked_versions_agree_with_the_ranges(lock):
    """Every package of pyproject.toml, in its order, with an exact version within its range."""
    for file, (name, _) in lock.FILES.items():
        ranges, exact = lock.wanted(name), lock.locked(file)
        assert [r.name for r in ranges] == [*exact], f"{file}: run `make lock`"
        for wanted, pinned in zip(ranges, exact.values(), strict=True):
            (specifier,) = pinned.specifier
            assert specifier.operator == "==" and specifier.version in wanted.specifier, pinned
            assert (wanted.extras, str(wanted.marker)) == (pinned.extras, str(pinned.marker))


def test_the_lock_writes_what_is_installed(lock):
    requirement = Requirement("httpx>=0.27,<1")
    assert lock.lock(requirement, {}) == f"httpx=={httpx.__version__}"
    with pytest.raises(SystemExit, match="asks for"):
        lock.lock(Requirement("httpx>=99"), {})
    with pytest.raises(SystemExit, match="not installed"):
        lock.lock(Requirement("no-such-package>=1"), {})
    before = {"no-such-package": Requirement("no-such-package==1.5")}
    assert lock.lock(Requirement("no-such-package>=1"), before) == "no-such-package==1.5"
