"""Another model judges answers, through any OpenAI-compatible API."""

import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from minigpt4 import image
from minigpt4.data_url import data_url
from minigpt4.errors import UserError
from minigpt4.evaluation import report
from minigpt4.training.data import PROMPTS

AT_ONCE = 4  # requests
RETRIES = 5  # with back-off, where the server is busy or fails
SECONDS = 120.0  # for one reply
SIDE = 768  # longest side of a picture that is judged by, in pixels


@dataclass(frozen=True)
class Verdict:
    """What was found of one answer; `score` from 1 to 5, None where none was given."""

    fulfilled: bool
    score: int | None
    reason: str = ""


@dataclass(frozen=True)
class Case:
    """What is judged. about: what the picture shows, in words, "" where that is not known."""

    task: str
    instruction: str
    about: str
    picture: Path
    answer: str


class Judge:
    """url: of the API, as far as /v1; blind: it is sent no picture, and `about` instead."""

    def __init__(self, url: str, model: str, blind: bool = False) -> None:
        from openai import OpenAI

        self.url, self.model, self.blind = url, model, blind
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client = OpenAI(base_url=url, api_key=key, max_retries=RETRIES, timeout=SECONDS)
        self._prompt = report.read_text(PROMPTS / "judge.txt")
        self._criteria = read_rubric()

    def judge(self, cases: Sequence[Case]) -> list[Verdict | None]:
        """A verdict for each; None where the reply was none, or none came.

        UserError where the judge cannot be reached or refuses all of it.
        """
        with ThreadPoolExecutor(AT_ONCE) as pool:
            pending = [pool.submit(self._one, case) for case in cases]
            try:
                return [p.result() for p in pending]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _one(self, case: Case) -> Verdict | None:
        import openai

        try:
            reply = self._client.chat.completions.create(
                model=self.model, temperature=0, messages=[self._message(case)]
            )
        except (openai.RateLimitError, openai.InternalServerError, openai.APITimeoutError):
            return None  # again and again: one lost verdict does not lose the others
        except openai.APIStatusError as error:
            raise UserError(
                f"The judge at {self.url} refuses with status {error.status_code}: check --judge, "
                "--judge-model and $OPENAI_API_KEY, or leave the pictures out by --judge-blind."
            ) from error
        except openai.OpenAIError as error:
            raise UserError(f"The judge at {self.url} cannot be reached: check --judge.") from error
        return read_verdict((reply.choices[0].message.content or "") if reply.choices else "")

    def _message(self, case: Case) -> dict:
        about = f"The picture shows: {case.about}" if case.about else ""
        text = fill(
            self._prompt,
            picture=about if case.about or not self.blind else "The picture is not known to you.",
            instruction=case.instruction,
            criterion=self._criteria.get(case.task, self._criteria["other"]),
            answer=case.answer,
        )
        content: list[dict] = [{"type": "text", "text": text}]
        if not self.blind:
            url = data_url(image.load(case.picture), SIDE)
            content.append({"type": "image_url", "image_url": {"url": url}})
        return {"role": "user", "content": content}


def read_rubric() -> dict[str, str]:
    """Task -> what a good answer does, from prompts/rubric.txt; "other" is for any other task."""
    lines = report.read_text(PROMPTS / "rubric.txt").splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line and not line.startswith("#"))
    return {"other": "does what was requested."} | {t.strip(): text.strip() for t, text in pairs}


def fill(template: str, **values: str) -> str:
    """The template with {name} filled in, in one pass: what is filled in is not looked into."""
    names = "|".join(values)
    return re.sub(rf"\{{({names})\}}", lambda found: values[found[1]], template)


def read_verdict(reply: str) -> Verdict | None:
    """The verdict in a judge's reply: its last JSON object with "fulfilled"; None without one."""
    for found in reversed(re.findall(r"\{[^{}]*\}", reply)):
        try:
            record = json.loads(found)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("fulfilled"), bool):
            score = record.get("score")
            good = isinstance(score, int) and not isinstance(score, bool) and 1 <= score <= 5
            reason = str(record.get("reason", ""))
            return Verdict(record["fulfilled"], score if good else None, reason)
    return None
