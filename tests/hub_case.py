"""A small server that speaks the Hugging Face hub's protocol on the loopback address, and the
published repositories at tiny sizes on it."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from minigpt4.config import MODELS, ModelConfig
from minigpt4.weights.checkpoint import eva_tensors, qformer_tensors, read_checkpoint
from tests.http_case import Handler, listening
from tests.parity_case import ParityCase

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_good"
PARITY = Path(__file__).parent / "parity"


@dataclass
class Hub:
    """What the server holds and what it was asked.

    files: "owner/name/FILE" or "spaces/owner/name/FILE" or "plain/FILE" -> content; breaks: FILE ->
    after how many bytes the line breaks, once for each number; asked: "GET FILE RANGE" and so on.
    Uploads need the token.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    breaks: dict[str, list[int]] = field(default_factory=dict)
    damaged: dict[str, int] = field(default_factory=dict)  # FILE -> how often it comes damaged
    asked: list[str] = field(default_factory=list)
    made: dict[str, dict] = field(default_factory=dict)  # repositories, as they were created
    large: dict[str, bytes] = field(default_factory=dict)  # uploads, by their SHA-256
    address: str = ""

    def fetched(self, name: str) -> list[str]:
        """The ranges in which a file's content was asked for; "" is all of it."""
        found = [line.split(" ", 2) for line in self.asked if line.startswith("GET ")]
        return [where for _, asked, where in found if asked == name]


class _Handler(Handler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = urlsplit(self.path).path.lstrip("/")
        if path.startswith("api/"):
            return self._list(path.removeprefix("api/").removeprefix("models/"))
        if path.startswith(("plain/", "cdn/")):
            return self._content(path, body)
        repository, _, rest = path.partition("/resolve/")
        commit, _, name = rest.partition("/")
        key = f"{repository}/{name}"
        if not any(file.startswith(f"{repository}/") for file in self.hub.files):
            return self._refuse(401, "RepoNotFound")
        if repository in self.hub.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._refuse(401, "GatedRepo")
        if commit not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        if key not in self.hub.files:
            return self._refuse(404, "EntryNotFound")
        content = self.hub.files[key]
        if not name.endswith((".bin", ".pth", ".safetensors", ".model")):  # kept in git itself
            return self._content(key, body)
        # Big files lie on another host.
        self.send_response(302)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header(
            "Location", self.hub.address.replace("127.0.0.1", "localhost") + f"/cdn/{key}"
        )
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = urlsplit(self.path).path.lstrip("/")
        self.hub.asked.append(f"POST {path}")
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self._refuse(401, "")
        if path == "api/repos/create":
            made = json.loads(body)
            name = "/".join(filter(None, (made.get("organization"), made["name"])))
            self.hub.made[name] = made
            answer: dict = {"url": f"{self.hub.address}/{name}"}
        elif path == "api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in path:
            modes = {True: "lfs", False: "regular"}
            answer = {
                "files": [
                    {"path": f["path"], "shouldIgnore": False}
                    | {"uploadMode": modes[f["path"].endswith(".safetensors")]}
                    for f in json.loads(body)["files"]
                ]
            }
        elif path.endswith("/info/lfs/objects/batch"):
            answer = {"transfer": "basic", "objects": json.loads(body)["objects"]}
            for item in answer["objects"]:
                item["actions"] = {"upload": {"href": f"{self.hub.address}/lfs/{item['oid']}"}}
        else:
            repository = path.removeprefix("api/models/").partition("/commit/")[0]
            self._commit(repository, [json.loads(line) for line in body.splitlines()])
            answer = {"success": True, "commitOid": COMMIT}
            answer["commitUrl"] = f"{self.hub.address}/{repository}/commit/{COMMIT}"
        self.reply(200, answer)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.large[hashlib.sha256(content).hexdigest()] = content
        self.reply(200, {})

    def _commit(self, repository: str, lines: list[dict]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.hub.large[value["oid"]]
            else:
                continue
            self.hub.files[f"{repository}/{value['path']}"] = content

    def _list(self, path: str) -> None:
        repository, _, revision = path.partition("/revision/")
        if revision not in ("", "main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        names = [
            file.removeprefix(f"{repository}/")
            for file in self.hub.files
            if file.startswith(f"{repository}/")
        ]
        if not names:
            return self._refuse(401, "RepoNotFound")
        siblings = [{"rfilename": name} for name in names]
        self.reply(200, {"id": repository, "sha": COMMIT, "siblings": siblings})

    def _content(self, key: str, body: bool) -> None:
        name = key.removeprefix("cdn/")
        if name not in self.hub.files:
            return self._refuse(404, "")
        content = self.hub.files[name]
        if key.startswith("plain/"):
            etag = hashlib.md5(content).hexdigest()
        else:
            etag = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        wanted = self.headers["Range"] or ""
        start = int(wanted.removeprefix("bytes=").rstrip("-") or 0)
        if body:
            self.hub.asked.append(f"GET {name} {wanted}")
            if key.startswith("cdn/") and self.headers["Authorization"]:
                self.hub.asked.append("a token was told to the CDN")
            if self.hub.damaged.get(name, 0):
                self.hub.damaged[name] -= 1
                content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            end = len(content)
            if self.hub.breaks.get(name):
                end = start + self.hub.breaks[name].pop(0)
                self.close_connection = True
            self.wfile.write(content[start:end])

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def hub_server(folder: Path, monkeypatch) -> Iterator[Hub]:
    """A hub with nothing on it yet, to which the client speaks; its cache and token's place are in
    the folder."""
    hub = Hub()
    with listening(type("Handler", (_Handler,), {"hub": hub})) as server:
        hub.address = server.url
        url = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setenv("MINIGPT4_WEIGHTS", str(folder / "weights"))
        yield hub


def publish(hub: Hub, scratch: Path) -> ParityCase:
    """The tiny parity checkpoints under the published names; the case they are from."""
    case = ParityCase(PARITY / "vicuna_qformer_a")
    for name in ("eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth"):
        hub.files[f"plain/{name}"] = (case.folder / name).read_bytes()
    projection = (case.folder / "pretrained_minigpt4.pth").read_bytes()
    hub.files["spaces/Vision-CAIR/minigpt4/prerained_minigpt4_7b.pth"] = projection
    hub.files["spaces/Vision-CAIR/minigpt4/app.py"] = b"print()"
    _publish_vicuna(hub, case, scratch)
    _publish_blip2(hub, case, scratch)
    return case


def _publish_vicuna(hub: Hub, case: ParityCase, scratch: Path) -> None:
    """As .bin shards with their index, beside things that a language model does not need."""
    repository = "Vision-CAIR/vicuna-7b"
    for file in (case.folder / "llm").iterdir():
        if file.suffix != ".safetensors":
            hub.files[f"{repository}/{file.name}"] = file.read_bytes()
    hub.files[f"{repository}/README.md"] = hub.files[f"{repository}/.gitattributes"] = b"#"
    hub.files[f"{repository}/onnx/model.bin"] = b"of no use"
    tensors = load_file(case.folder / "llm" / "model.safetensors")
    places, names = {}, sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in part}, scratch / shard)
        hub.files[f"{repository}/{shard}"] = (scratch / shard).read_bytes()
        places |= dict.fromkeys(part, shard)
    index = json.dumps({"metadata": {}, "weight_map": places}).encode()
    hub.files[f"{repository}/pytorch_model.bin.index.json"] = index


def _publish_blip2(hub: Hub, case: ParityCase, scratch: Path) -> None:
    """transformers' names; a shard with the wanted parts, one with a language model."""
    qformer = read_checkpoint(case.folder / "blip2_pretrained_flant5xxl.pth")
    norm = {k: v for k, v in qformer.items() if k.startswith("ln_vision.")}
    vision = eva_tensors(read_checkpoint(case.folder / "eva_vit_g.pth") | norm, case.config.vision)
    last = f"vit.encoder.layers.{case.config.vision.layers}."  # the block that is not used
    wanted = {
        k.replace("vit.", "vision_model.", 1): v.contiguous()
        for k, v in vision.items()
        if k.startswith("vit.") and not k.startswith(last)
    }
    named = qformer_tensors(qformer)
    wanted |= {k: v for k, v in named.items() if k.startswith(("qformer.", "query_tokens"))}
    shards = {
        "model-00001-of-00002.safetensors": wanted,
        "model-00002-of-00002.safetensors": {"language_model.shared.weight": torch.zeros(50, 50)},
    }
    places = {}
    for shard, tensors in shards.items():
        save_file(tensors, scratch / shard)
        hub.files[f"Salesforce/blip2-flan-t5-xxl/{shard}"] = (scratch / shard).read_bytes()
        places |= dict.fromkeys(tensors, shard)
    index = json.dumps({"metadata": {}, "weight_map": places}).encode()
    hub.files["Salesforce/blip2-flan-t5-xxl/model.safetensors.index.json"] = index


def tiny_vicuna(case: ParityCase, hub: Hub) -> ModelConfig:
    """vicuna-7b with the published sources, at the case's sizes and the server's address."""
    published = MODELS["vicuna-7b"].files
    plain = {
        role: replace(published[role], ref=f"{hub.address}/plain/{name}")
        for role, name in (
            ("vision", "eva_vit_g.pth"),
            ("qformer", "blip2_pretrained_flant5xxl.pth"),
        )
    }
    return replace(case.config, name="vicuna-7b", files=published | plain)
