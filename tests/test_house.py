"""The house's rules: who may import whom, and what stays out of the repository."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minigpt4"
FILES = sorted([*PACKAGE.rglob("*.py"), ROOT / "app.py"])


def imports(path: Path) -> set[str]:
    """Names of the modules a file imports, those in functions and in `if TYPE_CHECKING` apart."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for inner in ast.walk(node) if isinstance(node, ast.Try) else [node]:
            if isinstance(inner, ast.Import):
                found |= {alias.name for alias in inner.names}
            elif isinstance(inner, ast.ImportFrom):
                found |= {f"{inner.module}.{alias.name}" for alias in inner.names}
    return found


def all_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# Beside web/: app.py starts the server; the review of `curate` is a page of its own, which needs
# neither a model nor the chat page.
SERVED = {"gradio", "fastapi", "starlette", "uvicorn", "httpx"}
SERVERS = {
    ROOT / "app.py": SERVED,
    PACKAGE / "curation" / "review_page.py": SERVED,
    PACKAGE / "engine" / "vllm.py": {"httpx"},  # asks other machines
}


def test_only_the_servers_import_gradio():
    for path in FILES:
        found = SERVED & {name.split(".")[0] for name in all_imports(path)}
        assert "web" in path.parts or found <= SERVERS.get(path, set()), path


@pytest.mark.parametrize(
    "module", ["prompt", "text", "chat", "image", "config", "errors", "engine"]
)
def test_no_torch(module):
    """Importing these loads no torch: checked in a fresh interpreter."""
    code = f"import sys, minigpt4.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_arrows_point_down():
    """curation -> web, evaluation -> chat -> prompt, text, engine -> model -> vision, config."""
    levels = [
        {"errors", "report"},
        {"prompt", "text", "image", "transfer"},
        {"config"},
        {"vision", "checkpoint", "places", "llm_folder", "wheel"},
        {"model", "fetch"},
        {"weights", "engine"},
        {"chat", "start"},
        {"web", "evaluation", "training"},
        {"curation"},
    ]
    rank = {name: i for i, names in enumerate(levels) for name in names}
    for path in FILES:
        if path.parent == PACKAGE and path.stem in rank:
            own = path.stem
        elif path.parent.parent == PACKAGE and path.parent.name in rank:
            own = path.parent.name
        else:
            continue
        for name in imports(path):
            match = re.match(r"minigpt4\.(\w+)", name)
            if match and match[1] in rank and match[1] != own:
                assert rank[match[1]] <= rank[own], f"{path.name} imports {name}"


def test_the_engine_knows_no_tokenizer_and_no_template():
    for path in (PACKAGE / "engine").glob("*.py"):
        names = {
            n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)
        }
        assert "tokenizer" not in names, path


def test_nothing_needs_torchvision():
    for path in FILES:
        assert not any(name.split(".")[0] == "torchvision" for name in all_imports(path)), path
    assert "torchvision" not in (ROOT / "requirements.txt").read_text()


def test_requirements_are_pinned():
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            pinned = re.fullmatch(r"[\w-]+(\[\w+\])?==[\w.]+( ; .+)?", line)
            assert not line or line.startswith("#") or pinned, line


def test_trained_weights_are_small():
    total = sum(path.stat().st_size for path in (ROOT / "weights").glob("*.safetensors"))
    assert total <= 8_000_000
