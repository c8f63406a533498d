"""Scores of answers, and the paper's experiments. See docs/evaluation.md."""
