"""What the capacity of a server depends on."""

from __future__ import annotations

from typing import Protocol

import torch

from shoal.model.linear.quantization import Quantization
from shoal.model.weights.checkpoint import Checkpoint


class Means(Protocol):
    """What a server computes with, and the bytes of memory that were free before it loaded blocks.

    `key` names the weights, their form and the machine, for all that is remembered about them.
    """

    @property
    def checkpoint(self) -> Checkpoint: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def quantization(self) -> Quantization: ...

    @property
    def free_bytes(self) -> int: ...

    @property
    def key(self) -> str: ...
