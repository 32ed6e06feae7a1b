"""Views: the same modules, other layers, for the length of one call.

Transformers' backbones do more than call their layers: they build masks, rotary embeddings and positions. To run that
code over other layers than the module holds, without touching the module (several threads may be using it), a call
gets its own shallow copy of it: every submodule is shared, except for the list of layers.
"""

# B rows, T new tokens, D hidden size

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def view_of(module: M, layers_name: str, layers: Iterable[nn.Module]) -> M:
    """A copy of a backbone that shares everything with it but the list of its layers."""
    view = copy.copy(module)
    view.__dict__["_modules"] = {**module._modules, layers_name: nn.ModuleList(layers)}
    return view


def with_submodules(module: M, others: Mapping[str, nn.Module]) -> M:
    """A copy that shares everything with a module but these submodules, given by their paths."""
    view = copy.copy(module)
    view.__dict__["_modules"] = dict(module._modules)
    below: dict[str, dict[str, nn.Module]] = defaultdict(dict)
    for path, other in others.items():
        name, _, rest = path.partition(".")
        if rest:
            below[name][rest] = other
        else:
            view._modules[name] = other
    for name, some in below.items():
        view._modules[name] = with_submodules(module.get_submodule(name), some)
    return view


def entering(layer: M, change: Callable[[Tensor], Tensor]) -> M:
    """A copy of a layer that takes the hidden states it is given as `change` makes them."""

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
        return (change(args[0]), *args[1:]), kwargs

    entered = copy.copy(layer)
    for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        entered.__dict__[name] = OrderedDict(layer.__dict__[name])
    entered.register_forward_pre_hook(enter, with_kwargs=True)
    return entered


def entered_with(layer: M, hidden_BTD: Tensor) -> M:
    """A copy of a layer that takes these hidden states, whatever it is given."""
    return entering(layer, lambda _: hidden_BTD)


def left_through(layer: M, leave: Callable[[Tensor], None]) -> M:
    """A copy of a layer that hands the hidden states it returns to `leave` as well."""

    def look(_: nn.Module, __: Any, output: Any) -> None:
        leave(output[0] if isinstance(output, tuple) else output)

    left = copy.copy(layer)
    for name in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        left.__dict__[name] = OrderedDict(layer.__dict__[name])
    left.register_forward_hook(look)
    return left


class StandIn(nn.Module):
    """Stands in a list for a layer whose work is done elsewhere: hidden states leave it as they came.

    Backbones ask a layer what kind it is (`layer.attention_type`); whatever else it is asked, the layer answers.
    """

    def __init__(self, layer: nn.Module, *, returns_tuple: bool) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not a submodule: its weights are not here
        self._returns_tuple = returns_tuple

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
        hidden_BTD = self.compute(args[0] if args else kwargs["hidden_states"])
        return (hidden_BTD, None) if self._returns_tuple else hidden_BTD  # None for the attention weights

    def compute(self, hidden_BTD: Tensor) -> Tensor:
        return hidden_BTD
