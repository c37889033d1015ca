"""From what data say of their images to class numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def number_classes(
    values: Sequence[int | str], called: Mapping[int, str] | None = None
) -> tuple[list[int] | None, list[str]]:
    """The class of every image by number, and the names of the classes; None and no names if there are fewer than two.

    Classes are in the order of their values, numbers before names. `called` has names for numbers, and by that also
    classes without images.
    """
    called = called or {}
    order = sorted({*values, *called}, key=lambda value: (isinstance(value, str), value))
    if len(order) < 2:
        return None, []
    numbers = {value: i for i, value in enumerate(order)}
    return [numbers[value] for value in values], [called.get(value, str(value)) for value in order]  # type: ignore[arg-type]
