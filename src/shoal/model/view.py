"""Views: the same modules, other layers, for the length of one call.

Transformers' backbones do more than call their layers: they build masks, rotary embeddings and positions. To run that
code over other layers than the module holds, without touching the module (several threads may be using it), a call
gets its own shallow copy of it: every submodule is shared, except for the list of layers.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedConfig

from shoal.spans import Span

M = TypeVar("M", bound=nn.Module)


def view_of(module: M, layers_name: str, layers: Iterable[nn.Module], config: PreTrainedConfig) -> M:
    """A copy of a backbone that shares everything with it but its layers and its config."""
    view = copy.copy(module)
    view.__dict__["_modules"] = {**module._modules, layers_name: nn.ModuleList(layers)}
    view.__dict__["config"] = config
    return view


def cut_config(config: PreTrainedConfig, span: Span) -> PreTrainedConfig:
    """A copy of a config with as many layers as the span, and every list that has an entry a layer cut likewise.

    Backbones look these lists up by a layer's place in their list (`config.layer_types[i]`).
    """
    num_layers = config.num_hidden_layers
    cut = copy.copy(config)
    for name, value in vars(config).items():
        if isinstance(value, list | tuple) and len(value) == num_layers:
            cut.__dict__[name] = value[span.start : span.end]
    cut.num_hidden_layers = len(span)
    return cut


def entered_with(layer: M, hidden_BTD: Tensor) -> M:
    """A copy of a layer that takes these hidden states, whatever the backbone computed."""

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": hidden_BTD}
        return (hidden_BTD, *args[1:]), kwargs

    entered = copy.copy(layer)
    for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        entered.__dict__[name] = OrderedDict(layer.__dict__[name])
    entered.register_forward_pre_hook(enter, with_kwargs=True)
    return entered


def left_through(layer: M, leave: Callable[[Tensor], None]) -> M:
    """A copy of a layer that hands the hidden states it returns to `leave` as well."""

    def look(_: nn.Module, __: Any, output: Any) -> None:
        leave(output[0] if isinstance(output, tuple) else output)

    left = copy.copy(layer)
    for name in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        left.__dict__[name] = OrderedDict(layer.__dict__[name])
    left.register_forward_hook(look)
    return left
