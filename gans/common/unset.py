"""Names that are empty, as of a shell's variable that is not set: as a path, '' would be the current folder."""

from __future__ import annotations


def names_nothing(name: str) -> str:
    """The message that argument `name` is ''."""
    return f"{name} is '', which names nothing (an unset variable?)"
