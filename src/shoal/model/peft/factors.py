"""The numbers of clients' adapters, called *factors*: described, named and ready to be sent.

On the client they come from PEFT's layers (`shoal.model.peft.peft_layers`). On a server they become PEFT's layers again
(`shoal.model.peft.block_adapters`).
"""

# N factors

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from shoal.adapters import IA3, Lora, Prompt, adapter_name
from shoal.spans import Span

Layer = Lora | IA3 | Prompt


@dataclass(frozen=True)
class AdapterFactors:
    """A block's adapter as it is sent: `values` [N] are the factors of all its layers at one moment.

    Instances with the same `origin` are versions of one adapter. `hosted` is the name of a hosted adapter with these
    factors, if there is one (`shoal.model.peft.peft_folder`): servers that host it have them already.
    """

    name: str
    block: int
    layers: tuple[Layer, ...]
    values: Tensor
    origin: int = 0
    hosted: str | None = None

    @property
    def num_tensors(self) -> int:
        """The number of tensors that `values` consists of."""
        return sum(1 if isinstance(layer, Prompt) else len(layer.shapes(1, 1)) for layer in self.layers)

    @property
    def has_dropout(self) -> bool:
        """Whether a layer of it applies dropout."""
        return any(isinstance(layer, Lora) and layer.dropout > 0 for layer in self.layers)


@dataclass(frozen=True)
class FactorGradients:
    """The gradients [N] of a block's factors. `unused` has the indices of tensors that the computation did not use."""

    values: Tensor
    unused: frozenset[int] = frozenset()

    def __add__(self, other: FactorGradients) -> FactorGradients:
        """The gradients of both computations together, in float64.

        There the sum of numbers in float32 is exact, unless they differ by more than a factor of 2^29. So it is the
        same in any order, and `rounded` to float32 it is as near to the truth as it can be.
        """
        return FactorGradients(self.values.double() + other.values, self.unused & other.unused)

    def rounded(self) -> FactorGradients:
        """The same in float32, if they are a sum."""
        return replace(self, values=self.values.float()) if self.values.dtype == torch.float64 else self


@dataclass(frozen=True)
class ActiveAdapters:
    """The active adapters of all blocks that have one, at one moment."""

    blocks: Mapping[int, AdapterFactors] = field(default_factory=dict)

    def names(self, span: Span) -> tuple[str | None, ...]:
        """The names of the adapters of these blocks, one or None for each block; empty if no block has an adapter."""
        found = [self.blocks.get(block) for block in span]
        return tuple(None if each is None else each.name for each in found) if any(found) else ()

    def in_span(self, span: Span) -> list[AdapterFactors]:
        """The adapters of these blocks."""
        return [self.blocks[block] for block in span if block in self.blocks]

    @property
    def has_dropout(self) -> bool:
        """Whether one of them applies dropout."""
        return any(each.has_dropout for each in self.blocks.values())


def factors_name(block: int, layers: Sequence[Layer], values_N: Tensor) -> str:
    """The name of the adapter of a block with these layers and factors."""
    return adapter_name(block, layers, str(values_N.dtype), values_N.contiguous().view(torch.uint8).numpy().data)
