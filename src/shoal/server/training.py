"""Single passes, forward and backward, a block at a time: whoever decodes meanwhile gets in between."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

from collections.abc import Generator

import torch

from shoal.model.body import Body
from shoal.server.refusal import Inputs
from shoal.spans import Span

Pieces = Generator[None, None, torch.Tensor]
"""Work in pieces: whoever drives it may do something else at every `yield`."""


def forward(body: Body, span: Span, inputs: Inputs) -> Pieces:
    """The outputs [B, T, D] of a span."""
    blocks = _Blocks(body, inputs)
    hidden_BTD = blocks.inputs
    for block in span:
        with torch.inference_mode():
            hidden_BTD = blocks(block, hidden_BTD)
        yield
    return hidden_BTD.to(inputs.hidden_BTD)


def backward(body: Body, span: Span, inputs: Inputs, grad_BTD: torch.Tensor) -> Pieces:
    """The gradient [B, T, D] of a span's inputs, its forward pass computed again."""
    blocks = _Blocks(body, inputs)
    hidden_BTD = blocks.inputs
    graphs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block in span:
        with torch.enable_grad():
            entered = hidden_BTD.detach().requires_grad_(True)
            hidden_BTD = blocks(block, entered)
        graphs.append((entered, hidden_BTD))
        yield
    gradient = grad_BTD.to(hidden_BTD)
    while graphs:
        entered, left = graphs.pop()
        (gradient,) = torch.autograd.grad(left, entered, gradient)
        yield
    return gradient.to(inputs.hidden_BTD)


class _Blocks:
    """Single blocks on one batch, computed where their weights are and as precisely as they are."""

    def __init__(self, body: Body, inputs: Inputs) -> None:
        device, dtype = body.backbone.device, body.backbone.dtype
        self.inputs = inputs.hidden_BTD.to(device, dtype)
        self._body = body
        self._mask = None if inputs.mask_BT is None else inputs.mask_BT.to(device)
        self._positions = None if inputs.positions_BT is None else inputs.positions_BT.to(device)

    def __call__(self, block: int, hidden_BTD: torch.Tensor) -> torch.Tensor:
        output_BTD: torch.Tensor = self._body(
            hidden_BTD, span=Span(block, block + 1), attention_mask=self._mask, position_ids=self._positions
        )
        return output_BTD
