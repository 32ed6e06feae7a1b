"""What a server announces, for tests of directories, which only carry it."""

from __future__ import annotations

from typing import Any

from shoal.peers import ServerInfo, ServerState
from shoal.spans import Span


def info(
    peer: str, start: int = 0, end: int = 4, state: ServerState = ServerState.ONLINE, **changes: Any
) -> ServerInfo:
    """The announcement of a server that holds the blocks from `start` to `end`."""
    return ServerInfo(
        peer=peer,
        span=Span(start, end),
        state=state,
        fingerprint="f",
        decode_speed=1.0,
        prefill_speed=2.0,
        cache_tokens_left=3,
        dtype="bfloat16",
        quantization="none",
        version="1",
        **changes,
    )
