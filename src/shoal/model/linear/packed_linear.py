"""Weights laid out once for the CPU's matrix kernels, instead of at every product.

oneDNN multiplies bfloat16 from a blocked layout of its own. Given an ordinary matrix, `F.linear` brings it into that
layout at every call. Here it is done once, at load: a product of a few rows then takes two thirds of the time, and one
of 512 rows about as long as before. Other dtypes gain nothing and are left alone.
"""

# I input size, O output size

from __future__ import annotations

import functools
import platform
from typing import Any, TypeGuard

import psutil
import torch
from torch import Tensor, nn

MIN_WEIGHTS = 1 << 16
"""Smaller matrices stay in the processor's cache in any layout, and are multiplied as fast without."""

COPIES = 4
"""A layer that keeps its weight as well is packed only where memory is free for so many of them."""

PLENTY = 4
"""What only makes gradients faster is kept while more than one in so many parts of the memory are free."""

READ_BY_MODELS = frozenset({"dt_proj", "weights_proj"})
"""Linears whose weights the code of some families reads at every call (Mamba's `dt_proj.weight @ time_step`): to lay
such a weight out anew each time would cost more than is gained."""


class FrozenLinear(nn.Module):
    """A linear layer that holds its weight in a form of its own, and is differentiable with respect to its input."""

    def __init__(self, linear: nn.Linear, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        # Models ask their parameters where they are and what they compute in; some have none but linears' weights.
        self.nothing = nn.Parameter(linear.weight.new_empty(0, dtype=dtype), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The weight as a plain linear would have it, made anew for whoever asks."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias`, unknown to autograd."""
        raise NotImplementedError

    def gradient_of_input(self, gradient: Tensor) -> Tensor:
        return gradient @ self.weight.to(gradient.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            product: Tensor = _Product.apply(x, self)
            return product
        return self.product(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return linear.product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return ctx.linear.gradient_of_input(gradient), None


class PackedLinear(FrozenLinear):
    """A linear layer that holds its weight in oneDNN's layout only, from which it comes back exactly.

    A gradient is multiplied by the transposed weight, for which oneDNN has another layout. A second packed copy is made
    at the first gradient and kept, where there is plenty of memory. Elsewhere an ordinary one is made each time and
    dropped again: 12 ms for 32 MB, which takes a third of a product of 256 rows, and a tenth of one of 1,024.
    """

    _packed_IO: Tensor | None = None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, dtype=linear.weight.dtype)
        # Neither a parameter nor a buffer: a tensor in this layout can be neither copied to a device nor saved.
        self._packed_OI = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    @property
    def weight(self) -> Tensor:
        dense: Tensor = self._packed_OI.to_dense()
        return dense

    def product(self, x: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed_OI, self.bias, "none", [], "")
        return product

    def gradient_of_input(self, gradient: Tensor) -> Tensor:
        if self._packed_IO is None and has_plenty_of_memory():
            self._packed_IO = torch.ops.mkldnn._reorder_linear_weight(self.weight.t().contiguous(), None)
        if self._packed_IO is None or gradient.dtype != torch.bfloat16:
            return super().gradient_of_input(gradient)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(gradient, self._packed_IO, None, "none", [], "")
        return product


class QuickLinear(nn.Linear):
    """An ordinary linear layer, trainable as ever, with a packed copy of its weight for calls that need no gradient.

    The copy is made at the first such call, and dropped when the weight has changed or is about to.
    """

    _copy: tuple[object, PackedLinear] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dtype != torch.bfloat16 or self.weight.dtype != torch.bfloat16:
            self._copy = None
            return super().forward(x)
        weight = (self.weight.data_ptr(), self.weight._version, id(self.bias))
        copy = self._copy  # another thread, which trains, may take it away meanwhile
        if copy is None or copy[0] != weight:
            self._copy = copy = (weight, PackedLinear(self))
        return copy[1].product(x)

    def __getstate__(self) -> dict[str, Any]:
        """A tensor in this layout can be neither copied nor saved; it is made again."""
        return {name: value for name, value in self.__dict__.items() if name != "_copy"}


def quicken(linear: nn.Module, *, free_bytes: int) -> None:
    """Let a linear layer that gains from it keep a packed copy, if there is plenty of room for that."""
    if _gains(linear) and can_pack() and linear.weight.nbytes * COPIES <= free_bytes:
        linear.__class__ = QuickLinear


def pack_linears(module: nn.Module) -> None:
    """Pack every linear layer inside `module` that gains from it, one after another, and let go of the weights it had.

    Does nothing where this machine's PyTorch has no such kernels.
    """
    if can_pack():
        _pack(module)


def _pack(module: nn.Module) -> None:
    for name in [name for name, _ in module.named_children()]:  # the children themselves shall not be held on to
        child = module.get_submodule(name)
        if name not in READ_BY_MODELS and _gains(child):
            setattr(module, name, PackedLinear(child))
        else:
            _pack(child)


def _gains(module: nn.Module) -> TypeGuard[nn.Linear]:
    # The exact class: a subclass may compute something else, or hold its weight in another form.
    return (
        type(module) is nn.Linear
        and module.weight.dtype == torch.bfloat16
        and module.weight.device.type == "cpu"
        and module.weight.numel() >= MIN_WEIGHTS
    )


def has_plenty_of_memory() -> bool:
    """Whether more than a quarter of the machine's memory is free."""
    memory = psutil.virtual_memory()
    return bool(memory.available > memory.total / PLENTY)


@functools.cache
def can_pack() -> bool:
    """Whether the kernels are here, and were tried on this kind of machine."""
    return (
        platform.machine() in {"x86_64", "AMD64"}
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
