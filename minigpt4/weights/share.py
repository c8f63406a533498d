"""A trained projection on the Hugging Face hub: sent with a model card, and found by its name."""

import csv
import json
import re
import shlex
import tempfile
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from safetensors import SafetensorError, safe_open

from minigpt4.config import MODELS, get_model
from minigpt4.data.files import check_pointer
from minigpt4.errors import UNUSABLE_PROXY, UserError, hub_has_client, quiet_hub
from minigpt4.weights.adapters import trained_tensors
from minigpt4.weights.checkpoint import check_projection, save_projection

CONFIG = "minigpt4.json"  # in the repository: {"model": NAME, "projection": FILE}
_SENT = ("model", "stage", "step", "pictures", "command")  # the metadata of `train` that is sent
_HUB = re.compile(
    r"hf:\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?(=[\d.]+)?"
)  # data of the hub, with its weight
_RECENT = 100  # steps whose mean loss is shown on the card

quiet_hub()


def push(place: str, repository: str, private: bool = False) -> str:
    """Send a projection to the hub; returns the address of its page.

    place: a projection that `train` wrote, or the folder of a run, whose best projection is sent.
    repository: USER/NAME. UserError if the file does not say which model it belongs to, or the hub
    refuses.
    """
    if repository.count("/") != 1:
        raise UserError(f"“{repository}” is not a name on the hub: give USER/NAME.")
    path = _find(Path(place))
    metadata = _metadata(path)
    config = get_model(metadata["model"])
    name = f"{config.name}.safetensors"
    tensors = trained_tensors(path)
    check_projection(tensors, config, path)
    api = HfApi()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_projection(tensors, folder / name, metadata)
        content = {"model": config.name, "projection": name}
        (folder / CONFIG).write_text(json.dumps(content) + "\n", encoding="utf-8")
        card = model_card(repository, metadata, path.parent)
        (folder / "README.md").write_text(card, encoding="utf-8")
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=folder,
                commit_message=f"Projection for {config.name}",
            )
        except Exception as error:  # of the hub's client, its HTTP client, or the network
            raise UserError(_explain(error, repository)) from error
    return f"{constants.ENDPOINT}/{repository}"


def resolve(name: str) -> tuple[str, str] | None:
    """(model, place of its projection) of a repository that `push` wrote; None if the name is not
    USER/NAME. UserError if the hub has no such repository."""
    if name in MODELS or name.count("/") != 1:
        return None
    try:
        path = HfApi().hf_hub_download(name, CONFIG)
    except Exception as error:  # of the hub's client, its HTTP client, or the network
        raise UserError(_explain(error, name)) from error
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        model, projection = str(content["model"]), str(content["projection"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{CONFIG} in {name} is damaged: push the projection again.") from error
    get_model(model)
    return model, f"{name}:{projection}"


def model_card(repository: str, metadata: Mapping[str, str], run: Path) -> str:
    """The README of a projection, from its metadata and the files of its run."""
    name = metadata["model"]
    rows = [("model", name)]
    rows += [(k, metadata[k]) for k in _SENT[1:] if k in metadata]
    if losses := _rows(run / "loss.csv", "loss"):
        recent = [row["loss"] for row in losses[-_RECENT:]]
        rows.append(
            (f"mean loss of the last {len(recent)} steps", f"{sum(recent) / len(recent):.4f}")
        )
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""---
library_name: minigpt4
pipeline_tag: image-text-to-text
tags:
- minigpt4
---

# {repository.partition("/")[2]}

A linear projection from pictures to the language model of MiniGPT-4 (`{name}`). The visual encoder
and the language model are frozen and are not part of this repository; their licences apply.

```python
import minigpt4

model = minigpt4.load("{repository}")
print(model.ask("photo.jpg", "What is in this picture?"))
```

## Training

| | |
|---|---|
{table}
{_held_out(run)}"""


def _held_out(run: Path) -> str:
    rows = _rows(run / "validation.csv", "step", "loss", "cider")
    if not rows:
        return ""
    lines = [f"| {r['step']:.0f} | {r['loss']:.6} | {r['cider']:.6} |" for r in rows]
    head = "\n## Held-out pictures\n\n| step | loss (nats per token) | CIDEr |\n|---|---|---|\n"
    return head + "\n".join(lines) + "\n"


def _rows(path: Path, *columns: str) -> list[dict[str, float]]:
    """These columns of a CSV file of a run. UserError if another program has changed the file."""
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [{name: float(row[name]) for name in columns} for row in csv.DictReader(file)]
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(
            f"{path} is not as “train” wrote it: restore it, or move it elsewhere to push without "
            "its figures."
        ) from error


def _find(place: Path) -> Path:
    if not place.is_dir():
        return place
    best = sorted(place.glob("*-best.safetensors"))
    others = sorted(place.glob("*.safetensors"))
    found = best or [path for path in others if not path.stem.endswith("-words")]
    if len(found) != 1:
        raise UserError(f"{place} contains {len(found)} projections: name the file itself.")
    return found[0]


def _metadata(path: Path) -> dict[str, str]:
    """The metadata that `train` wrote into the file, without names of this machine's folders."""
    check_pointer(path)
    try:
        with safe_open(path, "pt") as file:
            found = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a projection that “train” wrote: name one.") from error
    if "model" not in found:
        raise UserError(
            f"{path} does not say which model it belongs to: name a projection that “train” wrote."
        )
    found = {name: found[name] for name in _SENT if name in found}
    try:
        words = [_without_folders(word) for word in shlex.split(found.pop("command", ""))]
    except ValueError:  # an open quote: the file was edited
        words = []
    return found | ({"command": shlex.join(words)} if words else {})


def _without_folders(word: str) -> str:
    """A command's argument, of which only the last part is kept if it looks like a path."""
    option = found[0] if (found := re.match(r"--[\w-]+=", word)) else ""
    value = word.removeprefix(option)
    if _HUB.fullmatch(value):
        return word
    return option + re.split(r"[/\\]", value.rstrip("/\\"))[-1]


def _explain(error: Exception, repository: str) -> str:
    page = f"{constants.ENDPOINT}/{repository}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, HFValidationError):
        return f"“{repository}” is not a name on the hub: give USER/NAME."
    if isinstance(error, LocalTokenNotFoundError) or status in (401, 403, 404):
        return (
            f"{page} is not available to you: check its name, and set HF_TOKEN to a token that may "
            "use it (or run “hf auth login”)."
        )
    if status:
        return f"{page} answered {status}: try again later."
    if constants.HF_HUB_OFFLINE:
        return f"{page} is not asked, because HF_HUB_OFFLINE is set: unset it."
    if not hub_has_client():
        return UNUSABLE_PROXY
    return f"{page} cannot be reached: check the connection."
