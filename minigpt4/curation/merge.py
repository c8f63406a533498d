"""Merging the files of several reviewers: their agreement, and their joint decisions. No torch."""

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from minigpt4.curation.records import DECISIONS
from minigpt4.errors import UserError


def raw_agreement(ratings: Sequence[Sequence[Hashable]]) -> float:
    """The share of pairs of raters that agree, over all items, 0..1.

    ratings [items, raters]: at least two raters, the same number for each item.
    """
    raters = len(ratings[0])
    pairs = raters * (raters - 1)
    agreeing = (sum(n * (n - 1) for n in Counter(item).values()) for item in ratings)
    return sum(agreeing) / (pairs * len(ratings))


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Agreement of two raters beyond chance (Cohen, 1960): 1 is full agreement, 0 is chance.

    NaN if both used only one and the same label.
    """
    count = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / count
    ours, theirs = Counter(first), Counter(second)
    chance = sum(ours[label] * theirs[label] for label in ours) / count**2
    return (observed - chance) / (1 - chance) if chance < 1 else math.nan


def fleiss_kappa(ratings: Sequence[Sequence[Hashable]]) -> float:
    """Agreement of several raters beyond chance (Fleiss, 1971); ratings [items, raters].

    NaN if all ratings are the same.
    """
    labels = Counter(label for item in ratings for label in item)
    total = labels.total()
    chance = sum((n / total) ** 2 for n in labels.values())
    return (raw_agreement(ratings) - chance) / (1 - chance) if chance < 1 else math.nan


def agreement(reviews: Mapping[str, Mapping[str, dict]]) -> dict[str, float | int | str | None]:
    """Agreement of reviewers (name -> image_id -> record) on the pictures that all have decided.

    `raw` and `kappa` are for keep, edit and drop; `raw_drop` and `kappa_drop` for drop or not.
    Kappa is Cohen's for two reviewers, Fleiss' for more; None if it is not defined.
    """
    everyone = list(reviews.values())
    common = [i for i in everyone[0] if all(i in other for other in everyone[1:])]
    result: dict[str, float | int | str | None] = {"reviewers": len(everyone), "n": len(common)}
    if len(everyone) < 2 or not common:
        return result
    result["statistic"] = "Cohen's kappa" if len(everyone) == 2 else "Fleiss' kappa"
    ratings = [[reviewer[i]["decision"] for reviewer in everyone] for i in common]
    drops = [[label == "drop" for label in item] for item in ratings]
    for suffix, table in (("", ratings), ("_drop", drops)):
        kappa = (
            cohen_kappa(*zip(*table, strict=True)) if len(everyone) == 2 else fleiss_kappa(table)
        )
        result["raw" + suffix] = raw_agreement(table)
        result["kappa" + suffix] = None if math.isnan(kappa) else kappa
    return result


def merge(reviews: Mapping[str, Mapping[str, dict]]) -> list[dict]:
    """One record for each picture that at least one reviewer has decided.

    A picture is dropped if at least half of its reviewers drop it: no description is better than a
    doubtful one. The text is that of the first reviewer in `reviews` who edited it, or else the
    original. `votes` contains each reviewer's decision.
    """
    merged: dict[str, dict] = {}
    for reviewer in reviews.values():
        for image_id, record in reviewer.items():
            merged.setdefault(image_id, record)
    for image_id, record in merged.items():
        votes = {n: r[image_id] for n, r in reviews.items() if image_id in r}
        drops = sum(v["decision"] == "drop" for v in votes.values())
        edits = [v for v in votes.values() if v["decision"] == "edit"]
        kept = edits or [v for v in votes.values() if v["decision"] == "keep"]
        if 2 * drops >= len(votes):
            decision, text = "drop", record.get("before", record["text"])
        else:
            decision, text = kept[0]["decision"], kept[0]["text"]
        merged[image_id] = {
            "image_id": image_id,
            "picture": record["picture"],
            "decision": decision,
            "text": text,
            "votes": {name: vote["decision"] for name, vote in votes.items()},
        }
    return list(merged.values())


def check_reviews(path: str, records: Mapping[str, dict]) -> None:
    """UserError unless all records of the file are decisions of a reviewer."""
    for image_id, record in records.items():
        strings = all(isinstance(record.get(k), str) for k in ("text", "picture"))
        if record.get("decision") not in DECISIONS or not strings:
            raise UserError(
                f"{path} is not a review: “{image_id}” has no decision (keep, edit or drop) with "
                "text and picture."
            )
        if record["decision"] != "drop" and not record["text"].strip():
            raise UserError(
                f"“{image_id}” in {path} is kept without a text: write one, or drop it."
            )
