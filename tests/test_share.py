"""A projection goes to the hub with its card and comes back by its name."""

import argparse
import json
import logging

import pytest
from huggingface_hub import HfApi, constants
from safetensors import safe_open

import minigpt4
from minigpt4 import config as configs
from minigpt4 import start
from minigpt4.__main__ import main
from minigpt4.errors import UserError
from minigpt4.weights.checkpoint import read_projection, save_projection
from minigpt4.weights.share import CONFIG, _metadata, resolve
from tests.hub_case import TOKEN, hub_server
from tests.parity_case import ParityCase
from tests.training_case import PARITY

NAME = "someone/red-boxes"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_server(tmp_path, monkeypatch) as hub:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a storage of its own
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def case(monkeypatch):
    """The tiny model under the name of a large one, with its own files."""
    case = ParityCase(PARITY / "vicuna_qformer_a")
    monkeypatch.setitem(configs.MODELS, case.config.name, case.config)
    return case


@pytest.fixture
def run(tmp_path, case):
    """The folder of a run."""
    folder = tmp_path / "runs" / "mine"
    tensors = {k: -v for k, v in read_projection(case.files.projection).items()}
    command = "python -m minigpt4 train --data /home/me/secret/set.tar --out=/home/me/runs/mine"
    metadata = {"model": case.config.name, "stage": "2", "step": "300", "command": command}
    save_projection(tensors, folder / f"{case.config.name}.safetensors", metadata)
    (folder / "loss.csv").write_text("step,loss,lr,samples_per_s\n1,3.0,1,1\n2,2.0,1,1\n")
    (folder / "validation.csv").write_text("step,loss,cider\n2.0,2.5,0.25\n")
    return folder


@pytest.mark.parametrize(
    ("offline", "said"),
    [(False, "cannot be reached: check"), (True, "because HF_HUB_OFFLINE is set: unset it.")],
)
def test_a_hub_that_cannot_be_reached(hub, monkeypatch, caplog, offline, said):
    """The client's own warnings of each try are not shown."""

    def refuse(*_):
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s")
        raise ConnectionError("Refused.")

    monkeypatch.setattr(HfApi, "hf_hub_download", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    for name in ("huggingface_hub.utils._http", "huggingface_hub"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    with pytest.raises(UserError, match=said):
        resolve(NAME)
    assert not caplog.records


def test_there_and_back(hub, case, run, capsys):
    assert main(["push", str(run), NAME, "--private"]) == 0
    assert f"{hub.address}/{NAME}" in capsys.readouterr().err
    made = hub.made[NAME]
    assert made.get("private") or made.get("visibility") == "private"
    sent = {name.removeprefix(f"{NAME}/"): c for name, c in hub.files.items()}
    file = f"{case.config.name}.safetensors"
    assert set(sent) >= {"README.md", CONFIG, file}
    card = sent["README.md"].decode()
    for part in ("# red-boxes", f'load("{NAME}")', "| stage | 2 |", "2.5000", "| 2 | 2.5 | 0.25 |"):
        assert part in card
    assert "set.tar" in card and not any(b"secret" in content for content in sent.values())
    assert resolve(NAME) == (case.config.name, f"{NAME}:{file}")


def test_it_answers_as_the_file_does(hub, case, run, tmp_path):
    assert main(["push", str(run), NAME]) == 0
    roles = {"vision": case.files.vision, "qformer": case.files.qformer, "llm": case.files.llm}
    options = {role: str(path) for role, path in roles.items()}
    options |= {"model": NAME, "quantize": "none", "dtype": "float32"}
    options |= {"device": "cpu", "projection": None}
    model = start.open_model(argparse.Namespace(**options), lambda line, passing=False: None)
    sent = read_projection(next(run.glob("*.safetensors")))
    assert model.projection.weight.equal(sent["weight"])
    assert list((tmp_path / "weights").glob("*.safetensors"))


def test_the_best_projection_of_a_run_is_sent(hub, case, run):
    tensors = read_projection(next(run.glob("*.safetensors")))
    best = run / f"{case.config.name}-best.safetensors"
    save_projection(tensors, best, {"model": case.config.name, "step": "200"})
    assert main(["push", str(run), NAME]) == 0
    assert "| step | 200 |" in hub.files[f"{NAME}/README.md"].decode()


def test_mistakes(hub, case, run, tmp_path, monkeypatch, capsys):
    (file,) = run.glob("*.safetensors")

    def complaint(*arguments: object) -> str:
        assert main(["push", *map(str, arguments)]) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and line.startswith("minigpt4: ")
        return line

    assert "USER/NAME" in complaint(file, "a name with spaces")
    assert "USER/NAME" in complaint(file, "me")
    assert "cannot be read (No such file" in complaint(tmp_path / "none.safetensors", NAME)
    (tmp_path / "none.safetensors").write_bytes(b"no")
    assert "is not a projection" in complaint(tmp_path / "none.safetensors", NAME)
    save_projection(read_projection(file), tmp_path / "bare.safetensors")
    assert "which model it belongs to" in complaint(tmp_path / "bare.safetensors", NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    assert "HF_TOKEN" in complaint(file, NAME)
    with pytest.raises(UserError, match="not available to you"):
        resolve("no/body")
    hub.files["odd/one/" + CONFIG] = json.dumps(["nano"]).encode()
    with pytest.raises(UserError, match="is damaged"):
        resolve("odd/one")
    assert resolve("nano") is None
    for changed in ("\ufeffstep;loss\r\n1;3,0\r\n", "step,loss\n1\n", "step,loss\n1,x\n"):
        (run / "loss.csv").write_text(changed)
        assert "is not as “train” wrote it" in complaint(run, NAME)
    with safe_open(file, "pt") as kept:  # the run's own file keeps its command
        assert "secret" in kept.metadata()["command"]


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("--mix /home/ann/secret-patients=2", "--mix secret-patients=2"),
        ("--data=/home/ann/a=b/c", "--data=c"),
        ("--data '{/home/ann/p,/home/ann/q}/x.tar'", "--data x.tar"),
        ("--data ../ann/private --out runs/ann/", "--data private --out ann"),
        (r"--init 'C:\Users\ann\my files\x.safetensors'", "--init x.safetensors"),
        ("--mix hf:some.one/set:train=0.5 --steps 3", "--mix hf:some.one/set:train=0.5 --steps 3"),
        ("--data 'open", None),
    ],
)
def test_of_paths_only_the_last_part_is_sent(case, tmp_path, given, sent):
    path = tmp_path / "p.safetensors"
    metadata = {"model": case.config.name, "command": given, "folder": "/home/ann"}
    save_projection(read_projection(case.files.projection), path, metadata)
    assert _metadata(path) == {"model": case.config.name} | ({"command": sent} if sent else {})


def test_a_name_of_the_hub_is_neither_a_folder_nor_given_a_projection(hub, case, tmp_path):
    hub.files[f"{NAME}/{CONFIG}"] = json.dumps({"model": "nano", "projection": "p"}).encode()
    (tmp_path / "runs").mkdir()
    for model, said in ((NAME, "omit “--projection”"), (f"{tmp_path}/runs", "on this machine")):
        with pytest.raises(UserError, match=said):
            minigpt4.load(model, projection="p.safetensors")
