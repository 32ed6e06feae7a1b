"""Names for what a sequence begins with: both sides of a session compute them, each from what it sent or received.

A page of a sequence is named by a digest of its inputs, their positions, and the name of the page before it; so equal
names mean equal beginnings, and the same keys and values. A server only ever names what it was sent and has computed
itself: nobody can plant a cache for somebody else. The first name is that of the blocks and of the tenant, whose secret
`salt` keeps others from asking what he has computed.
"""

# T tokens of a page, D hidden size

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from shoal.spans import Span

PAGE_TOKENS = 16
"""How many tokens a name stands for; also what a server keeps together, small enough that little of it is wasted."""
DIGEST_BYTES = 16


def root(span: Span, salt: str) -> bytes:
    """The name that precedes a sequence's first page."""
    return _digest(f"{span}\n{salt}".encode())


def following(name: bytes, hidden_TD: Tensor, positions_T: Tensor) -> bytes:
    """The name of the page after the one called `name`."""
    return _digest(
        name,
        str(hidden_TD.dtype).encode(),
        _bytes(hidden_TD),
        _bytes(positions_T),
    )


def page_names(first: bytes, hidden_TD: Tensor, positions_T: Tensor) -> list[bytes]:
    """The names of all full pages of inputs [T, D] that follow the page called `first`."""
    names = [first]
    for start in range(0, hidden_TD.shape[0] - PAGE_TOKENS + 1, PAGE_TOKENS):
        page = slice(start, start + PAGE_TOKENS)
        names.append(following(names[-1], hidden_TD[page], positions_T[page]))
    return names[1:]


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data.cast("B")


def _digest(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()
