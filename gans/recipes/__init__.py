"""The configuration of a run, which class each part of it builds, and the presets."""
