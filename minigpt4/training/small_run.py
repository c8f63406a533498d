"""python -m minigpt4 train for models with a word head: data -> features -> words -> projection."""

import argparse
import hashlib
import json
import random
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minigpt4.config import ModelConfig, Words
from minigpt4.data.files import local_path, replacing
from minigpt4.errors import UserError, say
from minigpt4.model.detector import OBJECTS
from minigpt4.model.minigpt4 import MiniGPT4
from minigpt4.model.parts import PooledMap
from minigpt4.model.words import choose, joined_terms, listed, whole_picture, with_objects
from minigpt4.start import given_places
from minigpt4.training import adapters, int8, mixture, small, small_start, word_head
from minigpt4.training.features import Features, fingerprint
from minigpt4.training.options import (
    DATA,
    NEEDS_OF_WORDS,
    OPTIMIZER,
    REWARD,
    WATCHING,
    check_needs,
    check_start,
    naming_init,
)
from minigpt4.training.saving import locked
from minigpt4.training.small import SmallRecipe, SmallTrainer, TrainingSource
from minigpt4.training.small_reward import CaptionReward, DescriptionReward, Reward
from minigpt4.training.small_validation import SmallValidation
from minigpt4.training.supported import Supported
from minigpt4.training.vocabulary import Vocabulary
from minigpt4.training.word_head import Inputs
from minigpt4.weights.adapters import read_adapters
from minigpt4.weights.load import find_weights, load_model

_FOLDS = 4
_TERMS = (1500, 800, 8)  # words, phrases, and the fewest pictures whose texts have a term
_UNREAD = {
    *("stage", "mix", "instructions", "replay", "replay-share", "questions"),
    *("batch-size", "accumulate", "recompute", "crop", "blend", "consensus", "denoise"),
}
_FITTED = 5000  # pictures to which the initial projection is fitted


def train(options: argparse.Namespace, config: ModelConfig) -> None:
    """Train, or resume the run in `options.out`."""
    check_options(options, config)
    pictures = read(local_path(options.data))
    with nullcontext() if options.validate else locked(Path(options.out)):
        _train(options, config, pictures)


def _train(
    options: argparse.Namespace,
    config: ModelConfig,
    pictures: dict[str, list[mixture.TrainingPicture]],
) -> None:
    torch.set_num_threads(options.threads)
    out = Path(options.out)
    begun = int8.arithmetic_of(out / "log.jsonl") if (out / "checkpoint.pt").exists() else ""
    with naming_init(options):
        model, adapted, arithmetic = opened(options, config, begun)
    data = DataSets(model, pictures, Path(options.cache or out / "features"))
    words = Found(config, data, out, options.refit)
    trained, kept = divided(data, words)
    if options.validate and not kept:
        raise UserError(
            f"“--validate” measures on pictures kept apart, and {options.data} has none: add some "
            "as coco/val-0.tar."
        )
    rewards = rewards_of(options, trained, words)
    objects = mixture.Things()
    count(objects, trained, kept, words)
    recipe = recipe_of(options)
    trainer = SmallTrainer(
        model,
        trained,
        mixture.Mixture(objects),
        recipe,
        out,
        lambda: initial_projection(model, trained, options.init is not None),
        tokens_of(model, trained, objects),
        SmallValidation(kept, objects, out),
        {
            "model": config.name,
            "command": shlex.join(["python", "-m", "minigpt4", *sys.argv[1:]]),
            "pictures": str(sum(len(s.pictures) for s in trained.values())),
        },
        adapted,
        rewards,
    )
    if trainer.step:
        say(f"Resuming at step {trainer.step} of {recipe.steps}.")
    if options.validate:
        size = options.limit or 200
        sizes = dict.fromkeys(("loss", "captions", "yes/no"), size) | {"detail": max(1, size // 5)}
        probe = SmallValidation(kept, objects, out, sizes, options.words)
        return say(json.dumps(probe(trainer), indent=1))
    if arithmetic != begun:
        trainer.log({"step": trainer.step, "arithmetic": arithmetic})
    trainer.run()
    say(f"The projection is in {out / config.projection_file}, the figures of each step beside it.")


def opened(
    options: argparse.Namespace, config: ModelConfig, begun: str
) -> tuple[MiniGPT4, dict[str, adapters.Adapted], str]:
    """The model, its adapters, if any, and the name of the arithmetic in which it is trained.

    begun: the arithmetic in which the run began, or "".
    """
    given = given_places(options)
    files = find_weights(config, options.init, new_projection=options.init is None, given=given)
    arithmetic, dtype, integers = int8.arithmetic(options.dtype, begun)
    model = load_model(config, files, "cpu", "none", dtype, seed=options.seed, adapters=False)
    model.torch_llm.set_attn_implementation("eager")  # fused attention's backward is slow on a CPU
    layers = model.torch_llm.get_decoder().layers
    if integers:
        int8.replace_linears(layers)
    before = f" The run began in {begun}." if begun not in ("", arithmetic) else ""
    say(f"The language model computes in {arithmetic}.{before}")
    if not options.adapters or not config.adapter_rank:
        return model, {}, arithmetic
    start = read_adapters(options.init) if options.init else {}
    inserted = adapters.insert(layers, config.adapter_rank, options.seed, start)
    return model, inserted, arithmetic


def recipe_of(options: argparse.Namespace) -> SmallRecipe:
    """The recipe, changed by the options."""
    given = {
        name: getattr(options, name)
        for name in ("steps", "peak_lr", "seed", "validate_every")
        if getattr(options, name) is not None
    }
    return SmallRecipe(**given, **(small.SCORED[options.scored] if options.samples else {}))


def rewards_of(
    options: argparse.Namespace, trained: dict[str, TrainingSource], words: "Found"
) -> list[Reward]:
    """The rewards of sampled texts. Called while the pictures still have all of their texts."""
    if not options.samples:
        return []
    pictures = [picture for source in trained.values() for picture in source.pictures]
    count, weight = options.samples, options.reward_weight
    rewards = {
        "captions": lambda: CaptionReward(pictures, count, weight),
        "descriptions": lambda: DescriptionReward(pictures, words.terms, count, weight),
    }
    return [made() for name, made in rewards.items() if options.scored in (name, "both")]


def count(
    objects: mixture.Things,
    trained: dict[str, TrainingSource],
    kept: dict[str, TrainingSource],
    words: "Found",
) -> None:
    """Note the objects that each picture's texts name; then reduce the texts to be learned to what
    the word heads find."""
    counted = objects.count([p for source in trained.values() for p in source.pictures])
    for source in trained.values():
        of_one, counted = counted[: len(source.pictures)], counted[len(source.pictures) :]
        source.pictures = [
            words.supported(picture, row) for picture, row in zip(of_one, source.rows, strict=True)
        ]
    for source in kept.values():
        source.pictures = mixture.Things().count(source.pictures)


def check_options(options: argparse.Namespace, config: ModelConfig) -> None:
    """UserError for an option that only the other models' training reads."""
    for option in (*DATA, *WATCHING, *OPTIMIZER, *REWARD):
        given = getattr(options, option.attribute, option.default)
        if option.name in _UNREAD and given not in (option.default, None, [], ()):
            raise UserError(
                f"“--{option.name}” is not for {config.name}, whose training has one stage and a "
                "mixture of its own: omit it."
            )
    effect = {"quantize": ("auto", "none"), "device": ("auto", "cpu"), "projection": (None, "")}
    for name, without in effect.items():
        if (given := getattr(options, name)) not in without:
            raise UserError(
                f"“--{name} {given}” has no effect on the training of {config.name}, which runs on "
                "the processor, with 16-bit weights, from “--init”: omit it."
            )
    check_needs(options, NEEDS_OF_WORDS)
    if options.validate and options.validate != "on":
        raise UserError(
            f"“--validate” takes no file for {config.name}: it measures what the run has learned."
        )
    if not options.validate:
        check_start(options.init, Path(options.out, config.projection_file))
    if options.limit and not options.validate:
        raise UserError(f"“--limit” is for measuring {config.name}: add “--validate”, or omit it.")


def read(folder: Path) -> dict[str, list[mixture.TrainingPicture]]:
    """Data set -> its pictures: `stage1`, `coco`, `drawn`, `stage2` and `instruct` in a folder.

    Each is optional, but there must be one at least. `texts.jsonl`: see `mixture.with_texts`.
    """
    found = {}
    for pattern in ("coco/*.tar", "stage1/*.tar", "drawn/*.tar"):
        for shard in sorted(folder.glob(pattern)):
            found[shard.stem] = mixture.read_pictures(str(shard))
    if (folder / "stage2").is_dir():
        asked = folder / "instruct" / "instruct.jsonl"
        found["stage2"] = mixture.read_instructed(
            folder / "stage2", asked if asked.exists() else None
        )
    if not found:
        raise UserError(
            f"{folder} holds no data: it needs coco/*.tar, stage1/*.tar or drawn/*.tar."
        )
    texts = folder / "texts.jsonl"
    return mixture.with_texts(found, texts) if texts.exists() else found


class DataSets:
    """The pictures of all data sets, one after the other, and their features, encoded once.
    Pictures that cannot be decoded are left out.

    names: each picture's data set; kept: whether a picture is only for validation; mark: a hash of
    the pictures and texts.
    """

    def __init__(
        self, model: MiniGPT4, sets: dict[str, list[mixture.TrainingPicture]], cache: Path
    ) -> None:
        self.pictures: list[mixture.TrainingPicture] = []
        self.names: list[str] = []
        self._places: list[tuple[Features, int]] = []
        lines = []
        for name, of_one in sets.items():
            stored = Features(model, [p.example for p in of_one], 1, cache, True)
            numbers = stored.usable()
            if missing := len(of_one) - len(numbers):
                say(f"{name}: {missing} of {len(of_one)} pictures cannot be decoded: left out.")
            usable = [of_one[number] for number in numbers]
            self.pictures += usable
            self.names += [name] * len(usable)
            self._places += [(stored, number) for number in numbers]
            examples, texts = [p.example for p in usable], [p.texts for p in usable]
            lines.append(f"{name} {fingerprint(examples)} {texts}")
        self.mark = hashlib.sha256("\n".join(lines).encode("utf-8", "replace")).hexdigest()
        named = zip(self.names, self.pictures, strict=True)
        self.kept = [mixture.is_for_validation(name) or one.held_out for name, one in named]

    def features(self, rows: Sequence[int]) -> Tensor:
        """[rows, image_tokens, projection_in], 16 bit."""
        places = (self._places[row] for row in rows)
        return torch.cat([stored([(number, 0)]) for stored, number in places])


class Found:
    """The words found in every picture, by word heads that were not trained on it."""

    def __init__(self, config: ModelConfig, data: DataSets, out: Path, refit: bool) -> None:
        bridge = config.bridge
        if config.words is None or not config.detects or not isinstance(bridge, PooledMap):
            raise UserError(f"{config.name} has no word head: train it with “--stage”.")
        self.words: Words = config.words
        path = out / "words.pt"
        if refit or not path.exists():
            out.mkdir(parents=True, exist_ok=True)
            self._fit(config, data, bridge.grid, path)
        try:
            stored = torch.load(path, weights_only=True)
            found = stored["mark"]
        except Exception as error:
            raise UserError(f"{path} is damaged: delete it, or give “--refit”.") from error
        if found != data.mark:
            raise UserError(f"{path} is of other data: delete it, or give “--refit”.")
        self.terms = joined_terms(stored["terms"], OBJECTS)
        self._supported = Supported(Vocabulary(self.terms))
        first = config.features.objects_column
        objects = slice(first, first + len(OBJECTS))
        parts = [
            whole_picture(data.features(rows.tolist()), bridge.grid)[:, objects]
            for rows in torch.arange(len(data.pictures)).split(256)
        ]
        heat = torch.cat(parts).float() ** 2
        self._probabilities = with_objects(stored["probabilities"], heat, self.terms, OBJECTS)

    def _fit(self, config: ModelConfig, data: DataSets, grid: int, path: Path) -> None:
        """Write the probabilities, and the head that saw all training pictures."""
        say("Fitting the word head …")
        texts, kept = [p.texts for p in data.pictures], torch.tensor(data.kept)
        seen = [of_one for of_one, k in zip(texts, data.kept, strict=True) if not k]
        vocabulary = Vocabulary.of(seen, *_TERMS)
        if not vocabulary.terms:
            raise UserError(
                f"Of {len(seen)} pictures to learn from, no {_TERMS[2]} have texts that name the "
                "same thing, so the word head has no words: add pictures."
            )
        wanted = word_head.targets(vocabulary, texts)
        learned, others = (~kept).nonzero()[:, 0], kept.nonzero()[:, 0]
        channels = config.projection_in - config.features.classes
        inputs = Inputs(data.features, learned.tolist(), grid, channels)
        folds = torch.tensor([word_head.fold_of(p.key, _FOLDS) for p in data.pictures])
        probabilities = torch.zeros(wanted.shape, dtype=torch.float16)
        probabilities[learned] = word_head.cross_fitted(inputs, learned, wanted, folds)
        layer = word_head.fit(inputs, learned, wanted)
        head = word_head.finished(layer, inputs, vocabulary, config.features.objects_column)
        head.save(path.with_name(config.files["words"].member))
        if len(others):
            probabilities[others] = word_head.probabilities(inputs, others, layer)
        flickr = torch.tensor([mixture.is_for_validation(name) for name in data.names])
        for what, rows in (
            ("trained (other folds)", ~kept),
            ("Flickr8k val", flickr),
            ("COCO, held out", kept & ~flickr),
        ):
            if rows.any():
                score = word_head.mean_average_precision(wanted[rows], probabilities[rows])
                figures = {"words": what, "pictures": int(rows.sum()), "mAP": round(score, 3)}
                say(json.dumps(figures))
        found = {"terms": list(vocabulary.terms), "probabilities": probabilities}
        with replacing(path) as partial:
            torch.save(found | {"mark": data.mark}, partial)

    def supported(self, picture: mixture.TrainingPicture, row: int) -> mixture.TrainingPicture:
        """The picture (this row of the data sets) with its texts reduced to what is found in it."""
        return self._supported(picture, self._probabilities[row].tolist())

    def of(self, row: int, draw: random.Random | None) -> str:
        """The list of words of a picture, given by its row in the data sets.

        With `draw`, the threshold, the number and the order vary; without, they are the model's.
        """
        found = self._probabilities[row].tolist()
        if draw is None:
            return listed(choose(found, self.terms, self.words))
        varied = replace(self.words, threshold=draw.uniform(0.15, 0.4), most=draw.randint(5, 14))
        terms = choose(found, self.terms, varied)
        if draw.random() < 0.4:
            draw.shuffle(terms)
        return listed(terms)


def divided(
    data: DataSets, words: Found
) -> tuple[dict[str, TrainingSource], dict[str, TrainingSource]]:
    """(sources to learn from, sources for validation): name -> its pictures of all data sets."""
    parts: dict[tuple[bool, str], list[int]] = {}  # (kept, group)
    for row, picture in enumerate(data.pictures):
        parts.setdefault((data.kept[row], picture.group), []).append(row)
    made: tuple[dict, dict] = ({}, {})
    for (kept, source), rows in parts.items():
        made[kept][source] = _source(data, words, rows)
    return made


def _source(data: DataSets, words: Found, rows: Sequence[int]) -> TrainingSource:
    return TrainingSource(
        [data.pictures[row] for row in rows],
        lambda numbers: data.features([rows[number] for number in numbers]),
        lambda number, draw: words.of(rows[number], draw),
        rows,
    )


def initial_projection(
    model: MiniGPT4, trained: dict[str, TrainingSource], given: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The initial (basis, weight, bias), from a ridge regression on a fixed draw of the pictures
    with several captions, or with one if none has more.

    given: the weights are the model's own, those of `--init`. UserError without captions.
    """
    draw = random.Random("start")
    counts = {
        (name, i): len(picture.captions)
        for name, source in trained.items()
        for i, picture in enumerate(source.pictures)
    }
    least = min(2, max(counts.values(), default=0))
    if not least:
        raise UserError("The pictures to learn from have no captions: add some.")
    places = [place for place, count in counts.items() if count >= least]
    places = draw.sample(places, min(_FITTED, len(places)))
    features = torch.cat([trained[name].features([i]) for name, i in places])
    basis, weight, bias = small_start.start(
        model, features, [trained[name].pictures[i].captions for name, i in places]
    )
    if given:
        weight, bias = small_start.in_basis(model.projection, basis)
    return basis, weight, bias


def tokens_of(
    model: MiniGPT4, trained: dict[str, TrainingSource], objects: mixture.Things
) -> Tensor:
    """The tokens over which the loss is computed: those of all answers that can be drawn."""

    def answers():
        for source in trained.values():
            for picture in source.pictures:
                yield from (t.strip() for t in (*picture.captions, picture.description))
                yield from map(mixture.ordinary, picture.captions)
                yield from (answer for _, answer in picture.pairs)
                if picture.task:
                    yield picture.task[1]
                for _, answer in picture.knowledge:
                    yield mixture.sentence(answer)
                if picture.source == "named":
                    yield mixture.name_of(picture)
        for name in objects.names:
            thing = name.split(" ", 1)[-1]
            yield f"Yes, there is {name} in it."
            yield f"No, there is no {thing} in it."
            yield f"No, there are no {thing} in it."
            yield f"There is no {thing} in this picture."
        for file in ("not-told.txt", "no-picture.txt"):
            yield from (answer for _, answer in mixture.read_turns(file))
        yield from ("Yes.", "No.", "Yes, there are", "True.", "False.")

    end = model.tokenizer.convert_tokens_to_ids(model.config.template.stop[0])
    return small.occurring_tokens(model.tokenizer, answers(), end)
