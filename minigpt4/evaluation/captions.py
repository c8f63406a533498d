"""`--experiment captions`: captions against people's, by every score that can be computed here."""

import argparse

from minigpt4.evaluation import report
from minigpt4.evaluation.java import java_scores
from minigpt4.evaluation.run import answer_and_score

NAMES = {
    "bleu1": "BLEU-1",
    "bleu4": "BLEU-4",
    "cider": "CIDEr",
    "meteor": "METEOR",
    "spice": "SPICE",
}


def run(options: argparse.Namespace) -> tuple[dict, str]:
    """(the figures, their table). With `detail`, of detailed descriptions."""
    scores, records = answer_and_score(options)
    report.write_lines(options.answers, records)
    answers = {r["key"]: r["answer"] for r in records}
    more, left_out = java_scores(answers, {r["key"]: r["captions"] for r in records})
    scores |= more | {"left_out": left_out}
    rows = [[NAMES[name], scores.get(name, "not computed")] for name in NAMES]
    rows += [
        ["repetition", report.percent(scores["repetition_rate"])],
        ["fragments", report.percent(scores["fragment_rate"])],
        ["words", f"{scores['words']:.1f}"],
    ]
    text = f"“{scores['instruction']}”, greedy, {scores['n']} pictures\n\n"
    text += report.table(["score", "value"], rows)
    for name, reason in left_out.items():
        text += f"\n\n{NAMES[name]} was left out: {reason}."
    return scores, text
