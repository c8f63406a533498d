"""Another model judges answers, through any OpenAI-compatible API."""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from minigpt4.data.files import PROMPTS, naming, read_jsonl, read_text, repair_jsonl
from minigpt4.errors import UserError
from minigpt4.model import image
from minigpt4.remote.endpoint import Endpoint, Refused, encodable

AT_ONCE = 4  # requests
RETRIES = 5
SECONDS = 120.0  # for one reply
SIDE = 768  # pixels; longest side of a picture that the judge receives


@dataclass(frozen=True)
class Verdict:
    """The verdict on one answer. score: from 1 to 5; None if the judge gave none."""

    fulfilled: bool
    score: int | None
    reason: str = ""


@dataclass(frozen=True)
class Case:
    """An answer to judge. about: what the picture shows, in words; "" if unknown."""

    task: str
    instruction: str
    about: str
    picture: Path
    answer: str


class Judge:
    """A model behind an API.

    url: of the API, up to /v1. blind: send `Case.about` instead of the picture.
    """

    def __init__(self, url: str, model: str, blind: bool = False) -> None:
        key = os.environ.get("OPENAI_API_KEY", "")
        self._endpoint = Endpoint(url, key, model, RETRIES, SECONDS)
        self.blind = blind
        self._replied = False
        self._prompt = read_text(PROMPTS / "judge.txt")
        self._criteria = read_rubric()

    def judge(self, cases: Sequence[Case], kept: str | None = None) -> list[Verdict | None]:
        """The verdict on each case; None if there was no reply, or no verdict in it.

        kept: a file of verdicts. Verdicts on the same cases by the same model are read from it, new
        ones are appended. UserError if the judge cannot be reached or refuses all cases.
        """
        known = self._known(kept)
        keys = [self._key(case) for case in cases]
        asked = {k: case for k, case in zip(keys, cases, strict=True) if k not in known}
        with (
            naming(kept),
            open(kept or os.devnull, "a", encoding="utf-8") as file,
            ThreadPoolExecutor(AT_ONCE) as pool,
        ):
            pending = {key: pool.submit(self._one, case) for key, case in asked.items()}
            try:
                for key, case in asked.items():
                    known[key] = verdict = pending[key].result()
                    if isinstance(verdict, Verdict):
                        record = {"key": key, "answer": case.answer, **vars(verdict)}
                        print(json.dumps(record, ensure_ascii=False), file=file, flush=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        found = [known[key] for key in keys]
        faults = [f for f in found if isinstance(f, UserError)]
        if faults and len(faults) == len(found):
            raise faults[0]
        return [None if isinstance(f, UserError) else f for f in found]

    def _known(self, kept: str | None) -> dict[str, Verdict | None | UserError]:
        """The verdicts of earlier runs, by key."""
        if not kept or not Path(kept).exists():
            return {}
        repair_jsonl(kept)
        return {r["key"]: _verdict(r) for r in read_judged(kept, "key", "score", "reason")}

    def _key(self, case: Case) -> str:
        """A hash of all that a verdict depends on: the judge, the text, the picture."""
        asked = [self._endpoint.name, self._text(case)]
        asked += [] if self.blind else [hashlib.sha256(case.picture.read_bytes()).hexdigest()]
        return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]

    def _one(self, case: Case) -> Verdict | None | UserError:
        """The verdict; None if there is none; a UserError if the judge refused the case.

        An error that every case would meet, such as a wrong key, is raised, unless there was a
        reply before: its verdict must not be lost.
        """
        import openai

        url = self._endpoint.url
        try:
            reply = self._endpoint.ask(self._content(case))
        except (openai.RateLimitError, openai.InternalServerError, openai.APITimeoutError):
            return None  # after all retries
        except openai.APIStatusError as error:
            fault = UserError(
                f"The judge at {url} refuses with status {error.status_code}: check --judge, "
                "--judge-model and $OPENAI_API_KEY, or omit the pictures with --judge-blind."
            )
            lasting = error.status_code in (401, 403, 404)
        except openai.OpenAIError:
            fault = UserError(f"The judge at {url} cannot be reached: check --judge.")
            lasting = True
        except Refused as error:
            fault = UserError(
                f"The judge at {url} answers with an error ({error}): run it again when that is "
                "settled."
            )
            lasting = False
        except ValueError:
            fault = UserError(f"The page at {url} is not an API: its address should end in /v1.")
            lasting = True
        else:
            self._replied = True
            return read_verdict(reply.text) if reply else None
        if lasting and not self._replied:
            raise fault
        return fault

    def _text(self, case: Case) -> str:
        about = f"The picture shows: {case.about}" if case.about else ""
        return fill(
            self._prompt,
            picture=about if case.about or not self.blind else "The picture is not known to you.",
            instruction=case.instruction,
            criterion=self._criteria.get(case.task, self._criteria["other"]),
            answer=case.answer,
        )

    def _content(self, case: Case) -> list[dict]:
        content: list[dict] = [{"type": "text", "text": self._text(case)}]
        if not self.blind:
            url = image.data_url(image.load(case.picture), SIDE)
            content.append({"type": "image_url", "image_url": {"url": url}})
        return content


def read_rubric() -> dict[str, str]:
    """Task -> what a good answer does, from prompts/rubric.txt; "other" is for all other tasks."""
    lines = read_text(PROMPTS / "rubric.txt").splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))
    return {"other": "does what was requested."} | {t.strip(): text.strip() for t, text in pairs}


def fill(template: str, **values: str) -> str:
    """The template with each {name} replaced. Braces inside the values are left as they are."""
    names = "|".join(values)
    return re.sub(rf"\{{({names})\}}", lambda found: values[found[1]], template)


def read_judged(path: str, *needed: str) -> list[dict]:
    """JSON lines with "fulfilled" and the fields `needed`. UserError if a line lacks one."""
    records = read_jsonl(path, *needed, "fulfilled")
    if not all(isinstance(r["fulfilled"], bool) for r in records):
        raise UserError(f"{path}: “fulfilled” must be true or false.")
    return records


def read_verdict(reply: str) -> Verdict | None:
    """The verdict in a reply: its last JSON object with "fulfilled"; None if there is none."""
    found, end = None, 0
    for start in (place.start() for place in re.finditer(r"\{", reply)):
        try:
            record, after = json.JSONDecoder().raw_decode(reply, start)
        except (ValueError, RecursionError):
            continue
        if start >= end and isinstance(record.get("fulfilled"), bool):
            found, end = _verdict(record), after
    return found


def _verdict(record: dict) -> Verdict:
    """A verdict from a record with "fulfilled"; without a number from 1 to 5, its score is None."""
    score = record.get("score")
    if isinstance(score, str | float) and re.fullmatch(r"\s*[1-5](\.0*)?\s*", str(score)):
        score = int(float(score))
    good = isinstance(score, int) and not isinstance(score, bool) and 1 <= score <= 5
    reason = encodable(str(record.get("reason", "")))
    return Verdict(record["fulfilled"], score if good else None, reason)
