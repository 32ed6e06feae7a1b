"""Linear layers with the weights of bitsandbytes, for servers.

The modules of bitsandbytes are made for one user on one machine. On a CPU, `Linear4bit` has no gradients any more after
it has computed a pass without gradients, because it switches to a kernel without autograd. It also cannot compute with
a number of outputs that is not a multiple of 32. `Linear8bitLt` treats an input column as an outlier for all rows if it
is an outlier in any row, so that one client's results would depend on the other clients in the pass. Here, gradients
are always those of the dequantized weight, and a row of the output depends on its own input only.
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
"""The number of outputs that are interleaved in the layout of bitsandbytes' CPU kernel."""


class Frozen4bitLinear(FrozenLinear):
    """A frozen `Linear4bit`: a weight of 4-bit codes (NF4 or FP4), with one scale for each 64 of them by default."""

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
                self._codes_in_order(), scales, self._blocksize, self._quant_type, self._shape, self.dtype_marker.dtype
            )
        return weight

    def _codes_in_order(self) -> Tensor:
        """The codes in row-major order, two in a byte, as they were before `_convert_weight_packed_for_cpu`.

        For each tile of 32 rows and each pair of columns, that function stores rows 0 to 15 in the low halves of 32
        bytes, and rows 16 to 31 in the high halves. The inverse in bitsandbytes takes ten times as long as this one.
        """
        # The two bytes of a pair of columns are moved as one number: moving single bytes takes three times as long.
        pairs = self._codes.view(torch.int16).view(-1, self.in_features // 2, _TILE // 2).transpose(1, 2).contiguous()
        low = (pairs << 4).bitwise_and_(0xF0).bitwise_or_((pairs >> 8).bitwise_and_(0xF))
        high = (pairs & 0xF0).bitwise_or_((pairs >> 12).bitwise_and_(0xF))
        return torch.stack((low, high), dim=1).to(torch.uint8).view(-1, 1)

    def multiply(self, x: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit

        if x.numel() == 0:
            return x.new_empty(*x.shape[:-1], self.out_features)
        bias = None if self.bias is None else self.bias.to(self._compute_dtype)
        codes = self._codes if self._tiled else self._codes.view(-1, 1)
        output: Tensor = matmul_4bit(x.to(self._compute_dtype), codes, quant_state=self._state, bias=bias)
        return output.to(x.dtype)


class Frozen8bitLinear(FrozenLinear):
    """A frozen `Linear8bitLt`: a weight of 8-bit integers with one scale for each output.

    Inputs are rounded to 8 bits, except for outliers, which are inputs of at least `threshold` (LLM.int8(), arXiv
    2208.07339). Each row gets the result that bitsandbytes computes for this row alone.
    """

    def __init__(self, linear: Any, *, dtype: torch.dtype) -> None:
        super().__init__(linear, dtype=dtype)
        self._threshold = linear.state.threshold
        weight = linear.weight
        self._weight_OI = weight.data if weight.CB is None else weight.CB
        self._scale_O = linear.state.SCB if weight.SCB is None else weight.SCB

    @property
    def weight(self) -> Tensor:
        weight: Tensor = (self._weight_OI * (self._scale_O / 127)[:, None]).to(self.dtype_marker.dtype)
        return weight

    def input_gradient(self, gradient: Tensor) -> Tensor:
        # The gradient is scaled instead of the weight, because it is smaller. The integers are exact in any dtype.
        scaled = (gradient * (self._scale_O / 127)).to(gradient.dtype)
        found: Tensor = scaled @ self._weight_OI.to(gradient.dtype)
        return found

    def multiply(self, x: Tensor) -> Tensor:
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
        output_RO: Tensor = ops.int8_scaled_mm(
            rounded_RI, self._weight_OI, scale_R, self._scale_O, bias=self.bias, dtype=x.dtype
        )
        if outliers_RI is not None:
            (columns_K,) = outliers_RI.any(dim=0).nonzero(as_tuple=True)
            outliers_RK = rows_RI.where(outliers_RI, 0)[:, columns_K]
            weight_OK = ops.int8_vectorwise_dequant(self._weight_OI[:, columns_K], self._scale_O).to(x.dtype)
            output_RO = output_RO.addmm(outliers_RK, weight_OK.t())
        return output_RO.view(*x.shape[:-1], self.out_features)


def quantize_linear(linear: nn.Linear, settings: BitsAndBytesConfig, *, dtype: torch.dtype) -> FrozenLinear:
    """A copy of an ordinary linear layer with its weight in 8 or 4 bits, on the same device.

    The weight of `linear` is not changed, so it may be tied to another module.
    """
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    weight, shape = linear.weight.detach(), (linear.in_features, linear.out_features)
    layer: Any
    if settings.load_in_8bit:
        threshold = settings.llm_int8_threshold
        layer = Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=threshold, device="meta")
        layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(weight.device)
        layer.bias = linear.bias
        return Frozen8bitLinear(layer, dtype=dtype)
    kind = {
        "quant_type": settings.bnb_4bit_quant_type,
        "compress_statistics": settings.bnb_4bit_use_double_quant,
    }
    layer = Linear4bit(*shape, bias=False, compute_dtype=settings.bnb_4bit_compute_dtype, device="meta", **kind)
    layer.weight = Params4bit(weight, requires_grad=False, module=layer, **kind).to(weight.device)
    layer.bias = linear.bias
    return Frozen4bitLinear(layer, dtype=dtype)


def replace_quantized_linears(module: nn.Module, *, dtype: torch.dtype) -> None:
    """Replace each layer of bitsandbytes inside `module` by a `Frozen4bitLinear` or a `Frozen8bitLinear`."""
    if "bitsandbytes" not in sys.modules:  # importing it is slow, and other quantizations do not need it
        return
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    for name, child in list(module.named_children()):
        if isinstance(child, Linear4bit):
            setattr(module, name, Frozen4bitLinear(child, dtype=dtype))
        elif isinstance(child, Linear8bitLt):
            setattr(module, name, Frozen8bitLinear(child, dtype=dtype))
        else:
            replace_quantized_linears(child, dtype=dtype)
