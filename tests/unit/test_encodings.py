"""An encoding loses the precision that it promises, once; any received bytes decode to some numbers."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.net.wire.codec import decode, encode
from shoal.net.wire.encodings import MIN_PEAK, SERIAL_VALUES, as_received, from_int8, to_int8
from shoal.protocol import MAX_PAYLOAD_BYTES, ProtocolViolation, StepResult
from shoal.tensors import INT8_BLOCK, LOSSY, Encoding

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SCALES = [1.0, 1e-3, 1e3, 1e-30, 1e30, MIN_PEAK, 6e-8, 1e-40, 3e38, 6e4]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of any shape, with random bits or normally distributed values of any scale."""
    dtype = draw(st.sampled_from(FLOATS))
    shape = [draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.sampled_from([1, 3, 63, 64, 65, 128, 200]))]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        bits = torch.int16 if dtype.itemsize == 2 else torch.int32
        limits = torch.iinfo(bits)
        return torch.randint(limits.min, limits.max, shape, generator=generator, dtype=bits).view(dtype)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from(SCALES))
    return values.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32)


def sent(tensor: torch.Tensor, encoding: Encoding) -> torch.Tensor:
    header, buffers = encode(StepResult(), {"hidden": tensor}, encoding)
    _, received = decode(header, bytearray(b"".join(buffers)))
    return received["hidden"]


encodings = st.sampled_from(["raw", *LOSSY])


@given(tensors(), encodings)
def test_a_client_knows_what_the_server_received(tensor: torch.Tensor, encoding: Encoding) -> None:
    received = sent(tensor, encoding)
    assert (received.dtype, received.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(bits_of(received), bits_of(as_received(tensor, encoding)))


@given(tensors(), encodings)
def test_received_values_are_sent_again_without_loss(tensor: torch.Tensor, encoding: Encoding) -> None:
    received = as_received(tensor, encoding)
    assert torch.equal(bits_of(as_received(received, encoding)), bits_of(received))


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_value_that_int8_can_represent_is_kept(dtype: torch.dtype) -> None:
    """All 255 steps of all peaks of a dtype, in blocks with one peak each."""
    patterns = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    peaks = patterns[(patterns.float() >= MIN_PEAK) & (patterns.to(dtype).bfloat16() == patterns)]
    peaks = peaks[peaks.to(dtype).isfinite()]
    steps = torch.arange(-127, 128, dtype=torch.int8)
    for some in peaks.split(1024):
        blocks = torch.full((len(some), 5, INT8_BLOCK), 127, dtype=torch.int8)
        blocks[..., 1:52] = steps.view(5, 51)
        values = from_int8(blocks.flatten(1), some[:, None].expand(-1, 5), dtype)
        assert torch.equal(as_received(values, "int8"), values)
        assert torch.equal(values[:, 0], some.to(dtype))


@given(tensors(), encodings, st.data())
def test_a_slice_is_encoded_as_it_is_within_the_tensor(
    tensor: torch.Tensor, encoding: Encoding, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, tensor.shape[1] - 1))
    end = data.draw(st.integers(start + 1, tensor.shape[1]))
    whole = as_received(tensor, encoding)[:, start:end]
    assert torch.equal(bits_of(whole), bits_of(as_received(tensor[:, start:end], encoding)))


def test_a_long_tensor_is_encoded_like_its_rows() -> None:
    tensor = torch.randn(3, SERIAL_VALUES // 64, 192, generator=torch.Generator().manual_seed(0))
    for encoding in LOSSY:
        rows = torch.stack([as_received(row, encoding) for row in tensor.view(-1, 192)])
        assert torch.equal(as_received(tensor, encoding).view(-1, 192), rows)


@given(tensors())
def test_int8_moves_a_number_by_half_a_step_of_its_block_at_most(tensor: torch.Tensor) -> None:
    received = as_received(tensor, "int8")
    for row, moved in zip(tensor.flatten(0, 1).double(), received.flatten(0, 1).double(), strict=True):
        for block, result in zip(row.split(INT8_BLOCK), moved.split(INT8_BLOCK), strict=True):
            if not block.isfinite().all():
                assert result.isnan().all()
                continue
            peak = block.abs().max()
            # Half a step, the rounding of the peak and of the result to their dtypes; everything below MIN_PEAK.
            rounding = torch.finfo(tensor.dtype).eps * peak + torch.finfo(tensor.dtype).smallest_normal * 2**-10
            assert (result - block).abs().max() <= peak / 254 * (1 + 1 / 100) + rounding + MIN_PEAK * 1.01
            assert result.isfinite().all()


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_infinities_and_nan_stay_visible(odd: float, dtype: torch.dtype) -> None:
    tensor = torch.ones(1, 2, 3 * INT8_BLOCK, dtype=dtype)
    tensor[0, 1, 70] = odd
    for encoding in ("raw", "bfloat16"):
        assert torch.equal(sent(tensor, encoding).nan_to_num(), tensor.nan_to_num())
    received = sent(tensor, "int8")
    assert received[0, 1, INT8_BLOCK : 2 * INT8_BLOCK].isnan().all()
    assert received.isnan().sum() == INT8_BLOCK


def test_zeros_stay_zeros_and_tiny_values_become_zeros() -> None:
    assert not sent(torch.zeros(1, 2, 100), "int8").any()
    assert not sent(torch.full((1, 2, 100), 1e-40), "int8").any()
    smallest = torch.full((1, 1, 64), 2.0**-24, dtype=torch.float16)
    assert torch.equal(sent(smallest, "int8"), smallest)


def test_int8_takes_half_of_the_bytes_of_bfloat16() -> None:
    tensor = torch.randn(2, 5, 2048)
    sizes = {name: sum(len(b) for b in encode(StepResult(), {"hidden": tensor}, name)[1]) for name in ("raw", *LOSSY)}
    assert sizes["bfloat16"] * 2 == sizes["raw"]
    assert sizes["int8"] <= 0.516 * sizes["bfloat16"]


@given(tensors(), encodings)
def test_the_declared_size_is_the_size(tensor: torch.Tensor, encoding: Encoding) -> None:
    header, buffers = encode(StepResult(), {"hidden": tensor}, encoding)
    payload = bytearray(b"".join(buffers))
    for wrong in (payload[:-1], payload + bytes(1)):
        with pytest.raises(ProtocolViolation, match="bytes declared"):
            decode(header, wrong)


@pytest.mark.parametrize("tensor", [torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.uint8)])
def test_integers_are_always_sent_raw(tensor: torch.Tensor) -> None:
    for encoding in LOSSY:
        assert torch.equal(sent(tensor, encoding), tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tensor_that_would_not_get_smaller_is_sent_raw(dtype: torch.dtype) -> None:
    tensor = torch.randn(1, 3, 64).to(dtype)
    assert torch.equal(sent(tensor, "bfloat16"), tensor)


def declared(**spec: Any) -> bytes:
    tensor = {"name": "hidden", "dtype": "float32", "shape": [1, 1, 64], "encoding": "int8"} | spec
    return json.dumps({"kind": "step_result", "tensors": [tensor]}).encode()


@pytest.mark.parametrize(
    "spec",
    [
        {"encoding": "int4"},
        {"encoding": None},
        {"encoding": ["int8"]},
        {"dtype": "int64"},
        {"dtype": "uint8"},
        {"dtype": "bfloat16", "encoding": "bfloat16"},
        {"dtype": "float16", "encoding": "bfloat16"},
        {"shape": []},
        {"dtype": "int8"},
    ],
)
def test_an_encoding_that_does_not_fit_is_refused(spec: dict[str, Any]) -> None:
    payload = bytearray(80)
    decode(declared(), payload)
    with pytest.raises(ProtocolViolation, match="not a valid message"):
        decode(declared(**spec), payload)


def test_a_tensor_that_would_be_too_large_in_memory_is_refused() -> None:
    """The payload is within the limit, but the decoded tensor would take four times its size."""
    num_tokens = MAX_PAYLOAD_BYTES // 4 // 1024 + 1
    with pytest.raises(ProtocolViolation, match="tensors of"):
        decode(declared(shape=[1, num_tokens, 1024]), bytearray())


@given(st.binary(min_size=80, max_size=80))
def test_any_bytes_are_some_numbers(payload: bytes) -> None:
    for dtype, size in (("float32", 64), ("bfloat16", 64), ("float16", 64)):
        _, received = decode(declared(dtype=dtype), bytearray(payload))
        assert received["hidden"].shape == (1, 1, size)


def test_steps_are_fractions_of_the_peak() -> None:
    steps, peaks = to_int8(torch.tensor([[0.0, 1.0, -2.0, 0.5]]))
    assert steps.tolist() == [[0, 64, -127, 32]]
    assert peaks.tolist() == [[2.0]]
