"""Layers with the weights of bitsandbytes: their outputs, their gradients, and the independence of rows."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from shoal.model.linear.quantized_linear import Frozen4bitLinear, Frozen8bitLinear, replace_quantized_linears

SHAPES = [(192, 128), (60, 128), (48, 32)]  # outputs and inputs; bitsandbytes' kernel does not support the last two
DTYPES = [torch.float32, torch.bfloat16]


def four_bit(num_out: int, num_in: int, dtype: torch.dtype, *, double: bool = False) -> tuple[Any, Tensor]:
    """A layer of bitsandbytes, and its dequantized weight."""
    torch.manual_seed(0)
    plain = nn.Linear(num_in, num_out, dtype=dtype)
    linear = bnb.nn.Linear4bit(num_in, num_out, True, dtype, double, "nf4")
    weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=double)
    linear.weight, linear.bias = weight.to("cpu"), plain.bias
    dense = bnb.functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return linear.eval().requires_grad_(False), dense


def int8(num_out: int, num_in: int, dtype: torch.dtype) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    plain = nn.Linear(num_in, num_out, dtype=dtype)
    linear = bnb.nn.Linear8bitLt(num_in, num_out, True, has_fp16_weights=False, threshold=6.0)
    linear.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False).to("cpu")
    linear.bias = plain.bias
    dense = linear.weight.CB.double() * linear.weight.SCB.double()[:, None] / 127
    return linear.eval().requires_grad_(False), dense


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_a_4_bit_layer_computes_with_its_dequantized_weight(
    shape: tuple[int, int], dtype: torch.dtype, double: bool
) -> None:
    linear, dense = four_bit(*shape, dtype, double=double)
    bias = linear.bias.double()
    layer = Frozen4bitLinear(linear, dtype=dtype)
    assert relative_error(layer.weight, dense) < 4e-3  # the CPU kernel holds scales in bfloat16
    for rows in (torch.randn(shape[1]), torch.randn(0, shape[1]), torch.randn(2, 9, shape[1])):
        x = rows.to(dtype)
        expected = nn.functional.linear(x.double(), dense.double(), bias)
        assert layer(x).shape == expected.shape
        torch.testing.assert_close(layer(x).double(), expected, rtol=0.01, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_8_bit_layer_computes_each_row_as_bitsandbytes_computes_it_alone(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    linear, _ = int8(*shape, dtype)
    layer = Frozen8bitLinear(linear, dtype=dtype)
    x = torch.randn(5, shape[1]).to(dtype)
    x[0, 3], x[1, 7], x[1, 8] = 30.0, -10.0, 7.0  # outliers, in different columns of each row
    expected = torch.cat([linear(row[None]) for row in x])
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    assert layer(x[:0]).shape == (0, shape[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [four_bit, int8])
def test_a_row_does_not_depend_on_other_rows(kind: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    around = nn.Sequential(kind(*shape, dtype)[0])
    replace_quantized_linears(around, dtype=dtype)
    x = torch.randn(40, shape[1]).to(dtype)
    alone = around(x[:1])
    others = x.clone()
    others[1:] *= 20  # full of outliers
    rounding = 1e-6 if dtype is torch.float32 else 4e-3
    for batch in (x, others, others[:2]):
        assert relative_error(around(batch)[:1], alone) <= rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [four_bit, int8])
def test_gradients_are_those_of_the_dequantized_weight_also_after_a_pass_without_gradients(
    kind: Any, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    linear, dense = kind(*shape, dtype)
    around = nn.Sequential(linear)
    replace_quantized_linears(around, dtype=dtype)
    towards = torch.randn(2, 3, shape[0]).to(dtype)
    with torch.inference_mode():
        around(torch.randn(1, shape[1]).to(dtype))
    for _ in range(2):
        x = torch.randn(2, 3, shape[1]).to(dtype).requires_grad_(True)
        around(x).backward(towards)
        assert relative_error(x.grad, towards.double() @ dense.double()) < 8e-3


def test_layers_that_are_not_quantized_are_not_replaced() -> None:
    plain = nn.Linear(8, 8)
    around = nn.Sequential(plain, nn.Sequential(four_bit(64, 64, torch.float32)[0]), int8(64, 64, torch.float32)[0])
    replace_quantized_linears(around, dtype=torch.float32)
    assert around[0] is plain
    assert isinstance(around[1][0], Frozen4bitLinear)
    assert isinstance(around[2], Frozen8bitLinear)
