"""The chat page and the API, as Docker and Spaces start them. See `python app.py --help`."""

import sys

try:
    from minigpt4.web.run import load, main, options
except KeyboardInterrupt:  # the imports above take a moment: no traceback for a Ctrl-C
    sys.exit(130)

__all__ = ["load", "main", "options"]

if __name__ == "__main__":
    sys.exit(main())
