"""What a caller passes to blocks, checked and brought into the form in which it travels."""

# B sequences, T new tokens, S all tokens, D hidden size

from __future__ import annotations

import torch

from shoal.errors import UnsupportedOperation, UserError


def check_inputs(hidden_BTD: torch.Tensor) -> None:
    """Raises `UserError` for a tensor that is not a batch of hidden states, [B, T, D] with no dimension 0."""
    if hidden_BTD.dim() != 3 or not hidden_BTD.numel():
        raise UserError(
            f"inputs of shape {list(hidden_BTD.shape)}", hint="blocks take [batch, tokens, hidden size], none of them 0"
        )


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as it is sent: detached, contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous()


def mask_of(attention_mask: torch.Tensor | None, hidden_BTD: torch.Tensor, *, num_past: int = 0) -> torch.Tensor | None:
    """A mask as it travels, uint8: of the new tokens, [B, T], or also of the `num_past` tokens before them, [B, S].

    Raises `UserError` for another shape.
    """
    if attention_mask is None:
        return None
    batch_size, num_tokens, _ = hidden_BTD.shape
    if tuple(attention_mask.shape) not in ((batch_size, num_tokens), (batch_size, num_past + num_tokens)):
        after = f" after {num_past} others" * (num_past > 0)
        raise UserError(
            f"an attention mask of shape {list(attention_mask.shape)} for {batch_size} by {num_tokens} tokens{after}"
        )
    return (attention_mask != 0).to("cpu", torch.uint8)


def positions_of(position_ids: torch.Tensor | None, hidden_BTD: torch.Tensor) -> torch.Tensor | None:
    """Positions as they travel, [B, T] int64. Raises `UnsupportedOperation` for another shape."""
    if position_ids is None:
        return None
    if position_ids.dim() != 2 or position_ids.shape[1] != hidden_BTD.shape[1]:
        raise UnsupportedOperation("only position_ids of shape [batch, tokens] can be sent to servers")
    return position_ids.expand(hidden_BTD.shape[0], -1).to("cpu", torch.int64, copy=True)
