"""What a backward pass finds, and what of an answer belongs to which block."""

# B sequences, T tokens, D hidden size, N factors

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from shoal.model.factors import FactorGradients, Factors


@dataclass(frozen=True)
class Gradients:
    """What a backward pass finds: the gradient [B, T, D] of the inputs, if wanted, and those of blocks' factors."""

    inputs_BTD: torch.Tensor | None
    factors: Mapping[int, FactorGradients]


def by_block(
    factors: Sequence[Factors], found_N: torch.Tensor | None, unused: Sequence[int]
) -> dict[int, FactorGradients] | None:
    """A server's answer for the factors of a span, block after block; `None` if it is of something else."""
    sizes = [len(each.values) for each in factors]
    if not factors and found_N is None:
        return {}
    if found_N is None or found_N.shape != (sum(sizes),) or not found_N.is_floating_point():
        return None
    gradients, start = {}, 0
    for each, part in zip(factors, found_N.split(sizes), strict=True):
        own = range(start, start + each.num_tensors)
        gradients[each.block] = FactorGradients(part, frozenset(index - start for index in unused if index in own))
        start = own.stop
    return gradients
