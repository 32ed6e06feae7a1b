"""Skeletons: blocks without weights, into which PEFT puts a client's adapters.

A client's model keeps the layers that Transformers built, with their names. Their weights have shapes but no values,
and no layer can be called. PEFT looks only for names and types of modules. Therefore `get_peft_model`,
`target_modules="all-linear"`, `save_pretrained` and `PeftModel.from_pretrained` work. The parameters that they create
are the client's; `shoal.client.blocks` sends them to the servers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shoal.errors import UnsupportedOperation

LINEAR = (nn.Linear, Conv1D)
"""The types of linear layers in the models of Transformers."""


class WeightSkeleton(Tensor):
    """A tensor with the shape of a weight that takes no memory: a single zero, expanded. It is not a parameter.

    Cloning or changing it, as merging does, raises `UnsupportedOperation`.
    """

    # Results of computations with it are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, shape: Sequence[int], like: Tensor) -> WeightSkeleton:
        """A skeleton of this shape, with the dtype and the device of `like`."""
        return like.new_zeros(()).expand(*shape).as_subclass(cls)

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, _: Tensor) -> None:
        self._refuse()

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise UnsupportedOperation(
            "servers hold these weights: nothing is merged into them here, nor derived from them",
            hint="PEFT merges an adapter that was saved on one machine with all weights",
        )

    clone = __iadd__ = __isub__ = _refuse

    def __deepcopy__(self, _: dict[int, Any]) -> WeightSkeleton:
        return self


class LinearSkeleton(nn.Linear):
    """A linear layer without values. PEFT reads its sizes, and the device and dtype of its weight."""

    def __init__(self, num_inputs: int, num_outputs: int, *, bias: bool, like: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = num_inputs, num_outputs
        self.__dict__["weight"] = WeightSkeleton.of((num_outputs, num_inputs), like)
        self.__dict__["bias"] = WeightSkeleton.of((num_outputs,), like) if bias else None

    def forward(self, *_: Any) -> Tensor:
        raise UnsupportedOperation("this layer is computed by servers")


class Conv1DSkeleton(Conv1D):  # type: ignore[misc]
    """The same for the linear layers of GPT-2, whose weights are transposed."""

    def __init__(self, num_inputs: int, num_outputs: int, *, like: Tensor) -> None:
        nn.Module.__init__(self)
        self.nx, self.nf = num_inputs, num_outputs
        self.__dict__["weight"] = WeightSkeleton.of((num_inputs, num_outputs), like)
        self.__dict__["bias"] = WeightSkeleton.of((num_outputs,), like)

    def forward(self, *_: Any) -> Tensor:
        raise UnsupportedOperation("this layer is computed by servers")


class _Parameters(Iterator[nn.Parameter]):
    """The parameters that were added to a skeleton. If there are none, `next` raises `UnsupportedOperation`."""

    def __init__(self, found: Iterator[nn.Parameter], kind: str) -> None:
        self._found = found
        self._kind = kind

    def __iter__(self) -> Iterator[nn.Parameter]:
        return self._found

    def __next__(self) -> nn.Parameter:
        for parameter in self._found:
            return parameter
        raise UnsupportedOperation(
            f"servers hold the parameters of {self._kind}, and nothing is derived from them here",
            hint="LoRA (with rsLoRA and DoRA), IA3 and soft prompts can be trained: docs/finetuning.md",
        )


class _Skeleton(nn.Module):
    """Mixed into the class of a layer whose weights are on servers."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        # Some methods of PEFT, such as AdaptionPrompt, take the first parameter without checking that there is one.
        return _Parameters(super().parameters(recurse), type(self).__name__)


@functools.cache
def _skeleton_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Skeleton, kind), {"__module__": kind.__module__})


def num_features(linear: nn.Module) -> tuple[int, int]:
    """The number of inputs and of outputs of a linear layer."""
    if isinstance(linear, Conv1D):
        num_inputs, num_outputs = linear.weight.shape
        return num_inputs, num_outputs
    return linear.in_features, linear.out_features  # type: ignore[return-value]


def skeletons(layers: Sequence[nn.Module], like: Tensor) -> list[nn.Module]:
    """Copies of layers without weights, with the device and dtype of `like`. Other attributes are shared."""
    return [_skeleton(layer, like) for layer in layers]


def _skeleton(module: nn.Module, like: Tensor) -> nn.Module:
    num_inputs, num_outputs = num_features(module) if isinstance(module, LINEAR) else (0, 0)
    if isinstance(module, nn.Linear):
        return LinearSkeleton(num_inputs, num_outputs, bias=module.bias is not None, like=like)
    if isinstance(module, Conv1D):
        return Conv1DSkeleton(num_inputs, num_outputs, like=like)
    skeleton = copy.copy(module)
    skeleton.__class__ = _skeleton_class(type(module))  # type: ignore[arg-type]
    skeleton.__dict__["_parameters"] = {}
    for name, parameter in module._parameters.items():
        skeleton.__dict__[name] = None if parameter is None else WeightSkeleton.of(parameter.shape, like)
    skeleton.__dict__["_buffers"] = dict.fromkeys(module._buffers)
    skeleton.__dict__["_modules"] = {
        name: None if child is None else _skeleton(child, like) for name, child in module._modules.items()
    }
    return skeleton
