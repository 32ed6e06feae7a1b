"""Hashes of a sequence's pages, for prefix caching. Client and server compute them from the same inputs.

The hash of a page is computed from its inputs, their positions, and the hash of the page before it. Equal hashes mean
equal prefixes, and therefore equal keys and values. A server hashes only inputs that it has received and computed
itself, so a client cannot plant a cache for other clients. The first hash is that of the blocks and of the tenant's
secret `salt`, which keeps others from asking what the tenant has computed.
"""

# T tokens of a page, D hidden size

from __future__ import annotations

import hashlib
import secrets
from typing import Self

import torch
from torch import Tensor

from shoal.spans import Span

PAGE_TOKENS = 16
"""Tokens in a page. A hash stands for one page, and a server's cache is divided into pages of this size. It is small,
so that little memory is wasted in the last page of a sequence."""
DIGEST_BYTES = 16
SALT_BYTES = 16
"""The length of a salt that is drawn: it cannot be guessed."""


class DrawnSalt(str):
    """A salt that was drawn here. No other client has it, so servers cache under it only what this client has sent."""

    __slots__ = ()

    @classmethod
    def draw(cls) -> Self:
        """A new one."""
        return cls(secrets.token_hex(SALT_BYTES))


def root_hash(span: Span, salt: str) -> bytes:
    """The hash before a sequence's first page."""
    return _digest(f"{span}\n{salt}".encode())


def next_hash(previous: bytes, hidden_TD: Tensor, positions_T: Tensor) -> bytes:
    """The hash of a page, from the hash of the page before it."""
    return _digest(
        previous,
        str(hidden_TD.dtype).encode(),
        _bytes(hidden_TD),
        _bytes(positions_T),
    )


def page_hashes(previous: bytes, hidden_TD: Tensor, positions_T: Tensor) -> list[bytes]:
    """The hashes of all full pages of inputs [T, D], from the hash of the page before them."""
    hashes = [previous]
    for start in range(0, hidden_TD.shape[0] - PAGE_TOKENS + 1, PAGE_TOKENS):
        page = slice(start, start + PAGE_TOKENS)
        hashes.append(next_hash(hashes[-1], hidden_TD[page], positions_T[page]))
    return hashes[1:]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data.cast("B")


def _digest(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()
