"""Programs that made files of this repository; nothing in the package needs them."""
