"""Files that torch.save has written, read as tensors and plain values; no code that they name is run or imported.

Published files pickle their options as objects of all sorts of libraries. An instance of a class that torch does not
read becomes a dictionary here, where whatever the file puts into it lies unused. A pickle runs code by calling it: a
file that calls anything but what rebuilds tensors and plain values, or so much as names a part of Python's standard
library that is not known to be harmless, is refused.
"""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

TYPES = frozenset({f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "str", "tuple")})
NAMED = frozenset({"argparse.Namespace", "typing.Any"}) | TYPES
"""What options may name of the standard library, or be instances of."""

PATHS = frozenset({f"{home}.{kind}Path" for home in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")})
CALLED = frozenset({"collections.defaultdict", "types.SimpleNamespace"}) | PATHS
"""What makes an object by a call in a pickle, instead of which an empty dictionary is made here."""

ADVICE = (
    "If you trust the file, load it where its libraries are installed with torch.load(FILE, weights_only=False), and "
    "convert what torch.save writes of its state dicts alone"
)


def _empty(*arguments: Any) -> OrderedDict[Any, Any]:
    return OrderedDict()


class _StandIn(type):
    """Of classes that stand for those of other libraries: a pickle may make instances of them, but not call them."""

    def __call__(cls, *arguments: Any) -> Any:
        raise pickle.UnpicklingError(f"it calls {cls.__name__}")


def _stand_ins(path: Path) -> list[tuple[Callable[..., Any], str]]:
    """What torch is to take for each name in the file that it does not know; UnpicklingError for names of code."""
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    harmless = [name for name in unknown if name in NAMED or name.partition(".")[0] not in sys.stdlib_module_names]
    if refused := sorted(set(unknown) - {*harmless, *CALLED}):
        raise pickle.UnpicklingError(f"it asks for {', '.join(refused)}")
    # torch fills no dictionaries but those of a few classes, so instances have to be of one of them.
    return [(_StandIn(name, (), {"__new__": _empty}), name) for name in harmless] + [(_empty, name) for name in CALLED]


def _reason(error: pickle.UnpicklingError) -> str:
    """What is wrong, out of torch's page of advice."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not line.startswith("Check the documentation")]
    return lines[-1].removeprefix("WeightsUnpickler error: ").partition(". Please")[0].rstrip(".")


def read_published(path: Path) -> dict[str, Any]:
    """The dictionary in a file that torch.save has written, on the CPU; ValueError for anything else."""
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} is not a file")
    # Scores in published files are NumPy scalars, which torch does not read by itself; old files name an old module.
    scalar = np.float64(0).__reduce__()[0]
    known: list[Any] = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype]
    known += [type(np.dtype(name)) for name in ("float64", "float32", "int64")]
    try:
        packed = zipfile.is_zipfile(path)  # not so before torch 1.6
        with (
            torch.serialization.safe_globals(known),
            torch.serialization.safe_globals(_stand_ins(path) if packed else []),  # which looks at what is known
        ):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=packed or None)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint {str(path)!r} cannot be read as tensors and plain values: {_reason(error)}. {ADVICE}"
        ) from error
    except Exception as error:  # a damaged pickle raises all sorts
        raise ValueError(f"checkpoint {str(path)!r} cannot be read: {error!r}") from error
    if not isinstance(content, dict):
        raise ValueError(f"checkpoint {str(path)!r} holds a {type(content).__name__}, not a dictionary of state dicts")
    return content
