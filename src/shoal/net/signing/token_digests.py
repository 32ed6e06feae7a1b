"""The digests of hidden states, which sender and receiver compute alike: one for each token.

They are of the values that a receiver decodes (`as_received`), so they do not depend on how a sequence was cut into
steps, nor on whether a server knew an encoding. The digest of several tokens is that of their digests.
"""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from hashlib import blake2b

import torch

from shoal.tensors import Encoding

DIGEST_BYTES = 32
ASIDE_BYTES = 128 * 1024
"""More than this is digested on another thread: the event loop should not wait for that."""


def token_digests(hidden_BTD: torch.Tensor, encoding: Encoding) -> bytes:
    """The digests of T tokens, `DIGEST_BYTES` each, one behind the other: each of one token of all B sequences.

    `hidden_BTD` are the values that were decoded from an `encoding`. If that loses precision, all NaN count as one:
    machines may disagree on their bits.
    """
    if encoding != "raw":
        hidden_BTD = _with_one_nan(hidden_BTD)
    data: memoryview = hidden_BTD.detach().transpose(0, 1).contiguous().view(-1).view(torch.uint8).numpy().data
    size = len(data) // hidden_BTD.shape[1]
    return b"".join(
        blake2b(data[start : start + size], digest_size=DIGEST_BYTES).digest() for start in range(0, len(data), size)
    )


def tensor_digest(decoded_BTD: torch.Tensor) -> str:
    """The digest of hidden states or gradients, as the answers of passes have it. All NaN count as one."""
    return joint_digest(token_digests(_with_one_nan(decoded_BTD), "raw"))


async def tensor_digest_aside(
    decoded_BTD: torch.Tensor, on_thread: Callable[[Callable[[], str]], Awaitable[str]] = asyncio.to_thread
) -> str:
    """The same, computed `on_thread` if there is much of it."""
    digest = partial(tensor_digest, decoded_BTD)
    return digest() if decoded_BTD.nbytes <= ASIDE_BYTES else await on_thread(digest)


def joint_digest(digests: bytes) -> str:
    """The digest of several tokens, as receipts have it, made of the digests of each."""
    return blake2b(digests, digest_size=DIGEST_BYTES).hexdigest()


def _with_one_nan(hidden_BTD: torch.Tensor) -> torch.Tensor:
    is_nan = hidden_BTD.isnan()
    return hidden_BTD.masked_fill(is_nan, float("nan")) if is_nan.any() else hidden_BTD
