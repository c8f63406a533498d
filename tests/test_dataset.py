"""The published descriptions: what their card says of them is so."""

import json
import re
import subprocess
from collections import Counter
from pathlib import Path

from minigpt4.curation import filters

ROOT = Path(__file__).parent.parent
TEXTS = json.loads((ROOT / "data" / "stage2" / "filter_cap.json").read_text(encoding="utf-8"))
CARD = " ".join((ROOT / "data" / "README.md").read_text(encoding="utf-8").split())


def test_the_card_counts_right():
    texts = TEXTS["annotations"]
    assert [t["image_id"] for t in texts] == [str(i) for i in range(599)]
    assert len({t["source_image"] for t in texts}) == 599
    assert Counter(t["source"] for t in texts) == {"flickr8k": 440, "imagenet_samples": 159}
    lengths = [len(t["caption"].split()) for t in texts]
    assert f"{min(lengths)} to {max(lengths)} words long" in CARD
    assert f"({sum(lengths) / 599:.0f} on average)" in CARD
    for words, said in (
        ("dogs?", "{} texts mention dogs"),
        ("man|men|boys?|he|his", "{} men or boys"),
        ("woman|women|girls?|she|her", "{} women or girls"),
    ):
        found = sum(bool(re.search(rf"\b({words})\b", t["caption"].lower())) for t in texts)
        assert said.format(found) in CARD
    begins = Counter(" ".join(t["caption"].split()[:2]) for t in texts)
    assert f"({begins['The image']}) begin" in CARD and f"{begins['In this']} with" in CARD


def test_the_filter_drops_none():
    records = [t | {"text": t["caption"]} for t in TEXTS["annotations"]]
    counts = filters.counts(filters.apply(records, filters.Thresholds()))
    assert not any(counts.values()), counts


def test_no_pictures_are_published_with_them():
    listed = subprocess.run(["git", "ls-files", "data"], cwd=ROOT, capture_output=True, text=True)
    files = listed.stdout.split() or [p.as_posix() for p in (ROOT / "data").rglob("*.*")]
    assert {Path(f).suffix for f in files} <= {".json", ".md", ".jsonl"}
