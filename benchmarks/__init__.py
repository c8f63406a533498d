"""Speed and memory, measured beside what else one could use."""
