"""Clients' adapters in a server's blocks: PEFT's own layers around linear layers that all clients share.

The layers run PEFT's code, as on one machine. They are put into a copy of the block that shares everything else
(`shoal.model.module_view`), so that an adapter affects only computations that name it. `shoal.adapters` has the
descriptions of adapters.
"""

# B sequences, T tokens, D hidden size, P tokens of a prompt, N factors or rows

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shoal.adapters import IA3, Lora, Prompt
from shoal.model.linear.packed_linear import FrozenLinear
from shoal.model.module_view import with_input_change, with_submodules
from shoal.model.peft.factors import Layer
from shoal.model.peft.skeleton import LINEAR, Conv1DSkeleton, LinearSkeleton, num_features

PEFT_ADAPTER_NAME = "adapter"
"""The name by which PEFT knows the adapter of a layer. A server's layers have one adapter each."""


def import_peft() -> None:
    """Import PEFT. This takes seconds, during which a server that received an adapter would not answer."""
    from peft.tuners import ia3, lora  # noqa: F401


class BlockAdapter:
    """One client's adapter of one block, as PEFT's layers. Its factors never change."""

    def __init__(
        self, block: nn.Module, layers: Sequence[Layer], values_N: Tensor, *, name: str, hidden_size: int
    ) -> None:
        """Make the layers for `block` from their factors `values_N`, which are on the block's device.

        Raises `ValueError` for layers that the block does not have, and for a wrong number of factors.
        """
        self.name = name
        self.nbytes = values_N.nbytes
        self.dtype = values_N.dtype
        self.layers: dict[str, nn.Module] = {}
        self.prompt_PD: Tensor | None = None
        self._dropouts: list[tuple[nn.Module, _Dropout]] = []  # each with its layer
        bases = [None if isinstance(layer, Prompt) else _linear(block, layer.module) for layer in layers]
        shapes = [_shapes(layer, base, hidden_size) for layer, base in zip(layers, bases, strict=True)]
        counts = [math.prod(shape) for each in shapes for shape in each]
        if sum(counts) != len(values_N):
            raise ValueError(f"{len(values_N)} factors for layers that have {sum(counts)}")
        parts = iter(values_N.split(counts))
        self.parameters: list[nn.Parameter] = []
        for layer, base, each in zip(layers, bases, shapes, strict=True):
            own = [nn.Parameter(next(parts).view(shape)) for shape in each]
            self.parameters += own
            self._add(layer, base, own)

    def _add(self, layer: Layer, base: nn.Module | None, own: list[nn.Parameter]) -> None:
        if isinstance(layer, Prompt):
            if self.prompt_PD is not None:
                raise ValueError("two prompts")
            (self.prompt_PD,) = own
            return
        assert base is not None
        if layer.module in self.layers:
            raise ValueError(f"{layer.module} has two adapters")
        added = _lora(layer, base, own) if isinstance(layer, Lora) else _ia3(layer, base, own)
        if isinstance(layer, Lora) and layer.dropout:
            dropout = _Dropout(layer.dropout)
            added.lora_dropout[PEFT_ADAPTER_NAME] = dropout
            self._dropouts.append((added, dropout))
        self.layers[layer.module] = added

    def on(self, block: nn.Module, start: int = 0) -> nn.Module:
        """A copy of the block with this adapter, for the tokens from `start` on."""
        adapted = with_submodules(block, self.layers)
        prompt_PD = self.prompt_PD
        if prompt_PD is None or start >= len(prompt_PD):
            return adapted
        return with_input_change(adapted, lambda hidden_BTD: add_prompt(hidden_BTD, prompt_PD, start))

    @contextmanager
    def seeded_dropout(self, seed: int | None) -> Iterator[None]:
        """In this context, apply dropout that depends on `seed` only, equal on every device.

        Without a seed, and outside of the context, there is no dropout.
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._set_generator(generator)
        try:
            yield
        finally:
            self._set_generator(None)  # because sessions compute with the same layers

    def _set_generator(self, generator: torch.Generator | None) -> None:
        for layer, dropout in self._dropouts:
            dropout.generator = generator
            layer.training = generator is not None  # PEFT's DoRA applies dropout only in training


def add_prompt(hidden_BTD: Tensor, prompt_PD: Tensor, start: int) -> Tensor:
    """Add a prompt to hidden states of the tokens from `start` on: row i of it to token i of the sequence."""
    some_PD = prompt_PD[start : start + hidden_BTD.shape[1]].to(hidden_BTD.dtype)
    num_some = len(some_PD)
    return torch.cat((hidden_BTD[:, :num_some] + some_PD, hidden_BTD[:, num_some:]), dim=1)


def weight_row_norms(block: nn.Module, paths: Sequence[str]) -> Tensor:
    """The norms [N] of the rows of these linear layers' weights, computed as in PEFT, one layer after the other.

    Raises `ValueError` if the block has no such layer.
    """
    weights = ((base, base.weight) for base in (_linear(block, path) for path in paths))
    each = [torch.linalg.norm(weight.T if isinstance(base, Conv1D) else weight, dim=1) for base, weight in weights]
    return torch.cat(each).float()


def _linear(block: nn.Module, path: str) -> nn.Module:
    try:
        found = block.get_submodule(path)
    except AttributeError:
        raise ValueError(f"blocks of this model have no {path}") from None
    if not isinstance(found, (*LINEAR, FrozenLinear)):
        raise ValueError(f"{path} is not a linear layer")
    return found


def _shapes(layer: Layer, base: nn.Module | None, hidden_size: int) -> list[tuple[int, ...]]:
    if isinstance(layer, Prompt):
        return [(layer.num_tokens, hidden_size)]
    assert base is not None
    return layer.shapes(*num_features(base))


def _lora(layer: Lora, base: nn.Module, own: list[nn.Parameter]) -> Any:
    """PEFT's LoRA layer around a linear layer. It is made on the meta device, where this is fast."""
    from peft import LoraConfig
    from peft.tuners import lora

    config = LoraConfig(
        r=layer.rank,
        lora_alpha=layer.rank,
        lora_bias=layer.bias,
        use_dora=layer.dora,
        init_lora_weights=False,
        fan_in_fan_out=isinstance(base, Conv1D),
    )
    with torch.device("meta"):
        made = lora.Linear(_skeleton(base), PEFT_ADAPTER_NAME, config, r=layer.rank, lora_alpha=layer.rank)
    made.eval()
    made.base_layer = base
    made.scaling[PEFT_ADAPTER_NAME] = layer.scaling
    weights = iter(own)
    made.lora_A[PEFT_ADAPTER_NAME].weight, made.lora_B[PEFT_ADAPTER_NAME].weight = next(weights), next(weights)
    if layer.bias:
        made.lora_B[PEFT_ADAPTER_NAME].bias = next(weights)
    if layer.dora:
        made.lora_magnitude_vector[PEFT_ADAPTER_NAME].weight = next(weights)
    return made


def _ia3(layer: IA3, base: nn.Module, own: list[nn.Parameter]) -> Any:
    """PEFT's IA3 layer around a linear layer, made in the same way."""
    from peft import IA3Config
    from peft.tuners import ia3

    config = IA3Config(init_ia3_weights=False, fan_in_fan_out=isinstance(base, Conv1D))
    with torch.device("meta"):
        made = ia3.Linear(_skeleton(base), PEFT_ADAPTER_NAME, config, is_feedforward=layer.feedforward)
    made.eval()
    made.base_layer = base
    (made.ia3_l[PEFT_ADAPTER_NAME],) = own
    return made


def _skeleton(base: nn.Module) -> nn.Module:
    """The base layer that PEFT inspects when it makes a layer. A packed layer would have to unpack its weight."""
    num_inputs, num_outputs = num_features(base)
    like = torch.empty(0, device="meta")
    if isinstance(base, Conv1D):
        return Conv1DSkeleton(num_inputs, num_outputs, like=like)
    return LinearSkeleton(num_inputs, num_outputs, bias=base.bias is not None, like=like)


class _Dropout(nn.Module):
    """Dropout that is the same on every device and in every attempt, because its mask is drawn on the CPU."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.generator: torch.Generator | None = None
        self._probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if self.generator is None:
            return x
        mask = torch.empty(x.shape, dtype=torch.float32).bernoulli_(1 - self._probability, generator=self.generator)
        return x * (mask / (1 - self._probability)).to(x)
