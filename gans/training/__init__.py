"""The training loop and what surrounds it: updates, checkpoints, logs, interruption, memory and time."""
