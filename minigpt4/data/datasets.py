"""The one entry to captioned pictures: finds out which of the known formats a place is in."""

import glob
import os
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from minigpt4.data import captions, huggingface
from minigpt4.data.captions import NotUsable, Reading, choose_captions
from minigpt4.data.conversations import check_record
from minigpt4.data.examples import (
    Collected,
    Example,
    Text,
    captioned_files,
    fields_of,
    picture_name,
    read_descriptions,
    read_shards,
)
from minigpt4.data.files import (
    check_pointer,
    is_jsonl,
    local_path,
    parse_json,
    printable,
    read_bytes,
    read_text,
    sample_of,
    shortened,
)
from minigpt4.data.names import folded, is_file, is_hidden
from minigpt4.data.table import (
    SUFFIXES,
    folders_in,
    is_table,
    json_lines,
    names_picture,
    picture_of,
    read_rows,
    read_table,
    tables_in,
    texts_of_row,
    with_lower_names,
)
from minigpt4.errors import UserError
from minigpt4.model.image import has_picture_name

HUB = "hf:"  # hf:USER/NAME[:SPLIT]
# Endings of files that are not read -> what the file is, and what to do.
_OTHER_KINDS = {
    (".parquet",): "a Parquet file: install “datasets” and name its folder, or convert it to JSON "
    "lines and picture files",
    (".arrow", ".feather"): "an Arrow file: install “datasets”, save the data set with its "
    "save_to_disk, and name that folder",
    (".tfrecord", ".tfrecords"): "a TFRecord file: convert it to WebDataset shards",
    (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst"): "a compressed tar file: unpack it, as "
    "shards must be uncompressed",
    (".gz", ".xz", ".bz2", ".zst"): "a compressed file: unpack it",
    (".txt",): "a text file: if it is a table of captions, name it .csv or .jsonl",
    (".mp4", ".mov", ".avi", ".mkv", ".webm"): "a video: save pictures of it as files",
    (".zip", ".7z", ".rar"): "an archive: unpack it",
    (".xlsx", ".xls", ".ods"): "a spreadsheet: save it as CSV (UTF-8)",
    (".xml",): "an XML file, such as Pascal VOC's: convert it to a table of captions",
    (".h5", ".hdf5"): "an HDF5 file: convert it to a table of captions and picture files",
    (".pkl", ".pickle", ".npy", ".npz"): "a file of Python objects: convert it to a table of "
    "captions and picture files",
    (".yaml", ".yml", ".toml"): "a configuration file: name the data itself",
}
# Files that libraries write beside the data.
_OF_LIBRARIES = ("_stats.json", "dataset_info.json", ".parquet")
_FORMATS = (
    "WebDataset shards, a table of captions (CSV or JSON lines), COCO's or LLaVA's JSON, or a "
    "folder with one of them or with KEY.txt beside KEY.jpg"
)


def read_captioned(where: str, limit: int | None = None) -> list[Example]:
    """Captioned pictures in any of the formats of docs/own-data.md.

    where: a file, a folder, a glob or brace range of shards, or hf:USER/NAME[:SPLIT].
    limit: read only the first examples. UserError if the format is unknown.
    """
    where = str(where)
    if where.startswith(HUB):
        return huggingface.read_dataset(where.removeprefix(HUB), limit)
    return _read_local(where)[:limit]


def _read_local(where: str) -> list[Example]:
    path, shown = local_path(where), printable(where)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        check_pointer(path)
    if is_table(path):
        return read_table(path)
    kind = next((k for ends, k in _OTHER_KINDS.items() if path.name.lower().endswith(ends)), None)
    if path.is_file() and kind:
        raise UserError(f"{shown} is {kind}.")
    if path.suffix.lower() == ".json":
        return _read_json(path)
    if path.is_file() and has_picture_name(path.name):
        raise UserError(f"{shown} is a single picture: name {_FORMATS}.")
    if not path.is_file() and has_picture_name(path.name):
        raise UserError(f"{shown} names pictures, not shards: name {_FORMATS}.")
    if path.is_file() and path.suffix.lower() != ".tar" and not tarfile.is_tarfile(path):
        raise UserError(f"{shown} is a file of a kind that is not read: name {_FORMATS}.")
    return read_shards(where)


def read_references(where: str, limit: int | None = None) -> list[Example]:
    """The pictures of `read_captioned` that have captions, to which others can be compared."""
    found = [example for example in read_captioned(where, limit) if example.captions]
    if not found:
        raise UserError(f"{where} has descriptions or conversations, but no captions to compare.")
    return found


def _read_folder(folder: Path) -> list[Example]:
    if (folder / "filter_cap.json").exists():
        return read_descriptions(folder)
    if tables_in(folder):
        return read_table(folder)
    if huggingface.is_saved(folder):
        return huggingface.read_saved(folder)
    if any(folder.glob("*.tar")):
        return read_shards(f"{glob.escape(str(folder))}/*.tar")
    for name in ("train", "data"):  # as in Hugging Face's imagefolder
        if (folder / name).is_dir() and tables_in(folder / name):
            return read_table(folder / name)
    pictures = {folded(p.stem) for p in folder.iterdir() if has_picture_name(p.name)}
    others = [p for p in sorted(folder.glob("*.json")) if folded(p.stem) not in pictures]
    annotations = [p for p in others if _is_annotation(p)]
    if len(annotations) == 1:
        return _read_json(annotations[0])
    if len(annotations) > 1 and not any(p.with_suffix(".jpg").exists() for p in annotations):
        names = ", ".join(shortened(p.name) for p in annotations[:3])
        raise UserError(
            f"{printable(folder)} contains {len(annotations)} JSON files ({names}): name one."
        )
    return _read_files(folder)


def _is_annotation(path: Path) -> bool:
    """Whether a JSON file without a picture may be a data set's annotations, not a program's
    file."""
    own = is_hidden(path.name) or not is_file(path)
    return not (own or path.name.endswith(_OF_LIBRARIES))


def _read_files(folder: Path) -> list[Example]:
    """KEY.jpg beside KEY.txt or KEY.json, in the folder and its subfolders: img2dataset's
    "files"."""
    names = [name for name in _walk(folder) if not name.endswith(_OF_LIBRARIES)]
    if not any(name.lower().endswith((".txt", ".json")) for name in names):
        why = f"Name {table} itself." if (table := _annotation_in(folder, names)) else _why(names)
        raise UserError(f"{printable(folder)} contains no table of captions. {why}")
    # Links may lead nowhere: a text that does not exist is left out.
    names = [name for name in names if has_picture_name(name) or is_file(folder / name)]
    reading = Reading(folder)
    found = []
    beside = captioned_files(names, lambda name: read_bytes(folder / name), reading)
    for key, name, said in beside:
        if not is_file(folder / name):
            reading.leave_out(name, captions.MISSING)
            continue
        texts = tuple(map(Text, said))
        read, sample = partial(read_bytes, folder / name), partial(sample_of, folder / name)
        found.append(Example(key, read, texts, said, sample))
    table = "" if found else _annotation_in(folder, names)
    named = f"name {table} itself, or " if table else ""
    return reading.finish(found, f"{named}put KEY.txt or KEY.json beside KEY.jpg")


def _annotation_in(folder: Path, names: list[str]) -> str:
    """A file below a folder that seems to have its pictures' captions; "" if there is none."""
    keys = {name.rpartition(".")[0] for name in names if has_picture_name(name)}
    others = [n for n in names if n.rpartition(".")[0] not in keys and not is_hidden(n)]
    for endings in (SUFFIXES, (".json",)):
        if found := next((n for n in others if n.lower().endswith(endings)), None):
            return shortened(found)
    texts = (n for n in others if n.lower().endswith(".txt") and _names_pictures(folder / n))
    return shortened(next(texts, ""))


def _names_pictures(path: Path) -> bool:
    with path.open("rb") as file:
        return re.search(rb"(?i)\.(jpe?g|png)\b", file.read(4096)) is not None


def _walk(folder: Path) -> Iterator[str]:
    """The files below a folder, relative to it, in a fixed order."""
    for parent, folders, files in os.walk(folder):
        folders.sort()
        yield from (Path(parent, name).relative_to(folder).as_posix() for name in sorted(files))


def _why(names: list[str]) -> str:
    """What is wrong with a folder without captions, and what to do."""
    for name in names:
        for ends, kind in _OTHER_KINDS.items():
            if name.lower().endswith(ends):
                return f"{shortened(name)} in it is {kind}."
    labelled = {Path(n).parts[0] for n in names if has_picture_name(n) and len(Path(n).parts) > 1}
    if len(labelled) > 1:
        return (
            "Its folders seem to be classes, which are no captions: write a table with the columns "
            "“file_name” and “caption”."
        )
    return (
        "Put a CSV or JSON-lines file beside the pictures, or KEY.txt beside KEY.jpg, or name "
        "shards (DIR/*.tar)."
    )


# --- JSON -----------------------------------------------------------------------------------------


def _read_json(path: Path) -> list[Example]:
    """COCO's captions, Karpathy's, the second stage's, a list of records, or lines of them."""
    text, folders = read_text(path), _folders_of(path)
    if is_jsonl(text):
        return read_rows(path, json_lines(path, text), folders)
    content = parse_json(path, text)
    if isinstance(content, dict) and "annotations" in content:
        return _read_coco(path, content)
    if isinstance(content, dict) and _has_questions_alone(content.get("questions")):
        raise _halves(path, "questions")
    records = _records_in(path, content) if isinstance(content, dict) else content
    if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise UserError(
            f"{printable(path)} is JSON in no known format: it must be COCO's captions, LLaVA's "
            "conversations or a list of records with a picture and a caption."
        )
    rows = ((f"record {i}", _row(record)) for i, record in enumerate(records, 1))
    return read_rows(path, rows, folders)


def _has_questions_alone(records: object) -> bool:
    first = records[0] if isinstance(records, list) and records else None
    return isinstance(first, dict) and "question_id" in first and "answer" not in first


def _records_in(path: Path, content: dict) -> list | None:
    """The one list of records with pictures in a JSON object, or the object if it is a record."""
    try:
        row = _row(content)
        if picture_of(row) and texts_of_row(row):
            return [content]
    except NotUsable:
        pass
    lists = {n: v for n, v in content.items() if isinstance(v, list) and v}
    lists = {n: v for n, v in lists.items() if all(isinstance(r, dict) for r in v)}
    pictured = [n for n, v in lists.items() if any(names_picture(_row(r)) for r in v)]
    if len(pictured) > 1:
        names = ", ".join(f"“{shortened(name)}”" for name in pictured)
        raise UserError(
            f"{printable(path)} contains {len(pictured)} lists of records with pictures ({names}): "
            "save the one to be read as a file of its own."
        )
    return lists[pictured[0]] if pictured else next(iter(lists.values()), None)


def _row(record: dict) -> dict[str, Any]:
    """A record with lower-case names; Karpathy's sentences as captions."""
    row = with_lower_names(record)
    if isinstance(sentences := row.get("sentences"), list):
        row["captions"] = [s.get("raw") if isinstance(s, dict) else s for s in sentences]
        row["file_name"] = f"{row.get('filepath', '')}/{row.get('filename', '')}".strip("/")
    return row


def _read_coco(path: Path, content: dict) -> list[Example]:
    annotations = content["annotations"]
    if not isinstance(annotations, list) or not all(isinstance(a, dict) for a in annotations):
        raise UserError(f"“annotations” in {printable(path)} must be a list of objects.")
    if annotations and not any("caption" in a for a in annotations):
        kind = next((k for f, k in _OTHER_COCO.items() if f in annotations[0]), "other annotations")
        if "question_id" in annotations[0]:
            raise _halves(path, "answers")
        raise UserError(
            f"{printable(path)} contains COCO's {kind}, which are no captions: name its captions."
        )
    collected = Collected(path, _folders_of(path), by_path=True)
    by_id = _names_by_id(content.get("images"), collected.reading)
    described = set()
    for number, annotation in enumerate(annotations, 1):
        place = f"annotation {number}"
        with collected.reading.record(place):
            image_id = picture_name(annotation.get("image_id")).strip()
            described.add(image_id)
            check_record(with_lower_names(annotation))
            if by_id and image_id not in by_id:
                raise NotUsable(captions.NOT_LISTED)
            if (name := by_id.get(image_id, image_id)) is None:
                raise NotUsable(captions.SAME_ID)
            found, reason = choose_captions(fields_of(annotation))
            texts = tuple(map(Text, found))
            collected.add(name, texts, reason, found, f"{place}: {name}")
    for image_id in (i for i in by_id if i not in described):
        collected.reading.leave_out(by_id[image_id] or image_id, captions.NO_CAPTION)
    return collected.finish("it needs captions of its “images”")


def _names_by_id(images: object, reading: Reading) -> dict[str, str | None]:
    """The id of each of COCO's images -> its name; None for an id that several have."""
    found: dict[str, str | None] = {}
    for number, image in enumerate(images if isinstance(images, list) else [], 1):
        record = image if isinstance(image, dict) else {}
        with reading.record(f"image {number}"):
            # 7, 7.0 and "7" are the same.
            image_id = picture_name(record.get("id"), captions.NO_OWN_ID).strip()
            name = picture_name(record.get("file_name") or image_id, captions.NO_OWN_ID)
            found[image_id] = name if found.get(image_id, name) == name else None
    return found


def _halves(path: Path, what: str) -> UserError:
    return UserError(
        f"{printable(path)} contains VQA's {what} alone: write questions and answers into one "
        "table, with the columns “image”, “question” and “answer”."
    )


_OTHER_COCO = {
    "segmentation": "object instances",
    "bbox": "object boxes",
    "keypoints": "keypoints",
    "segments_info": "panoptic segments",
}


def _folders_of(path: Path) -> list[list[Path]]:
    """The folders in which the pictures of a JSON file are looked for, as for `PictureFinder`: its
    own and, as for COCO's, that of `annotations/`; then folders there whose names are in the
    file's name, such as val/ for captions_val.json; then the other folders there."""
    around = [path.parent] + ([path.parent.parent] if path.parent.name == "annotations" else [])
    inner = [f for folder in around for f in folders_in(folder)]
    stem = path.stem.casefold()
    named = [
        f
        for f in inner
        if re.search(rf"(?<![a-z0-9]){re.escape(f.name.casefold())}(?![a-z])", stem)
    ]
    usual = [folder / name for folder in around for name in ("images", "image")]
    named.sort(key=lambda f: -len(f.name))
    first = list(dict.fromkeys([*around, *named, *usual]))
    return [*([f] for f in first), [f for f in inner if f not in first]]
