"""Captioned pictures in Hugging Face's own format, read by the `datasets` library if it is
installed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minigpt4.data import captions
from minigpt4.data.captions import NotUsable, Reading
from minigpt4.data.examples import Example
from minigpt4.data.files import check_pointer, read_bytes, sample_of, shortened
from minigpt4.data.names import is_file
from minigpt4.data.table import PICTURE, picture_folders, read_rows, texts_of_row, with_lower_names
from minigpt4.errors import UserError, quiet_hub, say
from minigpt4.model.image import has_picture_name

_BLOCKS = 64  # blocks of each file that are read to tell it from others


def is_saved(folder: Path) -> bool:
    """Whether the library saved a data set here (`save_to_disk`), or the folder has Parquet files
    as the hub has them."""
    saved = any((folder / name).exists() for name in ("dataset_dict.json", "state.json"))
    return saved or bool(_parquet(folder))


def read_saved(folder: Path) -> list[Example]:
    """The training split of a folder that `is_saved`."""
    files = _parquet(folder)
    stored = sorted(map(Path, files)) or sorted(folder.rglob("*.arrow"))
    for file in stored:
        check_pointer(file)
    datasets = _library(str(folder))
    with _loading(str(folder), "check that its files are complete and have the same columns"):
        if files:
            opened = datasets.load_dataset("parquet", data_files=files, split="train")
        else:
            opened = datasets.load_from_disk(str(folder))
            if isinstance(opened, dict):
                opened = opened["train"] if "train" in opened else next(iter(opened.values()))
    # The library's own fingerprint depends on where the files are.
    sample = cache(lambda: " ".join(sample_of(file, _BLOCKS) for file in stored))
    return _examples(opened, str(folder), folder, sample)


def read_dataset(name: str, limit: int | None = None) -> list[Example]:
    """A data set of the hub. name: USER/NAME, or USER/NAME:SPLIT; the split is "train" by default.

    It is downloaded into the library's cache, because training reads pictures in any order. With a
    limit, only so many rows are streamed, and kept in memory.
    """
    datasets = _library(name)
    repository, _, split = name.partition(":")
    if not repository:
        raise UserError("Name the data set of the hub: hf:USER/NAME.")
    quiet_hub()
    say(f"Looking for {name} on the Hugging Face hub …")
    with _loading(name, "check its name and split, and the connection"):
        opened = datasets.load_dataset(
            repository, split=split or "train", streaming=limit is not None
        )
        if limit is not None:
            opened = _first_rows(opened, limit)
    return _examples(opened, name, None, partial(str, opened._fingerprint))


@contextmanager
def _loading(name: str, advice: str) -> Iterator[None]:
    """Turns any error of the library into a UserError."""
    try:
        yield
    except Exception as error:  # from the library, the network or the data set
        first = str(error.__cause__ or error).strip().split("\n")[0].rstrip(".")
        raise UserError(f"The data set {name} cannot be loaded ({first}): {advice}.") from error


def _first_rows(stream: Any, limit: int) -> Any:
    """A data set in memory; its pictures stay encoded."""
    import datasets

    encoded = datasets.Image(decode=False)
    for column, kind in (stream.features or {}).items():
        if isinstance(kind, datasets.Image):
            stream = stream.cast_column(column, encoded)
        elif isinstance(getattr(kind, "feature", None), datasets.Image):
            stream = stream.cast_column(column, type(kind)(encoded))
    return datasets.Dataset.from_list(list(stream.take(limit)), features=stream.features)


def _parquet(folder: Path) -> list[str]:
    found = [*folder.glob("*.parquet"), *folder.glob("data/*.parquet")]
    training = [p for p in found if p.name.startswith("train")]
    if any(folder.glob("*.tar")):
        return []
    return sorted(str(p) for p in training or found if not _is_list(p))


def _is_list(path: Path) -> bool:
    """Whether this is img2dataset's list of the pictures in the folder or file of the same name."""
    has_figures = path.with_name(f"{path.stem}_stats.json").exists()
    return has_figures and any(path.with_suffix(end).exists() for end in ("", ".tfrecord"))


def _library(name: str) -> Any:
    if find_spec("datasets") is None:
        raise UserError(
            f"{name} is a data set in Hugging Face's format: install its library first "
            "(pip install datasets), or name picture files with a table of captions."
        )
    import datasets

    return datasets


def _picture_columns(dataset: Any, name: str) -> tuple[list[str], str]:
    """(the columns of pictures, the one to use). UserError if there is none, or no obvious one."""
    import datasets

    kinds = {n: getattr(f, "feature", None) or f for n, f in dataset.features.items()}
    named = {n: PICTURE.index(key) for n in kinds if (key := n.strip().casefold()) in PICTURE}
    pictures = [n for n, kind in kinds.items() if isinstance(kind, datasets.Image)] or [*named]
    if not pictures:  # img2dataset calls its column "jpg"
        pictures = [n for n in kinds if has_picture_name(f"a.{n}")]
    chosen = sorted((n for n in pictures if n in named), key=named.__getitem__) or pictures
    if not chosen or (len(chosen) > 1 and chosen[0] not in named):
        if not chosen and any(n.strip().casefold() == "url" for n in kinds):
            raise UserError(
                f"{name} only names addresses of pictures: download them with img2dataset, and "
                "name its shards."
            )
        what = "several columns" if chosen else "no column"
        raise UserError(
            f"{name} has {what} of pictures: its columns are "
            f"{', '.join(map(shortened, kinds))}. Rename the one to use to “image”."
        )
    return pictures, chosen[0]


def _examples(
    dataset: Any, name: str, folder: Path | None, sample: Callable[[], str]
) -> list[Example]:
    """The rows that have one picture and a text. Pictures stay in the library's files.

    folder: where pictures are that the rows only name; None for a data set from the hub.
    sample: as for `Example`.
    """
    pictures, column = _picture_columns(dataset, name)
    kind = dataset.features[column]
    if "string" in str(getattr(getattr(kind, "feature", None) or kind, "dtype", "")):
        if folder is None:
            raise UserError(
                f"The pictures of {name} are texts (names, addresses or base64) in its column "
                f"{shortened(column)}: save them as files beside a table of captions, and name "
                "that folder."
            )
        rows = ((f"row {i}", with_lower_names(row)) for i, row in enumerate(dataset))
        return read_rows(Path(name), rows, picture_folders(folder))
    reading = Reading(name)
    found = []
    raw = dataset.select_columns(column).with_format("arrow")  # decodes nothing
    counts = _pictures_in_rows(raw, column)
    for number, row in enumerate(dataset.remove_columns(pictures)):
        with reading.record(f"row {number}"):
            if (count := counts[number]) != 1:
                raise NotUsable(captions.SEVERAL_PICTURES if count else captions.NO_PICTURE)
            texts, said = texts_of_row(with_lower_names(row))
            key = f"{name}/{number}" if folder is None else f"row {number}"
            read = partial(_read, raw, number, column, folder)
            found.append(Example(key, read, texts, said, sample))
    return reading.finish(found, "it needs a column of pictures and one of captions")


def _pictures_in_rows(raw: Any, column: str) -> list[int]:
    """How many pictures each row has, found without reading them."""
    from pyarrow import compute, types  # the library needs it

    counts: list[int] = []
    for batch in raw.iter(1000):
        values = batch[column]
        kinds = (types.is_list, types.is_large_list, types.is_fixed_size_list)
        if any(is_kind(values.type) for is_kind in kinds):
            counts += [n or 0 for n in compute.list_value_length(values).to_pylist()]
        else:
            counts += [int(valid) for valid in values.is_valid().to_pylist()]
    return counts


def _read(raw: Any, number: int, column: str, folder: Path | None) -> bytes:
    (value,) = raw[number][column].to_pylist()
    value = value[0] if isinstance(value, list) else value
    if isinstance(value, bytes):
        return value
    if content := value.get("bytes"):
        return content
    if not (path := value.get("path")):
        raise UserError(f"Row {number} has no picture: {captions.NO_PICTURE}.")
    if folder is None and not Path(path).is_absolute():  # others are in the library's cache
        raise UserError(f"Row {number} only names its picture, {shortened(path)}.")
    return read_bytes(folder / path if folder and is_file(folder / path) else path)
