"""The chat page and the API, as Docker and Spaces start them. See `python app.py --help`."""

import sys

from minigpt4.web.run import load, main, options

__all__ = ["load", "main", "options"]

if __name__ == "__main__":
    sys.exit(main())
