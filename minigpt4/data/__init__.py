"""Captioned pictures and the files they come in: shards, tables, JSON lines. No torch."""
