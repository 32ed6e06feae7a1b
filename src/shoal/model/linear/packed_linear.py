"""Linear layers whose weights are packed for the CPU's matrix kernels once, when the model is loaded.

oneDNN multiplies bfloat16 matrices in a blocked layout of its own. `F.linear` converts an ordinary weight into that
layout in every call. With a packed weight, a product of a few rows takes two thirds of the time, and one of 512 rows
about the same time. Other dtypes gain nothing and are not packed.
"""

# I input size, O output size

from __future__ import annotations

import functools
import platform
from typing import Any, TypeGuard

import psutil
import torch
from torch import Tensor, nn

from shoal.model.family_tables import LINEARS_READ_DIRECTLY

MIN_WEIGHTS = 1 << 16
"""The smallest weight, in elements, that is packed. Smaller ones stay in the processor's cache and gain nothing."""

MIN_FREE_COPIES = 4
"""A layer that also keeps its ordinary weight gets a packed copy only if memory is free for this number of copies."""

MIN_FREE_FRACTION = 0.25
"""The fraction of the machine's memory that must be free for packed copies that only make gradients faster."""


class FrozenLinear(nn.Module):
    """A linear layer that holds its weight in another form. Gradients reach its input, but not its weight."""

    def __init__(self, linear: nn.Linear, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.bias = linear.bias
        # Models look up their device and dtype in their parameters. In some models only linear layers have any.
        self.dtype_marker = nn.Parameter(linear.weight.new_empty(0, dtype=dtype), requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """The weight [O, I] of the equivalent ordinary layer, computed at each access."""
        raise NotImplementedError

    def multiply(self, x: Tensor) -> Tensor:
        """`x @ weight.T + bias`, without autograd."""
        raise NotImplementedError

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """The gradient [..., I] of the input, from that [..., O] of the output."""
        return gradient @ self.weight.to(gradient.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            output: Tensor = _Multiply.apply(x, self)
            return output
        return self.multiply(x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: FrozenLinear) -> Tensor:
        ctx.linear = linear
        return linear.multiply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return ctx.linear.input_gradient(gradient), None


class PackedLinear(FrozenLinear):
    """A linear layer that holds its weight in oneDNN's layout only. Unpacking gives the exact weight.

    A gradient is multiplied by the transposed weight, which has another layout. If enough memory is free, a second
    packed copy is made at the first gradient and kept. Otherwise an ordinary weight is made for each gradient and
    dropped again. That takes 12 ms for 32 MB: a third of a product of 256 rows, and a tenth of one of 1,024 rows.
    """

    _packed_IO: Tensor | None = None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear, dtype=linear.weight.dtype)
        # Not a parameter or buffer, because a tensor in this layout cannot be moved to a device or saved.
        self._packed_OI = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    @property
    def weight(self) -> Tensor:
        dense: Tensor = self._packed_OI.to_dense()
        return dense

    def multiply(self, x: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed_OI, self.bias, "none", [], "")
        return output

    def input_gradient(self, gradient: Tensor) -> Tensor:
        if self._packed_IO is None and is_memory_plentiful():
            self._packed_IO = torch.ops.mkldnn._reorder_linear_weight(self.weight.t().contiguous(), None)
        if self._packed_IO is None or gradient.dtype != torch.bfloat16:
            return super().input_gradient(gradient)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(gradient, self._packed_IO, None, "none", [], "")
        return found


class LinearWithPackedCopy(nn.Linear):
    """An ordinary, trainable linear layer with a packed copy of its weight for calls without gradients.

    The copy is made at the first such call. It is dropped when the weight changes, and in calls with gradients.
    """

    _copy: tuple[object, PackedLinear] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dtype != torch.bfloat16 or self.weight.dtype != torch.bfloat16:
            self._copy = None
            return super().forward(x)
        weight = (self.weight.data_ptr(), self.weight._version, id(self.bias))
        copy = self._copy  # read once, because another thread that trains may drop it
        if copy is None or copy[0] != weight:
            self._copy = copy = (weight, PackedLinear(self))
        return copy[1].multiply(x)

    def __getstate__(self) -> dict[str, Any]:
        """The state without the packed copy, which cannot be copied or saved. It is made again at the next call."""
        return {name: value for name, value in self.__dict__.items() if name != "_copy"}


def enable_packed_copy(linear: nn.Module, *, free_bytes: int) -> None:
    """Let a linear layer keep a packed copy of its weight, if it gains from that and enough memory is free."""
    if _gains(linear) and can_pack() and linear.weight.nbytes * MIN_FREE_COPIES <= free_bytes:
        linear.__class__ = LinearWithPackedCopy


def pack_linears(module: nn.Module) -> None:
    """Replace each linear layer inside `module` that gains from it by a `PackedLinear`, and free its ordinary weight.

    Does nothing if PyTorch has no such kernels for this machine.
    """
    if can_pack():
        _pack(module)


def _pack(module: nn.Module) -> None:
    for name in [
        name for name, _ in module.named_children()
    ]:  # names, because a list of children would keep their weights
        child = module.get_submodule(name)
        if name not in LINEARS_READ_DIRECTLY and _gains(child):
            setattr(module, name, PackedLinear(child))
        else:
            _pack(child)


def _gains(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear layer that is faster with a packed weight."""
    # Only the exact class: a subclass may compute something else, or hold its weight in another form.
    return (
        type(module) is nn.Linear
        and module.weight.dtype == torch.bfloat16
        and module.weight.device.type == "cpu"
        and module.weight.numel() >= MIN_WEIGHTS
    )


def is_memory_plentiful() -> bool:
    """Whether more than a quarter of the machine's memory is free."""
    memory = psutil.virtual_memory()
    return bool(memory.available > memory.total * MIN_FREE_FRACTION)


@functools.cache
def can_pack() -> bool:
    """Whether PyTorch has the kernels, and this kind of machine was tested with them."""
    return (
        platform.machine() in {"x86_64", "AMD64"}
        and torch.backends.mkldnn.is_available()
        and all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )
