"""Packed numbers come back bit by bit; anything else is refused, and takes no more memory than was declared."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shoal.net.wire.codec import decode, encode
from shoal.net.wire.packing import PIECE_VALUES, pack, unpack
from shoal.protocol import ProtocolViolation, StepResult
from shoal.tensors import DTYPE_BYTES, PACKABLE, Encoding

PACKED_DTYPES = [torch.bfloat16, torch.float16, torch.float32]
WIDTHS = st.sampled_from([2, 4])


def hidden(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def sent(tensor: torch.Tensor, encoding: Encoding = "raw") -> tuple[dict[str, Any], bytearray]:
    """The declaration and the bytes of a tensor that is packed if that pays."""
    header, buffers = encode(StepResult(), {"hidden": tensor}, encoding, packed={"hidden"})
    (spec,) = json.loads(header)["tensors"]
    return spec, bytearray(b"".join(buffers))


def received(spec: dict[str, Any], payload: bytes) -> torch.Tensor:
    header = json.dumps({"kind": "step_result", "tensors": [spec]}).encode()
    return decode(header, bytearray(payload))[1]["hidden"]


@given(WIDTHS, st.binary(max_size=400), st.integers(1, 40))
def test_any_bits_come_back(width: int, some: bytes, times: int) -> None:
    content = some[: len(some) // width * width] * times  # NaNs, infinities, subnormal numbers and zeros of both signs
    packed = pack(content, width)
    if packed is not None:
        joined = b"".join(packed)
        assert len(joined) < len(content)
        assert unpack(memoryview(joined), count=len(content) // width, width=width) == content


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
@pytest.mark.parametrize("num_values", [1, 63, 4096, PIECE_VALUES, PIECE_VALUES + 1])
def test_tensors_come_back_bit_by_bit(dtype: torch.dtype, num_values: int) -> None:
    special = torch.tensor([float("nan"), float("-inf"), -0.0, torch.finfo(dtype).smallest_normal / 2], dtype=dtype)
    tensor = torch.cat((hidden(num_values, dtype=dtype), special))
    spec, payload = sent(tensor)
    assert bits(received(spec, payload)) == bits(tensor)
    assert "packed" in spec or num_values < 4096


@given(st.sampled_from(PACKED_DTYPES), st.sampled_from(["raw", "bfloat16", "int8"]), st.integers(1, 5), st.data())
def test_packing_changes_nothing_in_any_encoding(
    dtype: torch.dtype, encoding: Encoding, rows: int, data: st.DataObject
) -> None:
    size = rows * 64 * dtype.itemsize
    raw = data.draw(st.binary(min_size=size, max_size=size))
    tensor = torch.frombuffer(bytearray(raw), dtype=dtype).view(1, rows, 64)
    header, buffers = encode(StepResult(), {"hidden": tensor}, encoding)
    payload = bytearray(b"".join(buffers))
    assert bits(received(*sent(tensor, encoding))) == bits(decode(header, payload)[1]["hidden"])
    assert len(sent(tensor, encoding)[1]) <= len(payload)


def test_hidden_states_take_seven_tenths_in_bfloat16() -> None:
    tensor = hidden(64, 1024) * torch.exp(hidden(1024, dtype=torch.float32)).bfloat16()  # channels differ
    assert sent(tensor)[0]["packed"] < 0.72 * tensor.nbytes


def test_float32_that_travels_as_bfloat16_is_packed_too() -> None:
    tensor = hidden(1, 64, 1024, dtype=torch.float32)
    spec, payload = sent(tensor, "bfloat16")
    assert spec["packed"] < 0.75 * tensor.nbytes / 2
    assert torch.equal(received(spec, payload), tensor.bfloat16().float())


@pytest.mark.parametrize("dtype", PACKED_DTYPES)
def test_no_packed_tensor_is_less_than_half_of_its_bytes(dtype: torch.dtype) -> None:
    zeros = torch.zeros(1 << 16, dtype=dtype)
    assert zeros.nbytes / 2 < sent(zeros)[0]["packed"]


def packed_zeros(num_values: int, coded: bytes) -> tuple[dict[str, Any], bytes]:
    """A declaration of bfloat16 zeros whose first bytes are `coded`."""
    num_bytes = len(coded) + num_values
    spec = {"name": "hidden", "dtype": "bfloat16", "shape": [num_values], "packed": num_bytes}
    return spec, coded + bytes(num_values + -num_bytes % 16)


def compressed(size: int) -> bytes:
    return zstandard.ZstdCompressor().compress(bytes(size))


def test_a_bomb_is_refused_before_it_takes_memory() -> None:
    assert received(*packed_zeros(4096, compressed(4096))).sum() == 0
    large, header = compressed(1 << 24), compressed(4096)[: zstandard.frame_header_size(compressed(4096))]
    for bomb in (
        large,
        header + large[zstandard.frame_header_size(large) :],  # which says that it is 4096 bytes
        compressed(4095),
        compressed(4096) + compressed(4096),
        zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4096)),
        b"\x50\x2a\x4d\x18" + (4096).to_bytes(4, "little") + bytes(64),  # a frame to be skipped
        compressed(4096)[:-1],
        b"",
        b"\0" * 20,
    ):
        with pytest.raises(ProtocolViolation):
            received(*packed_zeros(4096, bomb))


@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), min_size=1, max_size=8))
def test_garbled_bytes_are_refused_or_still_a_tensor(changes: list[tuple[int, int]]) -> None:
    spec, payload = sent(hidden(500))
    for position, value in changes:
        payload[position % len(payload)] = value
    with contextlib.suppress(ProtocolViolation):
        assert received(spec, payload).shape == (500,)


@given(st.binary(min_size=1, max_size=400))
def test_noise_is_no_packed_tensor(noise: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        received(*packed_zeros(500, noise))


@pytest.mark.parametrize(
    "spec",
    [
        {"packed": 0},
        {"packed": 1000},  # all of its bytes
        {"packed": 500},  # nothing but the second ones
        {"packed": 1 << 40},
        {"packed": 700.5},
        {"packed": True},
        {"packed": 700, "dtype": "int64"},
        {"packed": 700, "dtype": "uint8"},
        {"packed": 400, "encoding": "int8"},
        {"packed": 500, "encoding": "bfloat16"},  # of bfloat16, which that is already
    ],
)
def test_a_packed_tensor_that_cannot_be_is_refused_by_its_header(spec: dict[str, Any]) -> None:
    declared = {"name": "hidden", "dtype": "bfloat16", "shape": [500]} | spec
    header = json.dumps({"kind": "step_result", "tensors": [declared]}).encode()
    with pytest.raises(ProtocolViolation, match=r"packed|encoding"):
        decode(header, bytearray(-(-int(spec["packed"]) // 16) * 16 if spec["packed"] < 2000 else 16))


def test_only_floating_point_numbers_are_packed() -> None:
    assert {dtype for dtype in DTYPE_BYTES if dtype in PACKABLE} == {"bfloat16", "float16", "float32"}
    _, buffers = encode(StepResult(), {"ids": torch.zeros(4096, dtype=torch.int64)}, packed={"ids"})
    assert sum(memoryview(each).nbytes for each in buffers) == 8 * 4096
