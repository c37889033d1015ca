"""The commands of `python -m gans`, each a module with `run`, which gets the words after the command's name."""
