"""Which members keep a copy of what they do not need themselves, so that it outlives the machine that brought it."""

from __future__ import annotations

import hashlib

KEEPERS = 4
"""About how many members of a large swarm keep the embeddings and the output head; all of a smaller one do."""


def keeps_head(peer: str, num_servers: int) -> bool:
    """Whether the server `peer`, one of `num_servers`, keeps the embeddings and the head for clients without a copy.

    It follows from the peer id, so that servers need not agree on it.
    """
    draw = int.from_bytes(hashlib.sha256(f"shoal keeps {peer}".encode()).digest()[:8])
    return draw * max(num_servers, 1) < KEEPERS << 64
