"""The compiled decoder's source (see ../native.c), and what builds it."""
