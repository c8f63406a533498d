"""Export: a reviewed set in the published layout of the second stage."""

import json
from collections.abc import Iterable
from pathlib import Path

from minigpt4.curation.pictures import NOT_IN_NAMES, load_picture, locate, read_picture
from minigpt4.curation.records import KEY, make_folder
from minigpt4.data.examples import NAMED, check_share
from minigpt4.data.files import replacing
from minigpt4.errors import UserError, say

JPEG_QUALITY = 95
_MARK = ".exported"  # in folders that `export` writes


def chosen(records: Iterable[dict]) -> list[dict]:
    """The records that the filter kept and that no reviewer dropped.

    Records of unreadable pictures, and blank descriptions, are left out. UserError if a record
    lacks a field.
    """
    found = [
        r
        for r in records
        if r.get("kept", True)
        and r.get("decision", "keep") != "drop"
        and "error" not in r
        and not (isinstance(r.get("text"), str) and not r["text"].strip())
    ]
    for record in found:
        for name in (KEY, "picture", "text"):
            if not isinstance(record.get(name), str):
                raise UserError(
                    f"The record of “{record[KEY]}” needs a text as “{name}”: add it, or delete "
                    "the line."
                )
    return found


def export(records: Iterable[dict], folder: str | Path, pictures: str | None = None) -> int:
    """Write the `chosen` records as filter_cap.json and image/ID.jpg, for `train --stage 2`.

    Returns the number of pictures. JPEG files are copied, others are converted to JPEG.
    filter_cap.json is written last and at once: a folder that has it is complete. pictures: the
    folder in which the pictures are now. Pictures that cannot be read are reported and left out.
    UserError if these are too many, if the pictures' folder is the image/ to write, or if the
    folder holds a set that `export` did not write.
    """
    folder, records = Path(folder), list(records)
    named = [r["picture"] for r in records if isinstance(r.get("picture"), str)]
    sources = {locate(picture, pictures)[0].parent for picture in named}
    if (folder / "image").resolve() in {source.resolve() for source in sources}:
        raise UserError(
            f"{folder / 'image'} contains the set's own pictures, which would be overwritten or "
            "deleted: choose another folder with “--out”."
        )
    _take(folder)
    annotations, unusable = [], 0
    for record in chosen(records):
        image_id = record["image_id"]
        if NOT_IN_NAMES.search(image_id):
            raise UserError(f"“{image_id}” cannot be a file name: change the image_id.")
        path = folder / "image" / f"{image_id}.jpg"
        try:
            content = read_picture(record["picture"], pictures)
            rgb = load_picture(record["picture"], pictures).rgb
        except UserError as error:
            unusable += 1
            if unusable <= NAMED:
                say(f"{image_id} is left out: {error}")
            continue
        if content[:3] == b"\xff\xd8\xff":
            path.write_bytes(content)
        else:
            rgb.save(path, "JPEG", quality=JPEG_QUALITY)
        annotations.append({"image_id": image_id, "caption": record["text"]})
    if unusable:
        total = unusable + len(annotations)
        check_share(unusable, total)
        say(f"{unusable} of {total} pictures cannot be used and are left out.")
    if not annotations:
        raise UserError("There is nothing to export: all descriptions were dropped.")
    _remove_others(folder, {a["image_id"] for a in annotations})
    layout = json.dumps({"annotations": annotations}, ensure_ascii=False, indent=1)
    with replacing(folder / "filter_cap.json") as partial:
        partial.write_text(layout + "\n", encoding="utf-8", errors="replace")
    return len(annotations)


def _take(folder: Path) -> None:
    """Mark a folder as one that `export` writes. UserError if another program's set is in it."""
    layout, images = folder / "filter_cap.json", folder / "image"
    others = layout.exists() or (images.is_dir() and any(images.iterdir()))
    if others and not (folder / _MARK).exists():
        raise UserError(
            f"{folder} has a filter_cap.json or pictures in image/ that this version of “export” "
            "did not write: choose another folder with “--out”, or delete them."
        )
    make_folder(images)
    (folder / _MARK).touch()


def _remove_others(folder: Path, kept: set[str]) -> None:
    """Delete the pictures of an earlier export that are no longer in the set."""
    try:
        earlier = json.loads((folder / "filter_cap.json").read_text(encoding="utf-8"))
        ids = {a["image_id"] for a in earlier["annotations"]}
    except (OSError, ValueError, KeyError, TypeError):
        return
    for image_id in ids - kept:
        path = folder / "image" / f"{image_id}.jpg"
        if path.parent == folder / "image":
            path.unlink(missing_ok=True)
