"""A block without its weights: where PEFT puts a client's own layers, although the block is computed elsewhere.

A client's model keeps the layers that Transformers has built for it, under their names, but nothing is in them: of
weights only the sizes are left, and no layer can be called. PEFT looks for names and kinds of modules, so that
`get_peft_model`, `target_modules="all-linear"`, `save_pretrained` and `PeftModel.from_pretrained` find what they look
for, and the parameters that they make are the client's (`shoal.client.blocks` sends them to the servers).
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
"""The kinds of layers to which PEFT adds factors, in the models of Transformers."""


class WeightSkeleton(Tensor):
    """Has the shape of a weight and takes no memory: it is a single zero, everywhere, and nobody's parameter.

    To copy it or to change it, as merging does, raises `UnsupportedOperation`.
    """

    # What is computed from it is a plain tensor.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, shape: Sequence[int], like: Tensor) -> WeightSkeleton:
        return like.new_zeros(()).expand(*shape).as_subclass(cls)

    @property
    def data(self) -> Tensor:
        return self

    @data.setter
    def data(self, _: Tensor) -> None:
        self._is_elsewhere()

    def _is_elsewhere(self, *_: Any, **__: Any) -> NoReturn:
        raise UnsupportedOperation(
            "servers hold these weights: nothing is merged into them here, nor derived from them",
            hint="PEFT merges an adapter that was saved on one machine with all weights",
        )

    clone = __iadd__ = __isub__ = _is_elsewhere

    def __deepcopy__(self, _: dict[int, Any]) -> WeightSkeleton:
        return self


class LinearSkeleton(nn.Linear):
    """Says what a linear layer is like: PEFT asks for its sizes, and where its weight is and as what."""

    def __init__(self, num_inputs: int, num_outputs: int, *, bias: bool, like: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = num_inputs, num_outputs
        self.__dict__["weight"] = WeightSkeleton.of((num_outputs, num_inputs), like)
        self.__dict__["bias"] = WeightSkeleton.of((num_outputs,), like) if bias else None

    def forward(self, *_: Any) -> Tensor:
        raise UnsupportedOperation("this layer is computed by servers")


class Conv1DSkeleton(Conv1D):  # type: ignore[misc]
    """The same for GPT-2's linear layers, whose weights are transposed."""

    def __init__(self, num_inputs: int, num_outputs: int, *, like: Tensor) -> None:
        nn.Module.__init__(self)
        self.nx, self.nf = num_inputs, num_outputs
        self.__dict__["weight"] = WeightSkeleton.of((num_inputs, num_outputs), like)
        self.__dict__["bias"] = WeightSkeleton.of((num_outputs,), like)

    def forward(self, *_: Any) -> Tensor:
        raise UnsupportedOperation("this layer is computed by servers")


class _Parameters(Iterator[nn.Parameter]):
    """The parameters of a skeleton: those that were added to it. `next` says why there are none."""

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
    """Mixed into a layer whose weights are elsewhere."""

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        # PEFT's AdaptionPrompt, for one, takes the first without a look whether there is any.
        return _Parameters(super().parameters(recurse), type(self).__name__)


@functools.cache
def _skeleton_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Skeleton, kind), {"__module__": kind.__module__})


def num_features(linear: nn.Module) -> tuple[int, int]:
    """The number of a linear layer's inputs and outputs."""
    if isinstance(linear, Conv1D):
        num_inputs, num_outputs = linear.weight.shape
        return num_inputs, num_outputs
    return linear.in_features, linear.out_features  # type: ignore[return-value]


def skeletons(layers: Sequence[nn.Module], like: Tensor) -> list[nn.Module]:
    """The same layers without weights, where `like` is, in its dtype. They share what is no module."""
    return [_skeleton(layer, like) for layer in layers]


def _skeleton(module: nn.Module, like: Tensor) -> nn.Module:
    num_inputs, num_outputs = num_features(module) if isinstance(module, LINEAR) else (0, 0)
    if isinstance(module, nn.Linear):
        return LinearSkeleton(num_inputs, num_outputs, bias=module.bias is not None, like=like)
    if isinstance(module, Conv1D):
        return Conv1DSkeleton(num_inputs, num_outputs, like=like)
    bare = copy.copy(module)
    bare.__class__ = _skeleton_class(type(module))  # type: ignore[arg-type]
    bare.__dict__["_parameters"] = {}
    for name, parameter in module._parameters.items():
        bare.__dict__[name] = None if parameter is None else WeightSkeleton.of(parameter.shape, like)
    bare.__dict__["_buffers"] = dict.fromkeys(module._buffers)
    bare.__dict__["_modules"] = {
        name: None if child is None else _skeleton(child, like) for name, child in module._modules.items()
    }
    return bare
