"""How far apart the outputs of two servers are, in units of what the blocks change; and their gradients."""

# B sequences, T tokens, D hidden size, N tokens of all sequences

from __future__ import annotations

import torch

_LEAST = 1e-12


def distances(
    claimed_BTD: torch.Tensor,
    witnessed_BTD: torch.Tensor,
    inputs_BTD: torch.Tensor,
    mask_BT: torch.Tensor | None = None,
) -> list[float]:
    """For each token that is no padding, how far what is claimed is from what a witness computed; NaN if not finite.

    It is the larger of two relative distances. In the first, all of the hidden state counts as it is; a few channels of
    many models are hundreds of times as large as the others. In the second, each channel counts in units of its own
    usual change over these tokens, so that nothing can be hidden in the small ones.
    """
    claimed_ND, witnessed_ND, inputs_ND = (
        each.flatten(0, 1).double() for each in (claimed_BTD, witnessed_BTD, inputs_BTD)
    )
    if mask_BT is not None:
        kept = mask_BT.flatten().bool()
        claimed_ND, witnessed_ND, inputs_ND = claimed_ND[kept], witnessed_ND[kept], inputs_ND[kept]
    difference_ND, change_ND = claimed_ND - witnessed_ND, witnessed_ND - inputs_ND
    whole_N = difference_ND.norm(dim=-1) / change_ND.norm(dim=-1).clamp(min=_LEAST)
    usual_D = change_ND.square().mean(dim=0).sqrt().clamp(min=_LEAST)
    by_channel_N = (difference_ND / usual_D).square().mean(dim=-1).sqrt()
    found: list[float] = torch.maximum(whole_N, by_channel_N).tolist()
    return found


def relative_distance(claimed: torch.Tensor, witnessed: torch.Tensor) -> float:
    """How far a gradient is from what a witness computed, relative to that, as a whole; NaN if one is not finite."""
    claimed, witnessed = claimed.double(), witnessed.double()
    return float((claimed - witnessed).norm() / witnessed.norm().clamp(min=_LEAST))
