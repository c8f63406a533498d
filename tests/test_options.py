"""Options: read alike from the command line, the environment and Ray's NAME=VALUE."""

import argparse
import time
from pathlib import Path

import pytest
from PIL import Image

from minigpt4 import options
from minigpt4.__main__ import _parser, main
from minigpt4.config import SAMPLING_RANGES
from minigpt4.engine import Sampling
from minigpt4.errors import UserError
from minigpt4.options import SAMPLING, Option, Parser, integer, number, one_of, secret, switch
from minigpt4.start import given_sampling
from minigpt4.training.options import GROUPS
from tests.running import python

ROOT = Path(__file__).parent.parent
DECLARED = (
    Option("share", "A switch.", False, switch),
    Option("max-queue", "A count.", 32, integer(1)),
    Option("ratio", "A share.", 0.5, number(0, below=1)),
    Option("kind", "A choice.", "auto", one_of("auto", "none")),
    Option("beside", "A list.", many=True),
    Option("key", "A key.", "", secret),
)


def parse(*arguments: str) -> argparse.Namespace:
    parser = Parser(prog="prog")
    parser.add(DECLARED)
    return parser.parse_args(arguments)


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    return said


def test_defaults_and_the_command_line():
    assert vars(parse()) == {
        "share": False,
        "max_queue": 32,
        "ratio": 0.5,
        "kind": "auto",
        "beside": [],
        "key": "",
    }
    chosen = parse("--share", "--max-queue=4", "--beside", "a", "--beside", "b", "--kind", "none")
    assert (chosen.share, chosen.max_queue, chosen.beside) == (True, 4, ["a", "b"])
    assert parse("--key", "sk-abc\n").key == "sk-abc"
    assert chosen.kind == "none" and parse("--share", "--no-share").share is False
    trained = ["train", "--data", "d", "--no-words"]
    assert _parser().parse_args(trained).words is False
    assert _parser().parse_args([*trained, "--words"]).words is True
    switches = [o.name for group in GROUPS for o in group if o.read is switch]
    assert not any(name.startswith("no-") for name in switches)


@pytest.mark.parametrize("text", ["1", "true", "YES", "on"])
def test_a_switch_that_is_on(text, monkeypatch):
    monkeypatch.setenv("MINIGPT4_SHARE", text)
    assert parse().share is True and parse("--no-share").share is False


@pytest.mark.parametrize("text", ["0", "False", "no", "off", ""])
def test_a_switch_that_is_off(text, monkeypatch):
    monkeypatch.setenv("MINIGPT4_SHARE", text)
    assert parse().share is False and parse("--share").share is True


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("share", "maybe", "must be on or off"),
        ("max_queue", "0", "must be an integer of at least 1, not “0”"),
        ("max_queue", "1_0", "must be an integer of at least 1"),
        ("max_queue", "२", "must be an integer of at least 1"),
        ("max_queue", "9" * 5000, "must be an integer of at least 1"),
        ("ratio", "1", "must be a number of at least 0 and less than 1"),
        ("ratio", "nan", "must be a number of at least 0 and less than 1"),
        ("kind", "nf5", "must be one of auto, none, not “nf5”"),
        ("key", " ", "must be ASCII characters without line breaks, and not be empty"),
        ("key", "clé", "must be ASCII characters without line breaks"),
        ("key", "a\nb", "must be ASCII characters without line breaks"),
    ],
)
def test_invalid_values_are_refused_by_name(name, value, sentence, monkeypatch, capsys):
    """In the same words, wherever they come from."""
    if name != "share":
        flag = "--" + name.replace("_", "-")
        assert f"{flag}: {sentence}" in refused(capsys, f"{flag}={value}")
    with pytest.raises(UserError, match=f"Option {name} {sentence}"):
        options.from_mapping(DECLARED, {name: value})
    variable = f"MINIGPT4_{name.upper()}"
    monkeypatch.setenv(variable, value)
    assert f"{variable} {sentence}" in refused(capsys)
    with pytest.raises(UserError, match=f"{variable} {sentence}"):
        options.from_mapping(DECLARED, {})


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ("ask a.jpg b --llm-key k", "--llm-url"),
        ("serve --llm-key k", "--llm-url"),
        ("curate refine a --out b --refiner c", "--url"),
        ("curate refine a --out b --max-cost 1", "--price-in” or “--price-out"),
        ("evaluate a --experiment stages --seed 1", "--drawn"),
        ("evaluate --experiment abilities --judge-blind", "--judge"),
    ],
)
def test_an_option_that_needs_another_one(given, needed, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(given.split())
    that = "one of them" if " or " in needed else "that"
    assert f"belongs to “{needed}”: give {that}, too, or omit it" in capsys.readouterr().err
    monkeypatch.setenv("MINIGPT4_LLM_KEY", "k")  # may be there for other commands
    assert not _parser().parse_args(["ask", "a.jpg", "b"]).llm_url
    with pytest.raises(UserError, match="belongs to “--llm-url”"):
        options.from_mapping(options.LOADING, {"llm_key": "k"})


def test_names_and_values_for_ray(monkeypatch):
    monkeypatch.setenv("MINIGPT4_SHARE", "on")
    chosen = options.from_mapping(DECLARED, {"max_queue": 3, "ratio": "0.25", "kind": None})
    assert (chosen.share, chosen.max_queue, chosen.ratio, chosen.kind) == (True, 3, 0.25, "auto")
    with pytest.raises(UserError, match="no option max_que: choose from share, max_queue"):
        options.from_mapping(DECLARED, {"max_que": 3})


def test_a_required_option_may_come_from_the_environment(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        _parser().parse_args(["train", "--stage", "1"])
    assert "required: --data" in capsys.readouterr().err
    monkeypatch.setenv("MINIGPT4_TRAIN_DATA", "shard.tar")
    monkeypatch.setenv("MINIGPT4_TRAIN_STEPS", "7")
    monkeypatch.setenv("MINIGPT4_TRAIN_CROP", "on")
    chosen = _parser().parse_args(["train", "--stage", "1"])
    assert (chosen.data, chosen.steps, chosen.crop, chosen.stage) == ("shard.tar", 7, True, 1)


def test_the_servers_key_is_not_sent_to_a_refiner(monkeypatch):
    monkeypatch.setenv("MINIGPT4_API_KEY", "the server's")
    step = ["curate", "refine", "file.jsonl", "--out", "out.jsonl"]
    assert _parser().parse_args(step).api_key is None
    monkeypatch.setenv("OPENAI_API_KEY", "the refiner's")
    assert _parser().parse_args(step).api_key == "the refiner's"


def test_sampling_and_places_from_the_environment(monkeypatch):
    monkeypatch.setenv("MINIGPT4_TEMPERATURE", "0")
    monkeypatch.setenv("MINIGPT4_PROJECTION", "mine.safetensors")
    chosen = _parser().parse_args(["ask", "photo.jpg", "What?"])
    assert (chosen.temperature, chosen.projection) == (0.0, "mine.safetensors")


@pytest.mark.parametrize(
    "command",
    ["", "ask", "chat", "serve", "train", "evaluate", "curate", "convert", "download"]
    + [f"curate {step}" for step in ("generate", "refine", "filter", "review", "merge", "export")],
)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0 and "usage: minigpt4" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from minigpt4.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers', 'gradio', 'numpy', 'PIL'} & sys.modules.keys()))"
    )
    seconds: dict[str, list[float]] = {code: [], "pass": []}
    for program in [*seconds] * 3:  # the quickest counts: others use this machine as well
        started = time.perf_counter()
        python("-c", program)
        seconds[program].append(time.perf_counter() - started)
    assert min(seconds[code]) < 30 * min(seconds["pass"])  # Python alone; 5 to 15 times here


def test_every_environment_variable_has_one_meaning():
    found: dict[str, Option] = {}

    def walk(parser: Parser) -> None:
        for option in parser._declared:
            variable = option.environment
            assert found.setdefault(variable, option).name == option.name, variable
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    walk(command)

    walk(_parser())
    assert len(found) > 80


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("max-new-tokens", "0", "must be an integer from 1 up to 100000"),
        ("num-beams", "2.5", "must be an integer from 1 up to 16"),
        ("top-p", "0", "must be a number above 0.0 up to 1.0"),
        ("top-p", "nan", "must be a number above 0.0 up to 1.0"),
        ("temperature", "0.001", "must be 0, or a number from 0.01 up to 10.0"),
        ("seed", "-2", "must be an integer from 0 up to 9223372036854775807, or -1 for a new one"),
    ],
)
def test_settings_of_the_sampling_have_one_sentence_everywhere(name, value, sentence, capsys):
    with pytest.raises(SystemExit):
        main(["ask", "a.jpg", "What?", f"--{name}", value])
    said = capsys.readouterr().err
    assert f"--{name}: {sentence}" in said and f"not “{value}”" in said
    with pytest.raises(UserError, match=f"^{name.replace('-', '_')} {sentence}"):
        Sampling(**{name.replace("-", "_"): 0.001 if name == "temperature" else -2})


def test_the_sampling_has_an_option_for_each_setting():
    assert [option.attribute for option in SAMPLING] == [*SAMPLING_RANGES]


def test_a_seed_of_minus_one_is_a_new_one(monkeypatch):
    """As clients of llama.cpp, vLLM and Ollama mean it; another in the environment gives way."""
    monkeypatch.setenv("MINIGPT4_SEED", "7")
    given = given_sampling(_parser().parse_args(["ask", "a.jpg", "What?", "--seed", "-1"]))
    assert Sampling(**given) == Sampling(seed=-1) == Sampling(seed=None)


def test_a_question_may_come_after_the_options(capsys, monkeypatch, tmp_path):
    asked = _parser().parse_args(["ask", "a.jpg", "--model", "nano", "What is it?"])
    assert asked.photos == ["a.jpg", "What is it?"] and asked.model == "nano"
    with pytest.raises(SystemExit):
        _parser().parse_args(["ask", "a.jpg", "--max-tokens", "6", "What is it?"])
    said = "--max-tokens; did you mean --max-new-tokens? (see minigpt4 ask --help)"
    assert f"unrecognized arguments: {said}" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-b.jpg").touch()
    with pytest.raises(SystemExit):
        _parser().parse_args(["ask", "-b.jpg", "a.jpg", "What is it?"])
    assert "-b.jpg; for the file write ./-b.jpg (see" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        _parser().parse_args(["ask", "a.jpg", "What is it?", "--out", "-"])
    assert "for standard output write /dev/stdout" in capsys.readouterr().err
    picture = tmp_path / "b.jpg"
    Image.new("RGB", (8, 8)).save(picture)
    assert main(["ask", "a.jpg", str(picture)]) == 2
    assert "give the question after the pictures" in capsys.readouterr().err
