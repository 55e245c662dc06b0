"""Where a model is, and the mode that it is read in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch

from everlong.models.user_model import UserModel


@contextmanager
def serving(model: UserModel) -> Iterator[None]:
    """A block in which the model is in eval mode without gradients; every mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def device_of(model: UserModel) -> torch.device:
    """Where the model's tensors are; the CPU if it has none."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if tensor is None else tensor.device


def named_device(name: str) -> torch.device:
    """The device of a name such as ``cpu`` or ``cuda:1``, after a first tensor was put there.

    Raises:
        ValueError: if there is no such device, or it cannot be used here.
    """
    try:
        return torch.empty(1, device=torch.device(name)).device
    # torch raises AssertionError where it was built without the device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"device {name!r} cannot be used here: expected cpu, cuda, cuda:1 or the like, "
            f"received {name!r} ({reason})"
        ) from error
