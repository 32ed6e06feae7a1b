"""A streamer that makes something happen in the middle of a generation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import TextStreamer


class CallAfter(TextStreamer):
    """Calls `act` when it was given `num_tokens` tokens; the prompt counts as one."""

    def __init__(self, num_tokens: int, act: Callable[[], None]) -> None:
        self._left = num_tokens
        self._act = act

    def put(self, value: torch.Tensor) -> None:
        self._left -= 1
        if self._left == 0:
            self._act()

    def end(self) -> None:
        pass
