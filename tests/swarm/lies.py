"""Servers that change what they answer and push."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from shoal.net.memory import Frame, MemoryNetwork
from shoal.net.wire import codec
from shoal.protocol import Opened, PassResult, Step, StepResult
from shoal.tensors import TensorName

Lie = Callable[[torch.Tensor], torch.Tensor]


def noise(strength: float) -> Lie:
    """Adds noise, relative to the size of each hidden state."""
    generator = torch.Generator().manual_seed(0)

    def add(hidden_BTD: torch.Tensor) -> torch.Tensor:
        size_BT1 = hidden_BTD.square().mean(dim=-1, keepdim=True).sqrt()
        return hidden_BTD + strength * size_BT1 * torch.randn(hidden_BTD.shape, generator=generator)

    return add


def shifted(hidden_BTD: torch.Tensor) -> torch.Tensor:
    """The outputs of other channels."""
    return hidden_BTD.roll(1, dims=-1)


class Liars:
    """Lets servers change what they answer and push."""

    def __init__(self, network: MemoryNetwork) -> None:
        self._lies: dict[str, tuple[Lie, bool, bool, TensorName]] = {}
        self._num_honest: dict[str, int] = {}  # frames
        network.on_frame = self._changed

    def add(
        self,
        name: str,
        lie: Lie,
        *,
        answers: bool = True,
        pushes: bool = True,
        after: int = 0,
        tensor: TensorName = "hidden",
    ) -> None:
        """A server lies from its answer or push number `after` on, in one tensor of these."""
        self._lies[name] = lie, answers, pushes, tensor
        self._num_honest[name] = after

    def _changed(self, frame: Frame) -> Frame:
        lie, answers, pushes, tensor = self._lies.get(frame.sender, (None, False, False, "hidden"))
        if lie is None or not frame.payload:
            return frame
        message, tensors = codec.decode(frame.header, bytearray(frame.payload))
        is_answer = isinstance(message, StepResult | Opened | PassResult)
        is_push = isinstance(message, Step)
        if tensor not in tensors or not ((is_answer and answers) or (is_push and pushes)):
            return frame
        self._num_honest[frame.sender] -= 1
        if self._num_honest[frame.sender] >= 0:
            return frame
        header, buffers = codec.encode(message, {**tensors, tensor: lie(tensors[tensor])})
        payload = b"".join(bytes(memoryview(each).cast("B")) for each in buffers)
        return replace(frame, header=header, payload=payload)
