"""Bounds on what visitors and programs send: size, time, memory, files and addresses."""
