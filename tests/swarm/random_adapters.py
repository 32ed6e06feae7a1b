"""Random adapters of all kinds, such as a client might have trained."""

from __future__ import annotations

import math
from random import Random

import torch
from torch import nn

from shoal.adapters import IA3, Lora, Prompt
from shoal.model.body import Body
from shoal.model.families import text_config
from shoal.model.linear.packed_linear import FrozenLinear
from shoal.model.peft.factors import ActiveAdapters, AdapterFactors, Layer, factors_name
from shoal.model.peft.skeleton import LINEAR, num_features
from shoal.spans import Span


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a block, by their paths."""
    return {path: module for path, module in block.named_modules() if isinstance(module, (*LINEAR, FrozenLinear))}


def some_factors(body: Body, block: int, chance: Random, *, dropout: float = 0.0) -> AdapterFactors:
    """An adapter of one block: LoRA, DoRA or IA3 on some of its layers, or a prompt, or both."""
    own = linears(body.block(block))
    paths = chance.sample(sorted(own), k=min(len(own), chance.choice([0, 1, 2, 3])))
    layers = [_layer(path, chance, dropout=dropout) for path in paths]
    if not layers or chance.random() < 0.3:
        layers.append(Prompt(num_tokens=chance.choice([1, 3, 20])))
    parts = [_values(layer, own, text_config(body.backbone.config).hidden_size, chance) for layer in layers]
    return factors_of(block, tuple(layers), torch.cat(parts))


def factors_of(block: int, layers: tuple[Layer, ...], values_N: torch.Tensor, *, origin: int = 0) -> AdapterFactors:
    return AdapterFactors(factors_name(block, layers, values_N), block, layers, values_N, origin)


def some_tuning(body: Body, span: Span, chance: Random, *, dropout: float = 0.0) -> ActiveAdapters:
    """Adapters of some blocks, often of no block."""
    part = chance.choice([0.0, 0.6, 1.0])
    blocks = [block for block in span if chance.random() < part]
    return ActiveAdapters({block: some_factors(body, block, chance, dropout=dropout) for block in blocks})


def _layer(path: str, chance: Random, *, dropout: float) -> Layer:
    if chance.random() < 0.3:
        return IA3(module=path, feedforward=chance.random() < 0.5)
    own = chance.choice(["", "", "bias", "dora"])  # PEFT does not have both at once
    return Lora(
        module=path,
        rank=chance.choice([1, 2, 5]),
        scaling=chance.choice([0.5, 2.0]),
        dropout=dropout,
        **{name: name == own for name in ("bias", "dora")},
    )


def _values(layer: Layer, linears: dict[str, nn.Module], hidden_size: int, chance: Random) -> torch.Tensor:
    """Values that change the block's output a little but measurably."""
    generator = torch.Generator().manual_seed(chance.getrandbits(32))
    if isinstance(layer, Prompt):
        return 0.3 * torch.randn(layer.num_tokens * hidden_size, generator=generator)
    shapes = layer.shapes(*num_features(linears[layer.module]))
    noise = [torch.randn(math.prod(shape), generator=generator) for shape in shapes]
    if isinstance(layer, IA3):
        return torch.cat([1 + 0.2 * each for each in noise])
    magnitudes = [1 + 0.2 * noise.pop()] if layer.dora else []
    return torch.cat([*(0.2 * each for each in noise), *magnitudes])
