"""Views: shallow copies of modules, in which some submodules are replaced for the length of one call.

Transformers' backbones do more than call their layers: they build masks, rotary embeddings and positions. A call that
needs this code with other layers gets a copy of the backbone. The copy shares every submodule except for the list of
layers. The original stays as it is, because several threads may use it at once.
"""

# B rows, T new tokens, D hidden size

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def with_layers(module: M, layers_name: str, layers: Iterable[nn.Module]) -> M:
    """A copy of a backbone that has other layers and shares everything else."""
    view = copy.copy(module)
    view.__dict__["_modules"] = {**module._modules, layers_name: nn.ModuleList(layers)}
    return view


def with_submodules(module: M, others: Mapping[str, nn.Module]) -> M:
    """A copy of a module that has these other submodules, given by their paths, and shares everything else."""
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


def with_input_change(layer: M, change: Callable[[Tensor], Tensor]) -> M:
    """A copy of a layer that applies `change` to its hidden states before it computes."""

    def before_forward(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "hidden_states" in kwargs:
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}
        return (change(args[0]), *args[1:]), kwargs

    view = copy.copy(layer)
    for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        view.__dict__[name] = OrderedDict(layer.__dict__[name])
    view.register_forward_pre_hook(before_forward, with_kwargs=True)
    return view


def with_fixed_input(layer: M, hidden_BTD: Tensor) -> M:
    """A copy of a layer that computes with these hidden states and ignores those that it is called with."""
    return with_input_change(layer, lambda _: hidden_BTD)


def with_output_observer(layer: M, observe: Callable[[Tensor], None]) -> M:
    """A copy of a layer that also passes the hidden states that it returns to `observe`."""

    def after_forward(_: nn.Module, __: Any, output: Any) -> None:
        observe(output[0] if isinstance(output, tuple) else output)

    view = copy.copy(layer)
    for name in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        view.__dict__[name] = OrderedDict(layer.__dict__[name])
    view.register_forward_hook(after_forward)
    return view
