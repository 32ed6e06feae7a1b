"""How large a message may be, and the errors for what does not fit."""

# B sequences, T tokens, D hidden size, N factors

from __future__ import annotations

from shoal.errors import UserError
from shoal.net.wire.codec import Tensors
from shoal.protocol import MAX_PASS_TOKENS, MAX_PAYLOAD_BYTES
from shoal.tensors import MAX_DIMENSION, TENSOR_ALIGNMENT


def check_length(num_tokens: int) -> None:
    """Raises `UserError` if a sequence has more tokens than a pass without a cache may have."""
    if num_tokens > MAX_PASS_TOKENS:
        raise UserError(
            f"{num_tokens} tokens of one sequence; a pass without a cache has {MAX_PASS_TOKENS} at most",
            hint="use shorter sequences, or a session to generate",
        )


def is_one_message(num_bytes: int, num_tensors: int, *, longest: int) -> bool:
    """Whether `num_bytes` in `num_tensors` tensors fit into a message; `longest` is their largest dimension."""
    return num_bytes + num_tensors * TENSOR_ALIGNMENT <= MAX_PAYLOAD_BYTES and longest <= MAX_DIMENSION


def check_size(tensors: Tensors) -> None:
    """Raises `UserError` if the tensors do not fit into one message. The error names what is too large."""
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    longest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    if is_one_message(num_bytes, len(tensors), longest=longest):
        return
    if "factors" in tensors:
        what, instead = f"{len(tensors['factors'])} factors of one block", "a smaller rank, fewer layers"
    else:
        gradient = " and a gradient for each of them" if "grad" in tensors else ""
        hidden_BTD = tensors["hidden" if "hidden" in tensors else "grad"]
        what, instead = f"{hidden_BTD.shape[1]} tokens of one sequence{gradient}", "shorter sequences"
    raise UserError(
        f"{what} do not fit into a message of {MAX_PAYLOAD_BYTES >> 20} MiB",
        hint=f"use {instead}, or a dtype of fewer bytes",
    )
