"""Linear layers with bitsandbytes' weights, as servers need them.

bitsandbytes' own modules are made for one user on one machine. On a CPU, their 4-bit layer loses its gradients once it
has computed a pass without them (it changes to a kernel that autograd does not know), and cannot compute at all with a
number of outputs that is no multiple of 32. Their 8-bit layer treats an input column as an outlier for all rows if it
is one in any row, so that a client's numbers would depend on who else is in the pass. Here gradients are those of the
dequantized weights, whatever was computed before, and a row of the output depends on its own input only.
"""

# R rows, I input size, O output size, K outlier columns

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.quantization_config import BitsAndBytesConfig

from shoal.model.linear.packed_linear import FrozenLinear

_TILE = 32
"""So many outputs are interleaved in the layout of bitsandbytes' CPU kernel."""


class FourBitLinear(FrozenLinear):
    """A weight of 4-bit codes (NF4 or FP4), a scale for every 64 of them."""

    def __init__(self, linear: Any, *, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype=dtype)
        self._compute_dtype = linear.compute_dtype or dtype
        self._codes, self._state = linear.weight.data, linear.weight.quant_state
        self._shape, self._blocksize, self._quant_type = (
            self._state.shape,
            self._state.blocksize,
            self._state.quant_type,
        )
        self._tiled = (
            linear.weight.device.type == "cpu"
            and linear.support_avx512bf16_for_cpu
            and self.out_features % _TILE == 0
            and self.in_features % self._blocksize == 0
        )
        if self._tiled:
            from bitsandbytes.functional import _convert_weight_packed_for_cpu

            self._codes, self._state = _convert_weight_packed_for_cpu(self._codes, copy.copy(self._state))

    @property
    def weight(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        if not self._tiled:
            weight: Tensor = dequantize_4bit(self._codes, self._state)
        else:
            scales = self._state.absmax.t().float().flatten()
            weight = torch.ops.bitsandbytes.dequantize_4bit(
                self._codes_in_order(), scales, self._blocksize, self._quant_type, self._shape, self.nothing.dtype
            )
        return weight

    def _codes_in_order(self) -> Tensor:
        """The codes, two in a byte, row after row: what `_convert_weight_packed_for_cpu` was given.

        In a tile of 32 rows it puts, for every pair of columns, rows 0 to 15 into the low halves of 32 bytes, and rows
        16 to 31 into the high halves. bitsandbytes' own inverse takes ten times as long.
        """
        # Both bytes of a pair of columns are moved as one number: single bytes take three times as long.
        pairs = self._codes.view(torch.int16).view(-1, self.in_features // 2, _TILE // 2).transpose(1, 2).contiguous()
        low = (pairs << 4).bitwise_and_(0xF0).bitwise_or_((pairs >> 8).bitwise_and_(0xF))
        high = (pairs & 0xF0).bitwise_or_((pairs >> 12).bitwise_and_(0xF))
        return torch.stack((low, high), dim=1).to(torch.uint8).view(-1, 1)

    def product(self, x: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit

        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.out_features)
        bias = None if self.bias is None else self.bias.to(self._compute_dtype)
        codes = self._codes if self._tiled else self._codes.view(-1, 1)
        product: Tensor = matmul_4bit(x.to(self._compute_dtype), codes, quant_state=self._state, bias=bias)
        return product.to(x.dtype)


class Int8Linear(FrozenLinear):
    """A weight of 8-bit integers, a scale for every output, multiplied by inputs that are rounded to 8 bits as well.

    Inputs of at least `threshold` are multiplied as they are (LLM.int8(), arXiv 2208.07339). A row is computed as
    bitsandbytes computes it when it comes alone.
    """

    def __init__(self, linear: Any, *, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype=dtype)
        self._threshold = linear.state.threshold
        weight = linear.weight
        self._weight_OI = weight.data if weight.CB is None else weight.CB
        self._scale_O = linear.state.SCB if weight.SCB is None else weight.SCB

    @property
    def weight(self) -> Tensor:
        weight: Tensor = (self._weight_OI * (self._scale_O / 127)[:, None]).to(self.nothing.dtype)
        return weight

    def gradient_of_input(self, gradient: Tensor) -> Tensor:
        # The outputs' scales go to the gradient, which is smaller than the weight; integers stay exact in any dtype.
        scaled = (gradient * (self._scale_O / 127)).to(gradient.dtype)
        gradient_of_input: Tensor = scaled @ self._weight_OI.to(gradient.dtype)
        return gradient_of_input

    def product(self, x: Tensor) -> Tensor:
        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.out_features)
        rows_RI = x.reshape(-1, self.in_features)
        half_RI = rows_RI.to(torch.float16)
        outliers_RI = half_RI.abs() >= self._threshold if self._threshold else None
        if outliers_RI is not None and not outliers_RI.any():
            outliers_RI = None
        if outliers_RI is not None:
            half_RI = half_RI.masked_fill(outliers_RI, 0)
        ops = torch.ops.bitsandbytes
        rounded_RI, scale_R, _ = ops.int8_vectorwise_quant(half_RI)
        product_RO: Tensor = ops.int8_scaled_mm(
            rounded_RI, self._weight_OI, scale_R, self._scale_O, bias=self.bias, dtype=x.dtype
        )
        if outliers_RI is not None:
            (columns_K,) = outliers_RI.any(dim=0).nonzero(as_tuple=True)
            outliers_RK = rows_RI.where(outliers_RI, 0)[:, columns_K]
            weight_OK = ops.int8_vectorwise_dequant(self._weight_OI[:, columns_K], self._scale_O).to(x.dtype)
            product_RO = product_RO.addmm(outliers_RK, weight_OK.t())
        return product_RO.view(*x.shape[:-1], self.out_features)


def quantized(linear: nn.Linear, settings: BitsAndBytesConfig, *, dtype: torch.dtype) -> FrozenLinear:
    """A plain linear layer in 8 or 4 bits, where it is. Its weight is only read, and may be another module's too."""
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    weight, shape = linear.weight.detach(), (linear.in_features, linear.out_features)
    layer: Any
    if settings.load_in_8bit:
        threshold = settings.llm_int8_threshold
        layer = Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=threshold, device="meta")
        layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(weight.device)
        layer.bias = linear.bias
        return Int8Linear(layer, dtype=dtype)
    kind = {
        "quant_type": settings.bnb_4bit_quant_type,
        "compress_statistics": settings.bnb_4bit_use_double_quant,
    }
    layer = Linear4bit(*shape, bias=False, compute_dtype=settings.bnb_4bit_compute_dtype, device="meta", **kind)
    layer.weight = Params4bit(weight, requires_grad=False, module=layer, **kind).to(weight.device)
    layer.bias = linear.bias
    return FourBitLinear(layer, dtype=dtype)


def replace_quantized_linears(module: nn.Module, *, dtype: torch.dtype) -> None:
    """Put a `FourBitLinear` or an `Int8Linear` in the place of every layer of bitsandbytes'."""
    if "bitsandbytes" not in sys.modules:  # which takes long to import, and is not there for other quantizations
        return
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, child in list(module.named_children()):
        if isinstance(child, Linear4bit):
            setattr(module, name, FourBitLinear(child, dtype=dtype))
        elif isinstance(child, Linear8bitLt):
            setattr(module, name, Int8Linear(child, dtype=dtype))
        else:
            replace_quantized_linears(child, dtype=dtype)
