"""Digests of tokens: the same on both sides, however a sequence was cut, and other ones for any other byte."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.net.signing.token_digests import DIGEST_BYTES, joint_digest, token_digests
from shoal.net.wire import codec
from shoal.net.wire.encodings import as_received
from shoal.protocol import StepResult
from shoal.tensors import Encoding

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ENCODINGS: tuple[Encoding, ...] = ("raw", "bfloat16", "int8")


def hidden(batch_size: int, num_tokens: int, size: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, num_tokens, size, generator=generator).to(dtype)


@st.composite
def cut(draw: st.DrawFn) -> tuple[torch.Tensor, list[int]]:
    """A batch of tokens, and the lengths of pieces into which it is cut."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    shape = draw(st.integers(1, 3)), sum(lengths), draw(st.integers(1, 130))
    return hidden(*shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 99))), lengths


@given(cut(), st.sampled_from(ENCODINGS))
def test_they_do_not_depend_on_how_a_sequence_is_cut_into_steps(tokens: tuple[torch.Tensor, list[int]], wire: Encoding):
    hidden_BTD, lengths = tokens
    whole = token_digests(as_received(hidden_BTD, wire), wire)
    pieces = b"".join(token_digests(as_received(piece, wire), wire) for piece in hidden_BTD.split(lengths, dim=1))
    assert pieces == whole
    assert len(whole) == DIGEST_BYTES * hidden_BTD.shape[1]


@given(cut(), st.sampled_from(ENCODINGS))
def test_a_receiver_finds_the_digests_of_the_sender(tokens: tuple[torch.Tensor, list[int]], wire: Encoding):
    sent_BTD, _ = tokens
    header, buffers = codec.encode(StepResult(), {"hidden": sent_BTD}, wire)
    payload = bytearray().join(bytes(memoryview(each).cast("B")) for each in buffers)
    _, received = codec.decode(header, payload)
    assert token_digests(received["hidden"], wire) == token_digests(as_received(sent_BTD, wire), wire)


@given(cut(), st.data())
def test_any_other_byte_gives_another_digest_of_its_token_alone(
    tokens: tuple[torch.Tensor, list[int]], data: st.DataObject
):
    hidden_BTD, _ = tokens
    changed_BTD = hidden_BTD.clone()
    row = data.draw(st.integers(0, hidden_BTD.shape[0] - 1))
    position = data.draw(st.integers(0, hidden_BTD.shape[1] - 1))
    values = changed_BTD[row, position].view(torch.uint8)
    values[data.draw(st.integers(0, len(values) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    before, after = token_digests(hidden_BTD, "raw"), token_digests(changed_BTD, "raw")
    assert joint_digest(before) != joint_digest(after)
    different = [index // DIGEST_BYTES for index in range(len(before)) if before[index] != after[index]]
    assert set(different) == {position}


@pytest.mark.parametrize("dtype", DTYPES)
def test_after_a_lossy_encoding_all_nan_count_as_one(dtype: torch.dtype):
    one_BTD = torch.full((1, 1, 64), float("nan"), dtype=dtype)
    other_BTD = one_BTD.clone()
    other_BTD.view(torch.uint8)[0, 0, 0] |= 1  # another NaN, as another processor may make
    assert other_BTD.isnan().all()
    assert token_digests(one_BTD, "int8") == token_digests(other_BTD, "int8")
    assert token_digests(one_BTD, "raw") != token_digests(other_BTD, "raw")
