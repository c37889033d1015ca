"""Attention backends of natten_ext that are asked for by name, which may not run what they are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import natten_ext
from natten_ext.backends.choice import ENVIRONMENT_VARIABLE, check_name


def asked_for(option: str | None) -> str | None:
    """The backend that an option or else the environment names; None if none does, or one that runs everything."""
    name = (os.environ.get(ENVIRONMENT_VARIABLE) or None) if option is None else option
    return None if name in (None, "auto", "reference") else name


@contextmanager
def must_run(name: str, what: str, device: torch.device) -> Iterator[None]:
    """Inside, attention is plain PyTorch's without gradients; at the end, ValueError with the reason if backend `name`
    could not have run it on `device` for `what`; at the beginning, if there is no such backend.
    """
    check_name(name)
    with natten_ext.use_backend("reference"), natten_ext.record_calls() as calls, torch.no_grad():
        yield
    for call in calls:
        kind = {"dtype": call.dtype, "head_dim": call.query_shape[-1], "neighborhood": call.neighborhood}
        for status in natten_ext.list_backends(device, **kind, keys=call.keys):
            if status.name == name and not status.available:
                raise ValueError(f"backend {name!r} cannot run this {what} on {device}: {status.reason}")
