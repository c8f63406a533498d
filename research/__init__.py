"""Experiments on the architecture and the training. Nothing in the package depends on them."""
