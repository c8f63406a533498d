"""python -m minigpt4 ask | chat | train | evaluate | curate | convert | download"""

import argparse
import json
import os
import sys
from pathlib import Path

from minigpt4 import start
from minigpt4.config import MODELS, get_model
from minigpt4.curation.options import add_commands as add_curation
from minigpt4.errors import UserError
from minigpt4.evaluation import options as evaluation

ANSWERED_TOGETHER = 8  # photos of a folder


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    options = _parser().parse_args(arguments)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what cannot be written or read is no reason to end
            stream.reconfigure(errors="replace")
    try:
        options.run(options)
    except UserError as error:
        print(f"minigpt4: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        print(f"minigpt4: {name}{error.strerror or 'the disk or a device failed'}", file=sys.stderr)
        return 2
    return 0


def _count(text: str) -> int:
    """A whole number from 1 up, as an option's value."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"“{text}” is no whole number from 1 up")
    return int(text)


def _share(text: str) -> float:
    """A number from 0 to below 1, as an option's value."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"“{text}” is no number from 0 to below 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m minigpt4", description="Chat about pictures, and train the model that does."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    ask = commands.add_parser("ask", help="answer a question about one photo, or about many")
    ask.add_argument("photos", nargs="+", help="picture files or folders, then the question")
    ask.add_argument("--out", metavar="FILE", help="write answers as JSON lines, one a photo")
    start.add_model_options(ask)
    start.add_server_options(ask)
    start.add_sampling_options(ask)
    ask.set_defaults(run=_ask)

    chat = commands.add_parser("chat", help="talk about a photo in the terminal")
    chat.add_argument("photos", nargs="*", metavar="photo")
    start.add_model_options(chat)
    start.add_server_options(chat)
    start.add_sampling_options(chat)
    chat.set_defaults(run=_chat)

    train = commands.add_parser("train", help="train the projection (stage 1 or 2)")
    train.add_argument("--stage", type=int, choices=[1, 2], help="not for mini, which has one")
    train.add_argument(
        "--data",
        required=True,
        help="a folder of pictures with a table of captions (CSV or JSON lines); stage 1: or "
        "shards (a path, a glob, {00000..00007}); stage 2: or filter_cap.json + image/",
    )
    train.add_argument("--out", default="runs/train", help="folder of the run (it resumes there)")
    train.add_argument(
        "--init", metavar="FILE", help="projection to start from (stage 2: stage 1's)"
    )
    train.add_argument(
        "--instructions", metavar="FILE", help="stage 2: JSON lines of question pairs"
    )
    train.add_argument(
        "--replay", metavar="DATA", help="stage 2: captions (as stage 1's) to mix in, unforgotten"
    )
    train.add_argument("--replay-share", type=_share, default=0.33, help="their share of a batch")
    train.add_argument(
        "--blend",
        type=float,
        default=1.0,
        help="write this share of what was learned and the rest of --init (default: 1)",
    )
    train.add_argument(
        "--samples",
        type=int,
        default=0,
        help="draw this many captions a picture (of --replay's, or in stage 1 of all that have "
        "several) and learn from their CIDEr",
    )
    train.add_argument(
        "--reward-weight",
        type=float,
        default=2.0,
        help="how much those captions count beside what is taught (default: 2)",
    )
    train.add_argument("--steps", type=_count)
    train.add_argument(
        "--consensus",
        type=float,
        default=0.0,
        metavar="T",
        help="weigh a picture's captions by how well they agree, the more so the smaller T is",
    )
    train.add_argument(
        "--denoise",
        type=float,
        default=0.0,
        metavar="C",
        help="nano: hear less of what a picture and its mirror image differ in (1 is a good value)",
    )
    train.add_argument(
        "--crop",
        action="store_true",
        help="nano: show a random part of each picture, as the big models' training always does",
    )
    train.add_argument(
        "--questions",
        type=int,
        default=0,
        metavar="N",
        help="ask of N captioned pictures what is there and what is not (yes or no)",
    )
    train.add_argument("--batch-size", type=_count, help="pictures a step, over all processes")
    train.add_argument("--peak-lr", type=float)
    train.add_argument("--seed", type=int, default=42)
    train.add_argument("--limit", type=_count, help="use the first N pictures only")
    train.add_argument(
        "--cache", metavar="DIR", help="keep the frozen encoder's features here (small data sets)"
    )
    train.add_argument(
        "--threads", type=_count, default=2, help="mini: processor threads (default: 2)"
    )
    train.add_argument(
        "--refit", action="store_true", help="mini: fit the word head anew, also where it is there"
    )
    train.add_argument(
        "--validate", action="store_true", help="mini: measure what the run has learned, and end"
    )
    train.add_argument("--no-words", action="store_true", help="with --validate: list no words")
    start.add_model_options(train, default="nano")
    train.set_defaults(run=_train)

    evaluate = commands.add_parser(
        "evaluate",
        help="score answers on captioned pictures, or run one of the paper's experiments",
    )
    evaluation.add_options(evaluate, _count)
    start.add_model_options(evaluate, default="nano")
    evaluate.set_defaults(run=_evaluate)

    curate = commands.add_parser("curate", help="make a set of detailed descriptions for stage 2")
    add_curation(curate)

    convert = commands.add_parser("convert", help="write a projection as a small safetensors file")
    convert.add_argument("checkpoint", help="pretrained_minigpt4*.pth, or a training run's file")
    convert.add_argument("out", help="FILE.safetensors")
    convert.set_defaults(run=_convert)

    download = commands.add_parser("download", help="fetch a model's weights")
    download.add_argument("model", choices=list(MODELS))
    start.add_places(download)
    download.set_defaults(run=_download)
    return parser


def _ask(options: argparse.Namespace) -> None:
    from minigpt4.conversation import Conversation, ask
    from minigpt4.model import image

    *photos, question = options.photos
    if not photos:
        raise UserError('Give a photo and a question: ask PHOTO "What is this?".')
    given = start.given_sampling(options)
    paths = [path for photo in photos for path in image.list_pictures(photo)]
    if len(paths) == 1 and not options.out:
        picture = image.load(paths[0])  # before the model is loaded: a typing error shows at once
    engine = start.open_engine(options)
    sampling = start.default_sampling(engine.model.config, **given)
    if len(paths) == 1 and not options.out:
        conversation = Conversation()
        conversation.add_question(question, [picture])
        for piece in ask(engine, conversation, sampling):
            print(piece, end="", flush=True)
        print()
        return
    _ask_many(engine, paths, question, sampling, options.out)


def _ask_many(engine, paths: list[Path], question: str, sampling, out: str | None) -> None:
    """One question about many photos: JSON lines to `out` (or answers to stdout)."""
    from collections import deque
    from contextlib import nullcontext

    from tqdm import tqdm

    from minigpt4.conversation import Answer, Conversation, ask
    from minigpt4.model import image

    def begin(path: Path) -> "Answer | UserError":
        try:
            conversation = Conversation()
            conversation.add_question(question, [image.load(path)])
            return ask(engine, conversation, sampling)
        except UserError as error:  # one bad photo does not end a long run
            return error

    def finish(path: Path, answer: "Answer | UserError") -> None:
        name = str(path).encode("utf-8", "replace").decode("utf-8")
        record = {"photo": name, "question": question}
        try:
            if isinstance(answer, UserError):
                raise answer
            record["answer"] = "".join(answer)
            record["stop_reason"] = answer.stop_reason
        except UserError as error:
            record["error"] = str(error)
        if out:
            print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
        else:
            shown = record.get("error", record.get("answer"))
            print(f"{name}: {shown}", file=file, flush=True)

    with open(out, "w", encoding="utf-8") if out else nullcontext(sys.stdout) as file:
        begun: deque = deque()
        bar = tqdm(total=len(paths), unit="photo", disable=None if out else True)
        with bar:
            for path in paths:
                begun.append((path, begin(path)))
                if len(begun) == ANSWERED_TOGETHER:
                    finish(*begun.popleft())
                    bar.update()
            while begun:
                finish(*begun.popleft())
                bar.update()


def _chat(options: argparse.Namespace) -> None:
    from minigpt4.conversation import Conversation, ask
    from minigpt4.model import image

    pictures = [image.load(path) for path in options.photos]
    given = start.given_sampling(options)
    engine = start.open_engine(options)
    sampling = start.default_sampling(engine.model.config, **given)
    conversation = Conversation()
    start.say("Ask, or: /image FILE adds a picture, /new starts again, /quit ends.")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
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
                    pictures.append(image.load(path.strip("\"'")))
                case _:
                    asked = Conversation([*conversation.messages], {**conversation.pictures})
                    asked.add_question(line, pictures)
                    _say_answer(ask(engine, asked, sampling), asked)
                    conversation, pictures = asked, []
        except UserError as error:  # as if nothing had been asked: it can be asked again
            start.say(str(error))


def _say_answer(answer, conversation) -> None:
    """Print an answer as it comes; Ctrl-C stops it and keeps what was said."""
    if answer.notice:
        start.say(answer.notice)
    try:
        for piece in answer:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        answer.close()
    finally:
        print()
    conversation.add_answer(answer.text)


def _need(*packages: str) -> None:
    """UserError where what training and scoring need besides has not been installed."""
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)} must be installed first: pip install -r requirements-train.txt."
        )


def _train(options: argparse.Namespace) -> None:
    _need("matplotlib")
    from minigpt4.training.run import train

    train(options)


def _evaluate(options: argparse.Namespace) -> None:
    needed = {"stages": (), "pope": (), "abilities": ("openai",) if options.judge else ()}
    _need(*needed.get(options.experiment, ("pycocoevalcap",)))
    from minigpt4.evaluation.run import evaluate

    evaluate(options)


def _convert(options: argparse.Namespace) -> None:
    from minigpt4.weights import load as weights

    out = Path(options.out)
    if out.suffix != ".safetensors":
        raise UserError(f"{out} should end in .safetensors.")
    tensors = weights.read_projection(options.checkpoint)
    weights.save_projection(tensors, out)
    rows, columns = tensors["weight"].shape
    owner = weights.model_of_projection(rows, columns) or "no known model"
    print(f"{out}: a projection from {columns} to {rows} ({owner}), {out.stat().st_size:,} bytes.")


def _download(options: argparse.Namespace) -> None:
    from minigpt4.weights import load as weights

    config = get_model(options.model)
    given = start.given_places(options)
    weights.download(config, start.say, given)
    weights.find(config, given=given)


if __name__ == "__main__":
    sys.exit(main())
