"""The engine where others run the language model or the GPU."""
