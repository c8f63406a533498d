"""Command-line options: how one is declared, read and checked, and those that commands share.

An `Option` is declared once. On the command line it is `--max-queue 8`, in the environment
`MINIGPT4_MAX_QUEUE=8`, and for `serve run` on Ray `max_queue=8`. All three are read and checked by
the same function. The command line takes precedence over the environment.

Nothing here imports torch.
"""

import argparse
import os
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, NoReturn

from minigpt4.config import MODELS, SAMPLING_RANGES, wrong_setting
from minigpt4.data.files import read_settings
from minigpt4.errors import UserError

ON, OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off")

# --- values -----------------------------------------------------------------------------------


def switch(text: str) -> bool:
    """1, true, yes, on or 0, false, no, off, in any case."""
    if text.lower() in ON:
        return True
    if text.lower() in OFF:
        return False
    raise ArgumentTypeError(f"must be on or off (or 1, 0, true, false, yes, no), not “{text}”")


def integer(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """A reader of integers from `least` to `most`."""

    def read(text: str) -> int:
        value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,19}", text.strip()) else None
        return _within("an integer", text, value, least, most)

    return read


def number(
    least: float | None = None, below: float | None = None, most: float | None = None
) -> Callable[[str], float]:
    """A reader of finite numbers from `least` to `most`, or less than `below`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = None
        if value is not None and not abs(value) < float("inf"):
            value = None
        return _within("a number", text, value, least, most, below)

    return read


def setting(name: str) -> Callable[[str], Any]:
    """A reader of a setting of the sampling, in its range."""
    parse = integer() if isinstance(SAMPLING_RANGES[name][0], int) else number()

    def read(text: str) -> Any:
        try:
            value = parse(text)
        except ArgumentTypeError:
            value = None
        if wrong := wrong_setting(name, value):
            raise ArgumentTypeError(f"{wrong}, not “{text}”")
        return value

    return read


def a_name(text: str) -> str:
    """The name of a file or folder to write; an empty one would be the current folder."""
    if not text.strip():
        raise ArgumentTypeError("must be a name, not empty: check the variable that it comes from")
    if text == "-":
        raise ArgumentTypeError("must be a name: for standard output write /dev/stdout")
    return text


def secret(text: str) -> str:
    """A key that fits into a header, without the line break at the end of files of secrets."""
    key = text.strip()
    if not (key and key.isascii() and key.isprintable()):
        raise ArgumentTypeError("must be ASCII characters without line breaks, and not be empty")
    return key


def one_of(*names: str) -> Callable[[str], str]:
    """A reader of one of these words."""

    def read(text: str) -> str:
        if text not in names:
            raise ArgumentTypeError(f"must be one of {', '.join(names)}, not “{text}”")
        return text

    return read


def _within(kind, text, value, least=None, most=None, below=None):
    if (
        value is None
        or (least is not None and value < least)
        or (most is not None and value > most)
        or (below is not None and value >= below)
    ):
        if most is not None:
            kind += f" from {least} to {most}"
        elif least is not None:
            kind += f" of at least {least}" + ("" if below is None else f" and less than {below}")
        raise ArgumentTypeError(f"must be {kind}, not “{text}”")
    return value


# --- options ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One option, for example `Option("max-queue", "Waiting requests.", 32, integer(1))`.

    read: turns its text into its value; raises ArgumentTypeError. `switch` makes a flag without a
    value. many: may be given several times; the value is a list. bare: the text if it is given
    without a value. variable: its environment variable, if that is not the derived name. fallback:
    a second variable, read if the first is not set. needs: other options, without which this one
    does nothing: it is refused on the command line unless one of these has a value.
    """

    name: str
    help: str
    default: Any = None
    read: Callable[[str], Any] = str
    metavar: str | None = None
    required: bool = False
    many: bool = False
    bare: str | None = None
    variable: str = ""
    fallback: str = ""
    needs: tuple[str, ...] = ()

    @property
    def attribute(self) -> str:
        """Its name as an attribute of the parsed options."""
        return self.name.replace("-", "_")

    def flag(self, value: Any) -> str:
        """The option as the command line gives it this value."""
        return f"--{'no-' if self.read is switch and value is False else ''}{self.name}"

    @property
    def environment(self) -> str:
        """The name of its environment variable."""
        return self.variable or f"MINIGPT4_{self.attribute.upper()}"

    def from_environment(self) -> Any:
        """Its value from the environment, else its default. UserError for an invalid value."""
        for variable in filter(None, (self.environment, self.fallback)):
            if text := os.environ.get(variable):
                try:
                    value = self.read(text)
                except ArgumentTypeError as error:
                    raise UserError(f"Environment variable {variable} {error}.") from None
                return [value] if self.many else value
        return [] if self.many else self.default


# Variables from which the Hugging Face hub's client makes integers without checking them.
HUB_INTEGERS = ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT")


def check_integers(names: Iterable[str]) -> None:
    """UserError for one of these environment variables that a library would fail on."""
    for name in names:
        text = os.environ.get(name)
        if text is None or (name.endswith("_CONCURRENCY_LIMIT") and text.lower() in ("", "none")):
            continue
        try:
            int(text)
        except ValueError:
            raise UserError(
                f"Environment variable {name} must be an integer, not “{text}”: correct it."
            ) from None


class Parser(argparse.ArgumentParser):
    """An argument parser that takes options that are not on the command line from the
    environment."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)
        self.reads_file = ""  # the option that names a file of options, such as "--options"
        self.gathers = ""  # the positional argument that may continue after options
        self._declared: list[Option] = []

    def add(self, options: Iterable[Option], title: str = "", prefix: str = "") -> None:
        """Add options in a help group with this title.

        prefix: begins the names of their environment variables, such as "TRAIN_".
        """
        group = self.add_argument_group(title) if title else self
        for option in options:
            variable = option.variable or f"MINIGPT4_{prefix}{option.attribute.upper()}"
            option = replace(option, variable=variable)
            self._declared.append(option)
            notes = [f"${variable}"]
            if option.default not in (None, "", False):
                notes.insert(0, f"default: {option.default}")
            text = f"{option.help} [{'; '.join(notes)}]".replace("%", "%%")
            settings: dict[str, Any] = {"help": text}
            if option.read is switch:
                settings["action"] = argparse.BooleanOptionalAction
            else:
                last_word = option.name.rpartition("-")[2].upper()
                settings |= {"type": option.read, "metavar": option.metavar or last_word}
            if option.many:
                settings["action"] = "append"
            if option.bare is not None:
                settings |= {"nargs": "?", "const": option.bare}
            group.add_argument(
                f"--{option.name}",
                dest=option.attribute,
                default=argparse.SUPPRESS,
                required=option.required and not os.environ.get(variable),
                **settings,
            )

    def parse_known_args(self, args=None, namespace=None):  # also called for each subcommand
        if self.reads_file and args is not None:
            try:
                args = [*self._arguments_of_file(args), *args]
            except UserError as error:
                self.error(str(error).removesuffix("."))
        found, rest = super().parse_known_args(args, namespace)
        if self.gathers:
            getattr(found, self.gathers).extend(text for text in rest if not text.startswith("-"))
            rest = [text for text in rest if text.startswith("-")]
        if rest:
            near = get_close_matches(rest[0].partition("=")[0], self._option_string_actions, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            hint = f"; for the file write ./{rest[0]}" if os.path.exists(rest[0]) else hint
            self.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        given = [option for option in self._declared if hasattr(found, option.attribute)]
        try:
            for option in self._declared:
                if option not in given:
                    setattr(found, option.attribute, option.from_environment())
            check_needs(found, {option: option.needs for option in given})
        except UserError as error:
            self.error(str(error).removesuffix("."))
        return found, rest

    def _arguments_of_file(self, args: list[str]) -> list[str]:
        """The options of the file that the arguments name, to be put before these. Options that may
        be given several times are left out if they are among the arguments."""
        own = next(option for option in self._declared if f"--{option.name}" == self.reads_file)
        named = [i for i, text in enumerate(args) if text.partition("=")[0] == self.reads_file]
        if len(named) > 1:
            raise UserError(f"“{self.reads_file}” is given twice: put all options into one file.")
        if named:
            _, equals, path = args[named[-1]].partition("=")
            path = path if equals else "".join(args[named[-1] + 1 : named[-1] + 2])
        else:
            path = own.from_environment()
        if not path:
            return []
        options = {option.attribute: option for option in self._declared}
        settings = read_settings(path)
        attributes = [str(name).replace("-", "_") for name in settings]
        found = []
        for attribute, (name, value) in zip(attributes, settings.items(), strict=True):
            option = options.get(attribute)
            if attributes.count(attribute) > 1:
                raise UserError(f"{path} has “{name}” twice, with “-” and “_”: remove one.")
            if option is None or option is own:
                raise UserError(f"{path} has “{name}”, which is not an option of {self.prog}.")
            if option.many and any(a.partition("=")[0] == f"--{option.name}" for a in args):
                continue
            if option.read is switch and value is not None:
                try:
                    found.append(option.flag(switch(str(value))))
                except ArgumentTypeError as error:
                    raise UserError(f"“{name}” in {path} {error}.") from None
                continue
            values = value if isinstance(value, list) else [value]
            if len(values) > 1 and not option.many:
                raise UserError(f"“{name}” in {path} must be a single value.")
            found += [f"--{option.name}={text}" for text in values if text is not None]
        return found

    def error(self, message: str) -> NoReturn:
        """Print one line, as for every other mistake, instead of the whole usage."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def check_needs(values: Namespace, needs: Mapping[Option, Sequence[str]]) -> None:
    """UserError for an option that has a value, and none of those that it needs."""
    for option, names in needs.items():
        met = not names or any(getattr(values, name.replace("-", "_"), None) for name in names)
        value = getattr(values, option.attribute)
        if not met and value != option.default:
            others = " or ".join(f"“--{name}”" for name in names)
            that = "that" if len(names) == 1 else "one of them"
            raise UserError(
                f"“{option.flag(value)}” belongs to {others}: give {that}, too, or omit it."
            )


def from_mapping(options: Iterable[Option], given: Mapping[str, Any]) -> Namespace:
    """Options given as NAME=VALUE, as Ray passes them, or else from the environment.

    UserError for an unknown name or an invalid value.
    """
    known = {option.attribute: option for option in options}
    if unknown := given.keys() - known.keys():
        raise UserError(f"There is no option {sorted(unknown)[0]}: choose from {', '.join(known)}.")
    values = {}
    for name, option in known.items():
        if given.get(name) is None:
            values[name] = option.from_environment()
            continue
        try:
            values[name] = option.read(str(given[name]))
        except ArgumentTypeError as error:
            raise UserError(f"Option {name} {error}.") from None
    found = Namespace(**values)
    check_needs(found, {o: o.needs for n, o in known.items() if given.get(n) is not None})
    return found


# --- options that several commands share --------------------------------------------------------

MODEL = Option("model", f"Model: auto, {', '.join(MODELS)}.", "auto", str.strip, "NAME")
QUANTIZE = Option(
    "quantize",
    "Precision of the language model's weights. auto: w8a16 (int8 weights, 16-bit activations) for "
    "large models on a GPU, 4 bits on a CPU.",
    "auto",
    one_of("auto", "w8a16", "int8", "nf4", "int4", "none"),
    metavar="{auto,w8a16,int8,nf4,int4,none}",
)
DTYPE = Option(
    "dtype",
    "Floating-point type of a language model that is not quantized. auto: float16 on a GPU "
    "(bfloat16 in training); on a CPU, bfloat16 if the processor computes in it, else float32.",
    "auto",
    one_of("auto", "float32", "bfloat16"),
    metavar="{auto,float32,bfloat16}",
)
DEVICE = Option("device", "Device: auto, cpu, cuda or cuda:N.", "auto", metavar="NAME")
PLACES = (
    Option(
        "projection", "Trained projection; with --model auto it selects the model.", metavar="PLACE"
    ),
    Option("vision", "Visual encoder.", metavar="PLACE"),
    Option("qformer", "BLIP-2's Q-Former.", metavar="PLACE"),
    Option("llm", "Language model.", metavar="PLACE"),
)
REMOTE_LLM = (
    Option(
        "llm-url",
        "Addresses of vLLM servers, separated by commas: http://HOST:8000/v1,… They must run with "
        "--enable-prompt-embeds.",
        metavar="URLS",
    ),
    Option(
        "llm-key",
        "The API key of these servers. Prefer the environment variable: other users of this "
        "machine can see command lines.",
        "",
        secret,
        metavar="KEY",
        needs=("llm-url",),
    ),
)
EMBEDDINGS_MB = Option(
    "embeddings-mb",
    "Disk space for the embeddings of pictures that large models encode on a CPU, in MB; 0 keeps "
    "none.",
    200,
    integer(0, 1_000_000),
    "MB",
)
# The options of minigpt4.load, which also reads them from the environment.
LOADING = (MODEL, QUANTIZE, DTYPE, DEVICE, *PLACES, *REMOTE_LLM, EMBEDDINGS_MB)
SAMPLING = tuple(
    Option(name, help, None, setting(name.replace("-", "_")))
    for name, help in {
        "temperature": "Randomness; 0 always takes the most likely token.",
        "top-p": "Sample from the most likely tokens up to this total probability.",
        "top-k": "Sample from this many most likely tokens; 0 for no limit.",
        "min-p": "Exclude tokens less likely than this share of the most likely one.",
        "repetition-penalty": "Above 1, repeated tokens become less likely.",
        "max-new-tokens": "Maximum length of an answer, in tokens.",
        "num-beams": "Beam width; above 1, beam search replaces sampling.",
        "seed": "Random seed; the same seed gives the same answer, -1 another one each time.",
        "presence-penalty": "Subtracted from the scores of tokens that the answer already has.",
        "frequency-penalty": "Subtracted once for each time that the answer already has the token.",
    }.items()
)
PUSH = (Option("private", "Make a new repository private.", False, switch),)
ASK = (Option("out", "Write the answers as JSON lines, one for each photo.", None, a_name, "FILE"),)


def add_model_options(parser: Parser, default: str = "auto", several: bool = False) -> None:
    """--model, --quantize, --dtype, --device, and where the weights are.

    several: --model may name several models.
    """
    model = replace(MODEL, default=default)
    if several:
        model = replace(model, help=f"{MODEL.help} Or several, as in nano,mini.")
    parser.add((model, QUANTIZE, DTYPE, DEVICE), "model")
    add_places(parser)


def add_places(parser: Parser) -> None:
    """--projection, --vision, --qformer, --llm: replace parts of the model's weights."""
    parser.add(PLACES, "weights (a path, a URL, or OWNER/NAME or OWNER/NAME:FILE on Hugging Face)")


def add_remote_llm_options(parser: Parser) -> None:
    """--llm-url, --llm-key: the language model runs on other machines."""
    parser.add(REMOTE_LLM, "language model on other machines")


def add_sampling_options(parser: Parser) -> None:
    """--temperature, --top-p, ...; their defaults are the model's."""
    parser.add(SAMPLING, "answer (by default as the model's configuration says)")
