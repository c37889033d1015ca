"""From what data say of their images to class numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

NONE = (-1, "-1")
"""Labels that stand for none, by a convention of many data sets."""


class ClassNames:
    """Names of class numbers: a number has one, and no two have the same."""

    def __init__(self) -> None:
        self.by_number: dict[int, str] = {}
        self._numbers: dict[str, int] = {}
        self._said: dict[int, str] = {}

    def add(self, number: int, name: str, by: str) -> None:
        """What `by` says; ValueError, which names both, if another has said otherwise."""
        known = self.by_number.setdefault(number, name)
        first = self._said.setdefault(number, by)
        if known != name:
            raise ValueError(
                f"class {number} is called {known!r} by {first}, and {name!r} by {by}; it must have one name"
            )
        other = self._numbers.setdefault(name, number)
        if other != number:
            raise ValueError(
                f"the name {name!r} is class {other}'s by {self._said[other]}, and class {number}'s by {by}; "
                "classes must have names of their own"
            )


def number_classes(
    values: Sequence[Any], image: Callable[[int], str], called: Mapping[int, str] | None = None
) -> tuple[list[int] | None, list[str]]:
    """The class of every image by number, and the names of the classes; None and no names if there are fewer than two.

    Classes are in the order of their values. `called` has names for numbers, and by that also classes without images.
    Raises ValueError, naming what `image` calls image i, if a value is neither number nor name or stands for none, or
    if some are numbers and others, or those that `called` names, are not.
    """
    called = called or {}
    for i, value in enumerate(values):
        if not isinstance(value, (int, str)) or value in NONE:
            raise ValueError(
                f"the label of {image(i)} is {value!r}; it must be a number or a name, and -1 stands for none"
            )
        if isinstance(value, str) != isinstance(values[0], str):
            raise ValueError(
                f"the label of {image(0)} is {values[0]!r}, and that of {image(i)} is {value!r}; all must be numbers, "
                "or all names"
            )
        if called and isinstance(value, str):
            raise ValueError(
                f"the label of {image(i)} is {value!r}, and {next(iter(called.values()))!r} is the name of a number; "
                "where numbers have names, labels must be numbers"
            )
    order = sorted({*values, *called})
    if len(order) < 2:
        return None, []
    numbers = {value: i for i, value in enumerate(order)}
    return [numbers[value] for value in values], [called.get(value, str(value)) for value in order]


class NamedImages:
    """Images with names, whose labels are found when they are asked for: training does without, so it needs no
    complete ones.
    """

    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def labels(self) -> list[int] | None:
        return self._labelled[0]

    @property
    def classes(self) -> list[str]:
        return self._labelled[1]

    @cached_property
    def _labelled(self) -> tuple[list[int] | None, list[str]]:
        return self.find_labels()

    def find_labels(self) -> tuple[list[int] | None, list[str]]:
        """As `number_classes` gives them."""
        raise NotImplementedError
