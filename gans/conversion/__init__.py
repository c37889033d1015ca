"""Published checkpoints, read safely and translated to our networks."""
