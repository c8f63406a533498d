"""The compiled decoder's headers (for ../native.c), and the code that builds it."""
