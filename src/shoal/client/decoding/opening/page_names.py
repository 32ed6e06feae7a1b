"""The names of the pages with which the inputs of a server begin, by which it finds them in its cache."""

# B sequences, S all tokens, D hidden size

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal.adapters import adapter_cache_salt
from shoal.client.decoding.session_inputs import SessionInputs
from shoal.prefix import DIGEST_BYTES, PAGE_TOKENS, page_hashes, root_hash
from shoal.spans import Span


def page_names(
    inputs_BSD: torch.Tensor, span: Span, inputs: SessionInputs, adapters: Sequence[str | None] = ()
) -> list[list[bytes]]:
    """The names of the full pages of these inputs of a span's first block, for each sequence.

    A server that has pages of these names in its cache need not compute them; `adapters` names those of the span's
    blocks. Padded sequences have no names.
    """
    num_tokens = inputs_BSD.shape[1]
    if num_tokens < PAGE_TOKENS or inputs.are_padded:
        return [[] for _ in inputs_BSD]
    positions_BS = inputs.positions(0, num_tokens)
    if positions_BS is None:
        positions_BS = torch.arange(num_tokens).expand(inputs_BSD.shape[0], -1)
    first = root_hash(span, adapter_cache_salt(inputs.salt, adapters))
    return [page_hashes(first, hidden, positions) for hidden, positions in zip(inputs_BSD, positions_BS, strict=True)]


def as_digests(names: Sequence[Sequence[bytes]]) -> torch.Tensor | None:
    """These names of pages as a tensor [B, pages, 16]: as many for each sequence as all have; None if that is none."""
    num_pages = min(map(len, names), default=0)
    if not num_pages:
        return None
    joined = bytearray(b"".join(b"".join(row[:num_pages]) for row in names))
    return torch.frombuffer(joined, dtype=torch.uint8).view(len(names), num_pages, DIGEST_BYTES)
