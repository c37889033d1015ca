"""The commands of `python -m gans`. Each module has `run(arguments)`, which gets the words after the command's name."""
