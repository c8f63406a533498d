"""The Dockerfile, checked without Docker; scripts/try-dockerfile executes it."""

import importlib.machinery
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script():
    """scripts/try-dockerfile as a module."""
    loader = importlib.machinery.SourceFileLoader(
        "try_dockerfile", str(ROOT / "scripts" / "try-dockerfile")
    )
    module = importlib.util.module_from_spec(
        importlib.util.spec_from_loader("try_dockerfile", loader)
    )
    sys.modules["try_dockerfile"] = module
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def instructions(script):
    return script.instructions((ROOT / "Dockerfile").read_text())


def test_hadolint():
    hadolint = Path(sys.executable).parent / "hadolint"
    program = str(hadolint) if hadolint.exists() else shutil.which("hadolint")
    assert program, "pip install -r requirements-dev.txt"
    done = subprocess.run([program, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_requirements_come_before_the_code(instructions):
    """A change of the code installs nothing again."""
    steps = [f"{keyword} {text}" for keyword, text in instructions]
    install = next(i for i, step in enumerate(steps) if "pip install" in step)
    assert not any(s.startswith("COPY") and "requirements" not in s for s in steps[:install])
    last = steps[max(i for i, s in enumerate(steps) if s.startswith("FROM")) :]
    copies = [step for step in last if step.startswith("COPY")]
    assert copies[-1] == "COPY . ."


def test_who_runs_it_and_how_it_ends(instructions):
    said = dict(instructions)
    assert said["USER"] == "1000:1000" and said["STOPSIGNAL"] == "SIGTERM"
    assert "/readyz" in said["HEALTHCHECK"] and "--start-period=60m" in said["HEALTHCHECK"]
    assert said["CMD"] == '["python", "app.py"]'
    bases = [text for keyword, text in instructions if keyword == "FROM"]
    assert all(
        ":" in base.split(" AS ")[0] or base.startswith(("python", "packages")) for base in bases
    )
    settings = [text for keyword, text in instructions if keyword == "ENV"][-1]
    for name in ("MINIGPT4_WEIGHTS", "HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"):
        assert f"{name}=/data/" in settings


def test_what_goes_into_the_image(script, tmp_path):
    files = script.Build(tmp_path).context
    needed = {"weights/nano.safetensors", "minigpt4/engine/native.c"}
    assert {"app.py", "LICENSE", "weights/README.md", *needed} <= {*files}
    assert not [f for f in files if f.startswith(("tests/", ".", "docs/", "benchmarks/"))]


def test_compose_reserves_a_gpu():
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    devices = services["page"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]
    assert "deploy" not in services["cpu"]
    for service in services.values():
        assert service["volumes"] == ["data:/data"]
        grace = int(service["stop_grace_period"].removesuffix("s"))
        assert grace > service["environment"]["MINIGPT4_SHUTDOWN_SECONDS"]


def test_nano_beside_the_code_is_found_from_an_empty_volume(monkeypatch, tmp_path):
    from minigpt4.config import get_model
    from minigpt4.weights.load import download_weights, find_weights

    if not (ROOT / "weights" / "nano-llm").exists():
        pytest.skip("nano is not here: python -m minigpt4 download nano")
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(tmp_path / "volume"))
    download_weights(get_model("nano"))
    assert find_weights(get_model("nano")).llm == ROOT / "weights" / "nano-llm"
    assert not (tmp_path / "volume").exists()
