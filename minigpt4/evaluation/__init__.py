"""Scores for captions and descriptions, and how often answers fail."""
