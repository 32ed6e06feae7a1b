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
    def checkpoint(self) -> Checkpoint:
        """The model in files."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is computed."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        ...

    @property
    def quantization(self) -> Quantization:
        """The form in which linear layers are held."""
        ...

    @property
    def free_bytes(self) -> int:
        """The memory that was free before blocks were loaded."""
        ...

    @property
    def key(self) -> str:
        """The name of the weights, their form and the machine."""
        ...
