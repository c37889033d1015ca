"""`python -m gans`."""

import sys

from gans.cli import main

if __name__ == "__main__":
    sys.exit(main())
