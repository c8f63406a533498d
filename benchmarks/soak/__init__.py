"""python -m benchmarks.soak: the server under load, faults and rubbish (see docs/trust.md)."""
