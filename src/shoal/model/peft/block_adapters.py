"""Clients' adapters in a server's blocks: PEFT's own layers around linear layers that everybody shares.

What such a layer computes is PEFT's code, here as on one machine. It stands in a copy of the block that has nothing
else of its own (`shoal.model.module_view`). So a client's adapter is there for those computations that name it, and
for no others. How a client describes it is in `shoal.model.peft.factors`.
"""

# B sequences, T tokens, D hidden size, P tokens of a prompt, N factors

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shoal.adapters import IA3, Lora, Prompt
from shoal.model.linear.packed_linear import FrozenLinear
from shoal.model.module_view import entering, with_submodules
from shoal.model.peft.factors import Layer
from shoal.model.peft.skeleton import LINEAR, Conv1DSkeleton, LinearSkeleton, num_features

THE_ONE = "adapter"
"""What PEFT calls the only adapter of a server's layers."""


def get_ready() -> None:
    """Import PEFT: that takes seconds, in which a server that is sent an adapter would answer nobody."""
    from peft.tuners import ia3, lora  # noqa: F401


class BlockAdapter:
    """One client's adapter of one block, ready to be computed with. Its factors never change."""

    def __init__(
        self, block: nn.Module, layers: Sequence[Layer], values_N: Tensor, *, name: str, hidden_size: int
    ) -> None:
        """`values_N` are on the block's device. Raises `ValueError` for layers that the block does not have, and for
        another number of factors than they need.
        """
        self.name = name
        self.nbytes = values_N.nbytes
        self.dtype = values_N.dtype
        self.layers: dict[str, nn.Module] = {}
        self.prompt_PD: Tensor | None = None
        self._dropouts: list[tuple[nn.Module, _Dropout]] = []  # and the layers that they are in
        bases = [None if isinstance(layer, Prompt) else _linear(block, layer.module) for layer in layers]
        shapes = [_shapes(layer, base, hidden_size) for layer, base in zip(layers, bases, strict=True)]
        counts = [math.prod(shape) for each in shapes for shape in each]
        if sum(counts) != len(values_N):
            raise ValueError(f"{len(values_N)} factors, where these layers have {sum(counts)}")
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
            added.lora_dropout[THE_ONE] = dropout
            self._dropouts.append((added, dropout))
        self.layers[layer.module] = added

    def on(self, block: nn.Module, start: int = 0) -> nn.Module:
        """A copy of the block with this adapter; what enters is of the tokens from `start` on."""
        adapted = with_submodules(block, self.layers)
        prompt_PD = self.prompt_PD
        if prompt_PD is None or start >= len(prompt_PD):
            return adapted
        return entering(adapted, lambda hidden_BTD: with_prompt(hidden_BTD, prompt_PD, start))

    @contextmanager
    def dropping(self, seed: int | None) -> Iterator[None]:
        """What is dropped inside follows from this number, on every device; without one, and outside, nothing is."""
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        self._drop_by(generator)
        try:
            yield
        finally:
            self._drop_by(None)  # sessions compute with the same layers

    def _drop_by(self, generator: torch.Generator | None) -> None:
        for layer, dropout in self._dropouts:
            dropout.generator = generator
            layer.training = generator is not None  # PEFT's DoRA looks at that before it drops anything


def with_prompt(hidden_BTD: Tensor, prompt_PD: Tensor, start: int) -> Tensor:
    """Hidden states of the tokens from `start` on, to the first of which a prompt is added."""
    some_PD = prompt_PD[start : start + hidden_BTD.shape[1]].to(hidden_BTD.dtype)
    num_some = len(some_PD)
    return torch.cat((hidden_BTD[:, :num_some] + some_PD, hidden_BTD[:, num_some:]), dim=1)


def row_norms(block: nn.Module, paths: Sequence[str]) -> Tensor:
    """The norms [N] of the rows of some linear layers' weights, as PEFT finds them. Raises `ValueError`."""
    weights = ((base, base.weight) for base in (_linear(block, path) for path in paths))
    each = [torch.linalg.norm(weight.T if isinstance(base, Conv1D) else weight, dim=1) for base, weight in weights]
    return torch.cat(each).float()


def _linear(block: nn.Module, path: str) -> nn.Module:
    try:
        found = block.get_submodule(path)
    except AttributeError:
        raise ValueError(f"blocks of this model have no {path}") from None
    if not isinstance(found, (*LINEAR, FrozenLinear)):
        raise ValueError(f"{path} is no linear layer")
    return found


def _shapes(layer: Layer, base: nn.Module | None, hidden_size: int) -> list[tuple[int, ...]]:
    if isinstance(layer, Prompt):
        return [(layer.num_tokens, hidden_size)]
    assert base is not None
    return layer.shapes(*num_features(base))


def _lora(layer: Lora, base: nn.Module, own: list[nn.Parameter]) -> Any:
    """PEFT's LoRA layer around a linear one. It is made on the meta device, where making it costs nothing."""
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
        made = lora.Linear(_stand_in(base), THE_ONE, config, r=layer.rank, lora_alpha=layer.rank)
    made.eval()
    made.base_layer = base
    made.scaling[THE_ONE] = layer.scaling
    weights = iter(own)
    made.lora_A[THE_ONE].weight, made.lora_B[THE_ONE].weight = next(weights), next(weights)
    if layer.bias:
        made.lora_B[THE_ONE].bias = next(weights)
    if layer.dora:
        made.lora_magnitude_vector[THE_ONE].weight = next(weights)
    return made


def _ia3(layer: IA3, base: nn.Module, own: list[nn.Parameter]) -> Any:
    from peft import IA3Config
    from peft.tuners import ia3

    config = IA3Config(init_ia3_weights=False, fan_in_fan_out=isinstance(base, Conv1D))
    with torch.device("meta"):
        made = ia3.Linear(_stand_in(base), THE_ONE, config, is_feedforward=layer.feedforward)
    made.eval()
    made.base_layer = base
    (made.ia3_l[THE_ONE],) = own
    return made


def _stand_in(base: nn.Module) -> nn.Module:
    """What PEFT looks at while it makes a layer: our linears would unpack their weights to be looked at."""
    num_inputs, num_outputs = num_features(base)
    like = torch.empty(0, device="meta")
    if isinstance(base, Conv1D):
        return Conv1DSkeleton(num_inputs, num_outputs, like=like)
    return LinearSkeleton(num_inputs, num_outputs, bias=base.bias is not None, like=like)


class _Dropout(nn.Module):
    """Drops the same on every device and at every attempt: what the generator says, drawn on the CPU."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.generator: torch.Generator | None = None
        self._probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if self.generator is None:
            return x
        kept = torch.empty(x.shape, dtype=torch.float32).bernoulli_(1 - self._probability, generator=self.generator)
        return x * (kept / (1 - self._probability)).to(x)


# -- several clients in one pass ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Rows of a packed pass that are one client's: the tokens from `position` on of so many sequences, one by one."""

    rows: slice
    num_sequences: int
    position: int
    adapter: BlockAdapter


def mixed(block: nn.Module, parts: Sequence[Part], *, num_rows: int) -> nn.Module:
    """A copy of a block that computes packed tokens [1, N, D], each with its own client's adapter.

    The weights are multiplied by all tokens at once; only what an adapter adds is computed for its rows alone.
    """
    paths = dict.fromkeys(path for part in parts for path in part.adapter.layers)
    shared = {path: _Shared(block.get_submodule(path), _at(path, parts), num_rows) for path in paths}
    view = with_submodules(block, shared)
    prompted = [
        part for part in parts if part.adapter.prompt_PD is not None and part.position < len(part.adapter.prompt_PD)
    ]
    return entering(view, lambda hidden: _prompted(hidden, prompted)) if prompted else view


def _at(path: str, parts: Sequence[Part]) -> list[tuple[slice, nn.Module]]:
    return [(part.rows, part.adapter.layers[path]) for part in parts if path in part.adapter.layers]


def _prompted(hidden_1ND: Tensor, parts: Sequence[Part]) -> Tensor:
    hidden_1ND = hidden_1ND.clone()
    for part in parts:
        assert part.adapter.prompt_PD is not None
        own_1ND = hidden_1ND[:, part.rows]
        own_BTD = own_1ND.view(part.num_sequences, -1, own_1ND.shape[-1])
        hidden_1ND[:, part.rows] = with_prompt(own_BTD, part.adapter.prompt_PD, part.position).view(own_1ND.shape)
    return hidden_1ND


class _InPlaceOf(nn.Module):
    """Stands where a linear layer was, whose weights PEFT, and some routers, look at."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.__dict__["_base"] = base  # not a submodule: it is everybody's

    @property
    def weight(self) -> Any:
        return self.__dict__["_base"].weight

    @property
    def bias(self) -> Any:
        return self.__dict__["_base"].bias


class _Shared(_InPlaceOf):
    """A linear layer for rows [.., N, inputs] of several clients: one product, and what their layers make of it."""

    def __init__(self, base: nn.Module, layers: Sequence[tuple[slice, nn.Module]], num_rows: int) -> None:
        super().__init__(base)
        self._layers = layers
        self._num_rows = num_rows

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] != self._num_rows:
            raise ValueError(f"{x.shape[-2]} rows, where there are {self._num_rows}: whose they are cannot be told")
        base: nn.Module = self.__dict__["_base"]
        result: Tensor = base(x)
        for rows, layer in self._layers:
            if not getattr(layer, "is_feedforward", False):  # those change what goes into the product
                layer = with_submodules(layer, {"base_layer": _Given(base, result[..., rows, :])})
            result[..., rows, :] = layer(x[..., rows, :])
        return result


class _Given(_InPlaceOf):
    """A linear layer whose outputs are known already."""

    def __init__(self, base: nn.Module, output: Tensor) -> None:
        super().__init__(base)
        self.__dict__["_output"] = output

    def forward(self, _: Tensor) -> Tensor:
        output: Tensor = self.__dict__["_output"]
        return output
