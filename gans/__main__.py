"""`python -m gans`."""

import sys

from gans.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
