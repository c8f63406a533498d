"""Find, download, check and load a model's weights."""
