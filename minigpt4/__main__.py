"""The command line: minigpt4 ask, chat, serve, train, evaluate, curate, convert, download, push"""

import sys

try:
    import argparse
    import os
    import re
    import shlex
    from collections.abc import Callable
    from contextlib import ExitStack, closing, suppress
    from pathlib import Path
    from threading import Thread
    from typing import TYPE_CHECKING

    from minigpt4 import start
    from minigpt4.config import MODELS, get_model
    from minigpt4.curation import options as curation
    from minigpt4.errors import DISK_FULL, Unfailing, UserError, out_of_memory
    from minigpt4.evaluation import options as evaluation
    from minigpt4.options import (
        ASK,
        EMBEDDINGS_MB,
        HUB_INTEGERS,
        PUSH,
        Parser,
        add_model_options,
        add_places,
        add_remote_llm_options,
        add_sampling_options,
        check_integers,
    )
    from minigpt4.training import options as training
    from minigpt4.web import run as server
    from minigpt4.web.options import add_options
except KeyboardInterrupt:  # the imports above take a moment: no traceback for a Ctrl-C
    sys.exit(130)

if TYPE_CHECKING:
    from minigpt4.conversation import Conversation


NO_MEMORY = "There is too little memory: close other programs, or raise the limit on memory."
COMMANDS = "/image FILE adds a picture, /new starts again, /quit ends."


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    if sys.stderr is None:  # closed, as with 2>&-: messages for it would go elsewhere
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = Unfailing(sys.stderr)
    options = argparse.Namespace()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # so that characters the terminal lacks are replaced
            stream.reconfigure(errors="replace")
    try:
        _check_folder()
        options = _parser().parse_args(arguments)
        check_integers(HUB_INTEGERS)
        if sys.stdout is None and options.run in (_ask, _chat) and not getattr(options, "out", ""):
            raise UserError("Standard output is closed: open it, as answers are written there.")
        options.run(options)
    except UserError as error:
        print(f"minigpt4: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has ended, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, MemoryError, ImportError, RuntimeError) as error:
        if out_of_memory(error):
            print(f"minigpt4: {NO_MEMORY}", file=sys.stderr)
            return 2
        if not isinstance(error, OSError):
            raise
        written = error.filename or getattr(options, "out", None)
        print(f"minigpt4: {_sentence_for(error, written)}", file=sys.stderr)
        return 2
    return 0


def _check_folder() -> None:
    """UserError if the current folder was deleted: the libraries cannot be loaded there."""
    try:
        os.getcwd()
    except OSError:
        raise UserError("The current folder is gone: change to another one.") from None


def _sentence_for(error: OSError, written: str | None) -> str:
    """What the system refused, and what to do. written: the output file or folder, if known."""
    name = error.filename or "A file"
    match error:
        case FileNotFoundError() | NotADirectoryError():
            return f"{name} cannot be opened: check that its folder exists, and the spelling."
        case IsADirectoryError():
            return f"{name} is a folder: name a file."
        case PermissionError():
            return f"{name} may not be read or written: change its permissions, or name another."
    if error.errno in DISK_FULL:
        path = os.path.abspath(written or "")
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        disk = f"The disk of {folder}" if written else "The disk"
        return f"{disk} {DISK_FULL[error.errno]}, then do it again."
    reason = error.strerror or "the disk or a device failed"
    return f"{name} cannot be used ({reason}): check the path and its disk."


# --- options ------------------------------------------------------------------------------------


def _parser() -> Parser:
    from minigpt4 import __version__

    parser = Parser(
        prog="minigpt4",
        description="Chat about pictures, and train the model that does.",
        epilog="Options can also be set by the environment variables that each command's --help "
        "names. The command line takes precedence.",
    )
    parser.add_argument("--version", action="version", version=f"minigpt4 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, summary: str, about: str | None = None) -> Parser:
        added = commands.add_parser(name, help=summary, description=about)
        added.set_defaults(run=run)
        return added

    asking = command("ask", _ask, "answer a question about one photo or many")
    asking.add_argument(
        "photos", nargs="+", metavar="photo", help="Picture files or folders, then the question."
    )
    asking.gathers = "photos"
    asking.add(ASK, prefix="ASK_")
    chatting = command("chat", _chat, "chat about photos in the terminal")
    chatting.add_argument("photos", nargs="*", metavar="photo", help="Picture files.")
    for answering in (asking, chatting):
        add_model_options(answering)
        add_remote_llm_options(answering)
        answering.add([EMBEDDINGS_MB])
        add_sampling_options(answering)
    serving = command("serve", server.serve, "serve the chat page and the API", server.DESCRIPTION)
    add_options(serving)
    training.add_options(command("train", _train, "train the projection (stage 1 or 2)"))
    scoring = "score answers, or run one of the paper's experiments"
    evaluation.add_options(command("evaluate", _evaluate, scoring))
    curating = commands.add_parser("curate", help="make detailed descriptions for stage 2")
    curation.add_commands(curating)
    converting = command("convert", _convert, "save a projection as a small safetensors file")
    converting.add_argument("checkpoint", help="pretrained_minigpt4*.pth, or the file of a run.")
    converting.add_argument("out", help="FILE.safetensors")
    downloading = command("download", _download, "download a model's weights")
    downloading.add_argument("model", choices=MODELS)
    add_places(downloading)
    pushing = command("push", _push, "send a trained projection to the Hugging Face hub")
    pushing.add_argument("projection", help="A file that “train” wrote, or the folder of its run.")
    pushing.add_argument("repository", metavar="USER/NAME")
    pushing.add(PUSH, prefix="PUSH_")
    return parser


# --- commands -----------------------------------------------------------------------------------


def _ask(options: argparse.Namespace) -> None:
    from minigpt4.batch import ask_photos, not_asked_yet
    from minigpt4.conversation import Conversation, ask
    from minigpt4.model import image

    *photos, question = options.photos
    if not photos:
        raise UserError('Give a photo and a question: ask PHOTO "What is in this picture?".')
    if not question.strip():
        raise UserError("The question is empty: write one after the pictures.")
    if image.has_picture_name(question) and Path(question).is_file():
        raise UserError(f"{question} is a picture: give the question after the pictures.")
    question = os.fsencode(question).decode("utf-8", "replace")  # whatever the locale
    given = start.given_sampling(options)
    if options.out and image.has_picture_name(options.out):  # writing would destroy a photo
        raise UserError(
            f"“--out” {options.out} has the name of a picture: name a file such as answers.jsonl."
        )
    paths = _photos(photos)
    single = len(paths) == 1 and not options.out
    conversation = Conversation()
    if single:  # before the model is loaded, so that a mistake shows at once
        conversation.add_question(question, [image.load(paths[0], whole_path=True)])
    with ExitStack() as held:
        left = paths
        if options.out:
            left = held.enter_context(not_asked_yet(paths, question, options.out))
        if not left:
            return
        engine = held.enter_context(closing(start.open_engine(options)))
        sampling = start.default_sampling(engine.model.config, **given)
        if single:
            for text in ask(engine, conversation, sampling):
                print(text, end="", flush=True)
            print()
        else:
            kept = len(paths) - len(left)
            ask_photos(engine, left, question, sampling, options.out, kept)


def _photos(named: list[str]) -> list[Path]:
    """The picture files, and those of folders. A missing one is reported when its turn comes.

    UserError if half of the named files or more are missing.
    """
    from minigpt4.model import image

    if "-" in named and not os.path.exists("-"):
        raise UserError("A picture is not read from standard input: save it, and name the file.")
    paths, missing = [], []
    for name in map(os.path.expanduser, named):
        try:
            found = image.list_pictures(name)
        except UserError as error:
            paths.append(Path(name))
            missing.append((name, error))
        else:
            paths += found
            _name_others(Path(name), found)
    if 2 * len(missing) >= len(named):
        name, first = missing[0]
        if not name or os.path.exists(name) or image.has_picture_name(name):
            raise first
        raise UserError(
            f"{image.shown_name(Path(name), whole=True)} does not exist: check the path and its "
            "spelling, and put the whole question in quotes."
        )
    return paths


def _name_others(folder: Path, pictures: list[Path]) -> None:
    """Say what else is in a folder of pictures, apart from hidden files."""
    from minigpt4.model import image

    if not folder.is_dir():
        return
    others = sorted(
        image.shown_name(path)
        for path in folder.iterdir()
        if path not in pictures and not path.name.startswith(".")
    )
    if others:
        more = ", …" if len(others) > 5 else ""
        start.say(
            f"{image.shown_name(folder, whole=True)} holds {len(pictures)} photos. Left out, since "
            f"they are no picture files: {', '.join(others[:5])}{more}"
        )


def _chat(options: argparse.Namespace) -> None:
    from minigpt4.conversation import Conversation
    from minigpt4.model import image

    with suppress(ImportError):  # with it, input() edits lines and keeps a history
        import readline  # noqa: F401

    photos = [*map(os.path.expanduser, options.photos)]
    for name in photos:
        if not (os.path.exists(name) or image.has_picture_name(name)) and " " in name:
            raise UserError(f"{name} is no picture file: ask when the chat has started.")
    pictures = [image.load(path, whole_path=True) for path in photos]
    given = start.given_sampling(options)
    with closing(start.open_engine(options)) as engine:
        sampling = start.default_sampling(engine.model.config, **given)
        conversation = Conversation()
        _look_ahead(engine, conversation, pictures)
        start.say(f"Ask a question. {COMMANDS}")
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, RuntimeError):  # the input has ended, or was closed from the start
                return
            try:
                match line.split(maxsplit=1):
                    case []:
                        continue
                    case ["/quit" | "/exit"]:
                        return
                    case ["/new"]:
                        conversation, pictures = Conversation(), []
                    case ["/image"]:
                        start.say("Name the picture: /image FILE.")
                    case ["/image", path]:
                        pictures.append(image.load(_typed(path), whole_path=True))
                        _look_ahead(engine, conversation, pictures)
                    case [word, *_] if re.fullmatch(r"/\w*", word):  # a path has more
                        start.say(f"There is no command “{line}”. {COMMANDS}")
                    case _:
                        conversation = _turn(engine, conversation, line, pictures, sampling)
                        pictures = []
            except UserError as error:  # the conversation stays as it was: ask again
                start.say(str(error))


def _typed(path: str) -> str:
    """A path that was typed, or pasted by a terminal: perhaps in quotes, or with backslashes."""
    if not os.path.exists(path):
        with suppress(ValueError):  # an apostrophe
            path = " ".join(shlex.split(path))
    return os.path.expanduser(path)


def _look_ahead(engine, conversation: "Conversation", pictures) -> None:
    """While the user types, encode the pictures and compute the prompt before the question."""
    from minigpt4.conversation import read_ahead

    def read(pictures: list) -> None:
        with suppress(UserError):  # the answer reports it
            for picture in pictures:
                engine.encode(picture)
            read_ahead(engine, conversation, pictures)

    Thread(target=read, args=([*pictures],), name="looking ahead", daemon=True).start()


def _turn(engine, conversation: "Conversation", question: str, pictures, sampling):
    """Ask, and print the answer as it comes. Returns the conversation with both. Ctrl-C stops the
    answer."""
    from minigpt4.conversation import Conversation, ask

    conversation = Conversation([*conversation.messages], {**conversation.pictures})
    conversation.add_question(question, pictures)
    answer = ask(engine, conversation, sampling)
    if answer.notice:
        start.say(answer.notice)
    try:
        for text in answer:
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        answer.close()
    finally:
        print()
    conversation.add_answer(answer.text)
    return conversation


def _need(*packages: str) -> None:
    """UserError if a package that only training and evaluation use is not installed."""
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(f"Install {', '.join(missing)} first: pip install 'minigpt4[train]'.")


def _train(options: argparse.Namespace) -> None:
    start.check_limit()
    _need("matplotlib", "yaml")
    from minigpt4.training.run import train

    train(options)


def _evaluate(options: argparse.Namespace) -> None:
    start.check_limit()
    if options.experiment in (None, "captions"):
        _need("pycocoevalcap")
    elif options.experiment == "abilities" and options.judge:
        _need("openai")
    from minigpt4.evaluation.run import evaluate

    evaluate(options)


def _convert(options: argparse.Namespace) -> None:
    start.check_limit()
    from minigpt4.config import model_of_projection
    from minigpt4.weights.adapters import trained_tensors
    from minigpt4.weights.checkpoint import save_projection

    out = Path(options.out)
    if out.suffix != ".safetensors":
        raise UserError(f"{out} should end in .safetensors.")
    if out.exists() and out.resolve() == Path(options.checkpoint).resolve():
        raise UserError(f"{out} is {options.checkpoint} itself: name another file to write.")
    tensors = trained_tensors(options.checkpoint)
    save_projection(tensors, out)
    rows, columns = tensors["weight"].shape
    owner = model_of_projection(rows, columns) or "no known model"
    print(f"{out}: a projection from {columns} to {rows} ({owner}), {out.stat().st_size:,} bytes.")


def _push(options: argparse.Namespace) -> None:
    start.check_limit()
    from minigpt4.weights.share import push

    start.say(
        f"The projection is at {push(options.projection, options.repository, options.private)}."
    )


def _download(options: argparse.Namespace) -> None:
    start.check_limit()
    from minigpt4.weights.load import download_weights, find_weights
    from minigpt4.weights.sources import missing

    config = get_model(options.model)
    given = start.given_places(options)
    lacked = missing(config, given)
    download_weights(config, start.say, given)
    files = find_weights(config, given=given)
    if not lacked:
        start.say(f"The weights of {config.name} are there: nothing had to be fetched.")
    device = start.device_of("auto")
    start.prepare(config, files, start.quantize_of("auto", config, device))


if __name__ == "__main__":
    sys.exit(main())
