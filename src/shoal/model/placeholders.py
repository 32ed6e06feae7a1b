"""Modules that stand in a backbone for what another machine computes."""

# B rows, T new tokens, D hidden size

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PassThroughLayer(nn.Module):
    """Stands in the list of layers for a layer that is computed elsewhere. It returns the hidden states unchanged.

    Backbones ask a layer for its kind (`layer.attention_type`). Such attributes are those of the original layer.
    """

    def __init__(self, layer: nn.Module, *, returns_tuple: bool) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not registered as a submodule, because its weights are not here
        self._returns_tuple = returns_tuple

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        hidden_BTD = self.compute(args[0] if args else kwargs["hidden_states"])
        return (hidden_BTD, None) if self._returns_tuple else hidden_BTD  # None for the attention weights

    def compute(self, hidden_BTD: Tensor) -> Tensor:
        """The hidden states that leave the layer; subclasses compute them elsewhere."""
        return hidden_BTD


class ClientModuleStub(nn.Module):
    """Stands in a server's backbone for a module that the client computes, such as the embeddings or the final norm.

    Its output is never used, but the backbone must be able to continue with it. Hidden states are returned unchanged.
    For any other input (token ids, positions, a mask) it returns a zero, which can be added to hidden states.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        tensors = [argument for argument in (*args, *kwargs.values()) if isinstance(argument, Tensor)]
        hidden = (tensor for tensor in tensors if tensor.is_floating_point() and tensor.dim() == 3)
        return next(hidden, torch.zeros((), device=tensors[0].device))
