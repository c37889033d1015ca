"""Answers that are kept: what every call of the public functions asks again."""

from __future__ import annotations

import functools
import marshal
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Answer = TypeVar("Answer")

MOST = 4096
"""Answers of a function."""


def remembered(method: Callable[[Any], Answer]) -> Callable[[Any], Answer]:
    """A method of an object that does not change, without arguments, whose answer the object keeps."""
    name = f"_{method.__name__}"

    @functools.wraps(method)
    def kept(self: Any) -> Answer:
        if torch.compiler.is_compiling():  # which traces what is computed, not what is kept
            return method(self)
        answers = self.__dict__
        if name not in answers:
            answers[name] = method(self)  # a frozen dataclass lets this pass
        return answers[name]

    return kept


def of_plain_values(function: Callable[..., Answer]) -> Callable[..., Answer]:
    """A function of numbers, and tuples and lists of them, that keeps its answers.

    Unlike ``functools.lru_cache`` it takes lists, and tells True from 1. Errors are not kept.
    """
    answers: dict[bytes, Answer] = {}

    @functools.wraps(function)
    def kept(*arguments: Any) -> Answer:
        if torch.compiler.is_compiling():
            return function(*arguments)
        try:
            asked = marshal.dumps(arguments, 2)  # of version 2: equal values have equal bytes
        except ValueError:  # a value of another kind
            return function(*arguments)
        answer = answers.get(asked)
        if answer is None:
            if len(answers) >= MOST:
                answers.clear()
            answer = answers[asked] = function(*arguments)
        return answer

    return kept
