"""The same engine where other processes run the language model or own the GPU."""
