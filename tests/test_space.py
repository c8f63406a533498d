"""The repository as a Hugging Face Space: the README's front matter, and the start there."""

import re
from pathlib import Path

import httpx
import pytest
from huggingface_hub import SpaceHardware, metadata_load

from tests.api_case import free_port
from tests.running import server

ROOT = Path(__file__).parent.parent
COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
# Of https://huggingface.co/docs/hub/spaces-config-reference, what a gradio Space may have.
LISTS = {"models", "datasets", "tags", "preload_from_hub"}
TEXTS = {
    *("title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version"),
    *("app_file", "suggested_hardware", "suggested_storage", "startup_duration_timeout"),
    *("license", "short_description", "thumbnail", "header", "base_path"),
}
SWITCHES = {"pinned", "fullWidth", "hf_oauth", "disable_embedding"}
REPOSITORY = r"[\w-][\w.-]*/[\w-][\w.-]*"


@pytest.fixture(scope="module")
def front() -> dict:
    return metadata_load(ROOT / "README.md")


def test_front_matter_comes_first():
    assert (ROOT / "README.md").read_text(encoding="utf-8").startswith("---\n")


def test_front_matter_has_documented_keys_and_values(front):
    assert not front.keys() - LISTS - TEXTS - SWITCHES
    assert all(isinstance(front[key], str) for key in front.keys() & TEXTS)
    assert all(isinstance(front[key], bool) for key in front.keys() & SWITCHES)
    for key in front.keys() & LISTS:
        assert front[key] and all(isinstance(item, str) for item in front[key])
    assert front["sdk"] == "gradio" and (ROOT / front["app_file"]).is_file()
    assert {front["colorFrom"], front["colorTo"]} <= COLORS
    assert not re.search(r"\w", front["emoji"])
    assert front["suggested_hardware"] in [hardware.value for hardware in SpaceHardware]
    assert re.fullmatch(r"\d+[mh]", front["startup_duration_timeout"])
    assert front["license"] == "bsd-3-clause"  # as the hub writes LICENSE's
    assert len(front["short_description"]) <= 60
    assert all(re.fullmatch(REPOSITORY, model) for model in front["models"])
    # "OWNER/NAME", or with files: "OWNER/NAME FILE,FILE", and with a commit as well
    preloaded = rf"{REPOSITORY}( [\w./-]+(,[\w./-]+)*( [0-9a-f]{{40}})?)?"
    assert all(re.fullmatch(preloaded, item) for item in front["preload_from_hub"])


def test_front_matter_agrees_with_the_requirements(front):
    """The Space installs gradio as the front matter says, the rest as requirements.txt does."""
    pins = (ROOT / "requirements.txt").read_text().splitlines()
    assert f"gradio=={front['sdk_version']}" in pins
    wanted = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert int(front["python_version"].split(".")[1]) >= int(wanted[1])


def test_what_is_loaded_beforehand_is_what_is_looked_for(front):
    from minigpt4.config import MODELS

    known = {(s.ref, s.member, s.revision) for m in MODELS.values() for s in m.files.values()}
    for item in front["preload_from_hub"]:
        repository, file, revision, *_ = [*item.split(" "), "", ""]
        assert (repository, file, revision) in known


def test_packages_for_debian():
    """gcc compiles nano's kernels, as in the Dockerfile."""
    packages = (ROOT / "packages.txt").read_text().split()
    assert "gcc" in packages
    assert set(packages) <= set((ROOT / "Dockerfile").read_text().split())


def test_the_start_on_cpu_basic(tmp_path):
    """With a Space's environment the page comes up where the Space looks for it, and answers."""
    port = free_port()
    address = f"http://127.0.0.2:{port}"
    environment = {
        "SYSTEM": "spaces",
        "MINIGPT4_MODEL": "nano",
        "SPACE_ID": "someone/minigpt4",
        "SPACE_HOST": "someone-minigpt4.hf.space",
        "SPACE_AUTHOR_NAME": "someone",
        "SPACE_REPO_NAME": "minigpt4",
        "GRADIO_SERVER_NAME": "127.0.0.2",
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HOME": str(tmp_path),
    }
    log = tmp_path / "log"
    with server("app.py", address=address, log=log, **environment):
        assert "MiniGPT-4" in httpx.get(address).text
        messages = [{"role": "user", "content": "Hello!"}]
        body = {"messages": messages, "max_tokens": 5}
        reply = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=120)
        assert reply.json()["model"] == "nano"
        assert reply.json()["choices"][0]["message"]["content"]
    said = log.read_text()
    # Gradio's hot reloading ends in a thread of its own where `spaces`, which a Space has, is not
    # installed.
    known = said.count("RuntimeError: `spaces` package is required")
    assert said.count("Traceback") == known, said
