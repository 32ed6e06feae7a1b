"""The blocks of a span, for one forward or backward pass without a cache."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

from collections.abc import Mapping

import torch

from shoal.model.body import Body
from shoal.model.peft.block_adapters import BlockAdapter
from shoal.server.step_inputs import StepInputs
from shoal.spans import Span


class PassBlocks:
    """The blocks of a span, with the inputs of one pass. They are computed on the body's device, in its dtype.

    `adapters` are by block. Their dropout is drawn from `seed`, so that a block that is computed again drops the same.
    """

    def __init__(
        self, body: Body, span: Span, inputs: StepInputs, adapters: Mapping[int, BlockAdapter], seed: int | None
    ) -> None:
        device, dtype = body.backbone.device, body.backbone.dtype
        self.span = span
        self.adapters = adapters
        self.inputs_BTD = inputs.hidden_BTD.to(device, dtype)
        self._body = body
        self._seed = seed
        self._mask = None if inputs.mask_BT is None else inputs.mask_BT.to(device)
        self._positions = None if inputs.positions_BT is None else inputs.positions_BT.to(device)

    def __call__(self, block: int, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """The outputs [B, T, D] of one block."""
        adapter = self.adapters.get(block)
        if adapter is None:
            return self._compute(block, hidden_BTD, None)
        with adapter.seeded_dropout(None if self._seed is None else self._seed + block):
            return self._compute(block, hidden_BTD, adapter)

    def _compute(self, block: int, hidden_BTD: torch.Tensor, adapter: BlockAdapter | None) -> torch.Tensor:
        output_BTD: torch.Tensor = self._body(
            hidden_BTD,
            span=Span(block, block + 1),
            attention_mask=self._mask,
            position_ids=self._positions,
            overrides=None if adapter is None else {block: adapter.on},
        )
        return output_BTD
