"""Step 4, review: one person's decisions on the descriptions, each saved at once.

The page is in `review_page`; there is no gradio here.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Sequence

from minigpt4.curation.pictures import load_picture
from minigpt4.curation.records import Records, writing
from minigpt4.data.files import replacing
from minigpt4.errors import UserError
from minigpt4.model.image import Picture


class Review:
    """The descriptions to decide on, the decisions, and drafts of edited texts.

    items: records of the previous step, in the order of the review. records: the reviewer's file.
    A decision does not count if the description has changed since. Drafts are saved beside the
    file, in FILE.draft.
    """

    def __init__(
        self, items: Sequence[dict], records: Records, reviewer: str, pictures: str | None = None
    ) -> None:
        if not items:
            raise UserError("There is nothing to review: the file contains no description to keep.")
        self.reviewer = reviewer
        self._items = {item["image_id"]: item for item in items}
        self._order = list(self._items)
        self._records = records
        self._pictures = pictures
        self._lock = threading.Lock()
        self._draft_file = records.path.with_name(records.path.name + ".draft")
        self._drafts: dict[str, str] = self._read_drafts()

    def __len__(self) -> int:
        return len(self._order)

    def decision(self, image_id: str) -> str:
        """ "keep", "edit", "drop", or "" if there is no decision yet."""
        return self._decided(image_id).get("decision", "")

    def counts(self) -> Counter[str]:
        """Decision -> number of pictures; "" stands for no decision."""
        return Counter(map(self.decision, self._order))

    def next(self, after: str = "") -> str:
        """The next picture without a decision after `after`, continuing at the start; "" if all
        are decided."""
        start = self._order.index(after) + 1 if after in self._items else 0
        for image_id in self._order[start:] + self._order[:start]:
            if not self.decision(image_id):
                return image_id
        return ""

    def previous(self, before: str) -> str:
        """The picture before this one, decided or not; the last one for ""."""
        if before not in self._items:
            return self._order[-1]
        return self._order[max(0, self._order.index(before) - 1)]

    def text(self, image_id: str) -> str:
        """The draft, or else the decided text, or else the original."""
        if image_id in self._drafts:
            return self._drafts[image_id]
        return self._settled(image_id)

    def _settled(self, image_id: str) -> str:
        return self._decided(image_id).get("text", self._items[image_id]["text"])

    def _decided(self, image_id: str) -> dict:
        """The record of the decision on the current description; empty if there is none."""
        record = self._records.records.get(image_id, {})
        now = self._items[image_id]["text"]
        return record if record.get("before", now) == now else {}

    def place(self, image_id: str) -> int:
        """The picture's number, from 1."""
        return self._order.index(image_id) + 1

    def picture(self, image_id: str) -> Picture:
        """The decoded picture. UserError if it cannot be read."""
        return load_picture(self._items[image_id]["picture"], self._pictures)

    def decide(self, image_id: str, drop: bool, text: str) -> str:
        """Save a decision and return it; it is on the disk when this returns."""
        item = self._items[image_id]
        text = text.strip()
        if not drop and not text:
            raise UserError("The description is empty: write one, or drop it.")
        decision = "drop" if drop else "keep" if text == item["text"].strip() else "edit"
        record = {
            "image_id": image_id,
            "picture": item["picture"],
            "decision": decision,
            "text": text or item["text"],  # a dropped text can be restored
            "before": item["text"],
            "reviewer": self.reviewer,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        with self._lock:
            self._records.append(record)
            if self._drafts.pop(image_id, None) is not None:
                self._write_drafts()
        return decision

    def note(self, image_id: str, text: str) -> None:
        """Save the draft of a text."""
        if image_id in self._items:
            with self._lock:
                self._drafts[image_id] = text
                if text == self._settled(image_id):
                    del self._drafts[image_id]
                self._write_drafts()

    def _read_drafts(self) -> dict[str, str]:
        try:
            found = json.loads(self._draft_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {k: v for k, v in found.items() if k in self._items and isinstance(v, str)}

    def _write_drafts(self) -> None:
        with writing(self._draft_file):
            if not self._drafts:
                self._draft_file.unlink(missing_ok=True)
                return
            with replacing(self._draft_file) as partial:
                partial.write_text(json.dumps(self._drafts, ensure_ascii=False), encoding="utf-8")
