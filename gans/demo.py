"""`python -m gans.demo`: the command `demo`."""

import sys

from gans.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
