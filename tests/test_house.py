"""The house's rules: who may import whom, and what stays out of the repository."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minigpt4"
FILES = [*sorted(PACKAGE.rglob("*.py")), ROOT / "app.py"]


def all_imports(path: Path) -> set[str]:
    """Names of the modules a file imports, inside functions too."""
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
    PACKAGE / "remote" / "vllm.py": {"httpx"},  # asks other machines
}


def test_only_the_servers_import_gradio():
    for path in FILES:
        found = SERVED & {name.split(".")[0] for name in all_imports(path)}
        assert "web" in path.parts or found <= SERVERS.get(path, set()), path


@pytest.mark.parametrize(
    "module",
    [
        "model.prompt",
        "model.text",
        "model.image",
        "conversation",
        "config",
        "errors",
        "engine",
        "data.table",
    ],
)
def test_no_torch(module):
    """Importing these loads no torch: checked in a fresh interpreter."""
    code = f"import sys, minigpt4.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# From the ground up; a module's rank is that of its longest name listed here.
FLOORS = [
    {"errors", "_data"},
    {"model.prompt", "model.text", "model.parts", "model.image", "model.image_file"},
    {"config", "data"},
    {"options"},
    {"weights.gguf"},
    {"model"},
    {"weights"},
    {"engine"},
    {"conversation", "remote"},
    {"start", "batch", "remote.endpoint"},
    {"web", "evaluation", "training"},
    {"curation", "remote.ray", "remote.zerogpu", "web.run"},
    {"__main__", "app"},
]


def modules() -> dict[str, Path]:
    """Module name, without the package's, -> file."""
    found = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in FILES[:-1]}
    return {n.removesuffix(".__init__"): p for n, p in found.items()} | {"app": FILES[-1]}


def arrows() -> dict[str, set[str]]:
    """Module -> the modules of this package that it imports, inside functions too."""
    names = modules()

    def owner(name: str) -> str:
        name = name.removeprefix("minigpt4.")
        while name and name not in names:
            name = name.rpartition(".")[0]
        return name

    return {
        name: {owner(n) for n in all_imports(path) if n.startswith("minigpt4.")} - {"", name}
        for name, path in names.items()
    }


def rank(module: str) -> int:
    while module:
        for floor, names in enumerate(FLOORS):
            if module in names:
                return floor
        module = module.rpartition(".")[0]
    raise AssertionError("a module without a rank: give it one in FLOORS")


def test_arrows_point_down():
    for module, imported in arrows().items():
        if module != "__init__":
            above = {name for name in imported if rank(name) > rank(module)}
            assert not above, f"{module} imports {above}, which stand above it"


def test_no_circles():
    left = arrows()
    while free := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"circles of imports among {sorted(left)}"


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


def test_committed_weights_are_small():
    """nano's projections, the detector, mini's projection with its adapters, and its words."""
    files = (ROOT / "weights").glob("*.safetensors")
    sizes = [f.stat().st_size for f in files if not f.stem.endswith("-int8")]  # made here, ignored
    assert max(sizes) <= 13_000_000 and sum(sizes) <= 34_000_000


def test_functions_and_modules_have_a_size():
    """At most 60 lines a function and 500 a module; one under 40 lines belongs to another."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        short = text.count("\n") < 40 and path.name not in ("__init__.py", "__main__.py")
        assert not short and text.count("\n") <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno - node.lineno < 60, (path, node.name)


def test_options_are_declared_in_one_place():
    """Elsewhere neither an `Option` nor a variable of ours is read, besides the weights' folder."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        declared = re.search(r"\bOption\(\s*\"", text)
        assert path.name in ("options.py", "ray.py") or not declared, path
        read = set(re.findall(r"environ[^\n]{,9}\"(MINIGPT4_\w+)", text))
        assert read <= {"MINIGPT4_WEIGHTS"}, path


def test_what_is_said_names_no_guide_that_is_not_installed():
    for path in sorted(PACKAGE.rglob("*.py")):
        nodes = [*ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        docstrings = [node.value for node in nodes if isinstance(node, ast.Expr)]
        for node in nodes:
            said = isinstance(node, ast.Constant) and node not in docstrings and str(node.value)
            assert "docs/" not in (said or ""), (path, said)


def test_the_words_are_a_technical_writers():
    """A module's docstring begins with the thing's name; “quantize” has one spelling."""
    for path in [*FILES, *sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]:
        text = path.read_text(encoding="utf-8")
        assert not re.match(r"\"\"\"(What|Where|Who|Which|How|Whether)\b", text), path
        assert not re.search("(?i)quantis", text), path
