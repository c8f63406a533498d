"""A reviewed set in the published second-stage layout: filter_cap.json and image/ID.jpg."""

import json
from collections.abc import Iterable
from pathlib import Path

from minigpt4.curation.pictures import NOT_IN_NAMES, load_picture, locate, read_picture
from minigpt4.curation.records import KEY, make_folder
from minigpt4.errors import UserError

JPEG_QUALITY = 95


def chosen(records: Iterable[dict]) -> list[dict]:
    """Those that the filter kept and that no reviewer dropped.

    Pictures that could not be read, and empty descriptions, are left out. UserError for a record
    that lacks a field.
    """
    found = [
        r
        for r in records
        if r.get("kept", True)
        and r.get("decision", "keep") != "drop"
        and "error" not in r
        and r.get("text") != ""
    ]
    for record in found:
        for name in (KEY, "picture", "text"):
            if not isinstance(record.get(name), str):
                raise UserError(
                    f"The record of “{record[KEY]}” needs a text as “{name}”: add it, or take the "
                    "line out."
                )
    return found


def export(records: Iterable[dict], folder: str | Path, pictures: str | None = None) -> int:
    """Write the `chosen` in the layout that `train --stage 2` reads; how many pictures.

    JPEG files are copied as they are, others become JPEG. filter_cap.json comes last, whole: a
    folder that has it is complete. pictures: the folder where the pictures are now. UserError where
    they are in the image/ that would be written.
    """
    folder, records = Path(folder), list(records)
    named = [r["picture"] for r in records if isinstance(r.get("picture"), str)]
    sources = {locate(picture, pictures)[0].parent for picture in named}
    if (folder / "image").resolve() in {source.resolve() for source in sources}:
        raise UserError(
            f"{folder / 'image'} holds the set's own pictures, which would be written over or "
            "deleted: give another folder by “--out”."
        )
    make_folder(folder / "image")
    annotations = []
    for record in chosen(records):
        image_id = record["image_id"]
        if NOT_IN_NAMES.search(image_id):
            raise UserError(f"“{image_id}” cannot be a file's name: change the image_id.")
        path = folder / "image" / f"{image_id}.jpg"
        content = read_picture(record["picture"], pictures)
        rgb = load_picture(record["picture"], pictures).rgb  # what cannot be read is found now
        if content[:3] == b"\xff\xd8\xff":
            path.write_bytes(content)
        else:
            rgb.save(path, "JPEG", quality=JPEG_QUALITY)
        annotations.append({"image_id": image_id, "caption": record["text"]})
    if not annotations:
        raise UserError("Nothing is left to export: every description was dropped.")
    _remove_others(folder, {a["image_id"] for a in annotations})
    partial = folder / "filter_cap.json.part"
    layout = json.dumps({"annotations": annotations}, ensure_ascii=False, indent=1)
    partial.write_text(layout + "\n", encoding="utf-8")
    partial.replace(folder / "filter_cap.json")
    return len(annotations)


def _remove_others(folder: Path, kept: set[str]) -> None:
    """Delete the pictures of an earlier export that are in the set no longer."""
    try:
        earlier = json.loads((folder / "filter_cap.json").read_text(encoding="utf-8"))
        ids = {a["image_id"] for a in earlier["annotations"]}
    except (OSError, ValueError, KeyError, TypeError):
        return
    for image_id in ids - kept:
        path = folder / "image" / f"{image_id}.jpg"
        if path.parent == folder / "image":
            path.unlink(missing_ok=True)
