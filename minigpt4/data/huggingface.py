"""Captioned pictures in Hugging Face's own format, read by the `datasets` library if it is
installed."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minigpt4.data import captions
from minigpt4.data.captions import Reading
from minigpt4.data.conversations import NotUsable
from minigpt4.data.examples import Example
from minigpt4.data.files import read_bytes, shortened
from minigpt4.data.table import PICTURE, texts_of_row, with_lower_names
from minigpt4.errors import UserError


def is_saved(folder: Path) -> bool:
    """Whether the library saved a data set here (`save_to_disk`), or the folder has Parquet files
    as the hub has them."""
    saved = any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))
    return saved or bool(_parquet(folder))


def read_saved(folder: Path, instructions: tuple[str, ...]) -> list[Example]:
    """The training split of a folder that `is_saved`."""
    datasets = _library(str(folder))
    if files := _parquet(folder):
        opened = datasets.load_dataset("parquet", data_files=files, split="train")
    else:
        opened = datasets.load_from_disk(str(folder))
        if isinstance(opened, dict):
            opened = opened["train"] if "train" in opened else next(iter(opened.values()))
    return _examples(opened, str(folder), instructions)


def read_dataset(
    name: str, instructions: tuple[str, ...], limit: int | None = None
) -> list[Example]:
    """A data set of the hub. name: USER/NAME, or USER/NAME:SPLIT; the split is "train" by default.

    It is downloaded into the library's cache, because training reads pictures in any order. With a
    limit, only so many rows are streamed, and kept in memory.
    """
    datasets = _library(name)
    repository, _, split = name.partition(":")
    try:
        opened = datasets.load_dataset(
            repository, split=split or "train", streaming=limit is not None
        )
        if limit is not None:
            opened = _first_rows(opened, limit)
    except Exception as error:  # of the library, the network or the data set
        first = str(error).strip().split("\n")[0]
        raise UserError(
            f"The data set {name} cannot be loaded ({first}): check its name and split."
        ) from error
    return _examples(opened, name, instructions)


def _first_rows(stream: Any, limit: int) -> Any:
    """A data set in memory, its pictures as they are encoded."""
    import datasets

    for column, kind in (stream.features or {}).items():
        if isinstance(kind, datasets.Image):
            stream = stream.cast_column(column, datasets.Image(decode=False))
    return datasets.Dataset.from_list(list(stream.take(limit)), features=stream.features)


def _parquet(folder: Path) -> list[str]:
    found = [*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]
    training = [p for p in found if p.name.startswith("train")]
    beside = any(folder.glob("*.tar")) or any(folder.glob("*_stats.json"))  # img2dataset's
    return [] if beside else sorted(map(str, training or found))


def _library(name: str) -> Any:
    if find_spec("datasets") is None:
        raise UserError(
            f"{name} is a data set in Hugging Face's format: install its library first "
            "(pip install datasets), or name picture files with a table of captions."
        )
    import datasets

    return datasets


def _examples(dataset: Any, name: str, instructions: tuple[str, ...]) -> list[Example]:
    """The rows that have one picture and a text. Pictures stay in the library's files."""
    import datasets

    pictures = [n for n, f in dataset.features.items() if isinstance(f, datasets.Image)]
    named = [n for n in dataset.column_names if n.strip().casefold() in PICTURE]
    if not pictures and not named:
        raise UserError(
            f"{name} has no column of pictures: its columns are "
            f"{', '.join(map(shortened, dataset.column_names))}."
        )
    column = (pictures or named)[0]
    if pictures:
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    reading = Reading(name)
    found = []
    for number, row in enumerate(dataset.remove_columns(column)):
        try:
            texts, said = texts_of_row(with_lower_names(row), instructions)
        except NotUsable as error:
            reading.leave_out(f"row {number}", str(error))
            continue
        read, version = partial(_read, dataset, number, column), dataset._fingerprint
        found.append(Example(f"{name}/{number}", read, texts, said, version))
    return reading.finish(found, "it needs a column of pictures and one of captions")


def _read(dataset: Any, number: int, column: str) -> bytes:
    value = dataset[number][column]
    content = value.get("bytes") if isinstance(value, dict) else None
    if content:
        return content
    path = value.get("path") if isinstance(value, dict) else value
    if not path:
        raise UserError(f"Row {number} has no picture: {captions.NO_PICTURE}.")
    return read_bytes(path)
