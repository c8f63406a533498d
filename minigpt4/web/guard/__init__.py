"""Bounds on what visitors send."""
