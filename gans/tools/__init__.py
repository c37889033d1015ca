"""The commands that work on trained generators: sample, interpolate, convert, evaluate, train-judge.

Each module has `run(arguments)`, which `gans.cli` calls with the words that follow the command's name.
"""
