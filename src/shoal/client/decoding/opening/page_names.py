"""The names of the pages with which the inputs of a server begin, by which it finds them in its cache."""

# B sequences, S all tokens, D hidden size

from __future__ import annotations

import torch

from shoal.adapters import adapter_cache_salt
from shoal.client.decoding.session_inputs import SessionInputs
from shoal.model.peft.factors import ActiveAdapters
from shoal.prefix import DIGEST_BYTES, PAGE_TOKENS, page_hashes, root_hash
from shoal.spans import Span


def page_names(
    inputs_BSD: torch.Tensor, span: Span, inputs: SessionInputs, tuning: ActiveAdapters
) -> torch.Tensor | None:
    """The names [B, pages, 16] of the full pages of these inputs of a span's first block; None if there are none.

    A server that has pages of these names in its cache need not compute them. Padded sequences have no names.
    """
    batch_size, num_tokens, _ = inputs_BSD.shape
    if num_tokens < PAGE_TOKENS or inputs.are_padded:
        return None
    positions_BS = inputs.positions(0, num_tokens)
    if positions_BS is None:
        positions_BS = torch.arange(num_tokens).expand(batch_size, -1)
    first = root_hash(span, adapter_cache_salt(inputs.salt, tuning.names(span)))
    names = [
        b"".join(page_hashes(first, hidden, positions))
        for hidden, positions in zip(inputs_BSD, positions_BS, strict=True)
    ]
    digests = torch.frombuffer(bytearray(b"".join(names)), dtype=torch.uint8)
    return digests.view(batch_size, -1, DIGEST_BYTES)
