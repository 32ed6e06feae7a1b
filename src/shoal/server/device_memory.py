"""What happens when the memory of a device runs out in a computation: it is undone, and the client comes back."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from shoal.server.refusals import busy

T = TypeVar("T")

log = logging.getLogger(__name__)


def unless_out_of_memory(compute: Callable[[], T]) -> T | None:
    """What `compute` returns; `None` if the device had no memory for it. Then its unused memory is released."""
    try:
        return compute()
    except torch.OutOfMemoryError as error:
        log.warning("out of memory: %s", str(error).partition("\n")[0])
    # Not within the handler: until it is left, the error holds the tensors of the computation.
    release_unused()
    return None


def or_busy(compute: Callable[[], T]) -> T:
    """What `compute` returns. Raises `Refused`, as busy, if the device had no memory for it."""
    outcome = unless_out_of_memory(lambda: (compute(),))
    if outcome is None:
        raise busy("the device has no memory for it now")
    return outcome[0]


def release_unused() -> None:
    """Give memory of GPUs that PyTorch keeps for later allocations back to the device."""
    gc.collect()  # modules, engines and errors refer to each other in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
