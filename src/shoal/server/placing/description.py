"""What a server announces of itself, at every phase of its blocks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

from shoal.peers import Capacity, ServerInfo
from shoal.policy.machines.machine import ASSUMED_LOAD_SECONDS
from shoal.policy.view import ASSUMED_SPEED, SwarmView
from shoal.server.placing.loaded_span import LoadedSpan
from shoal.server.placing.span_state import SpanState
from shoal.server.speed_watch import Speeds

MAX_REASON = 120
"""Characters of a reason that are announced, and of how attention is computed: records are small."""


def assumed_capacity(max_blocks: int, view: SwarmView) -> Capacity:
    """What a server that has never measured anything says of itself: that it is like most others."""
    known = [server.capacity for server in view.servers if server.capacity is not None]
    speeds = [speed for each in known for _, speed in each.block_speeds] or [ASSUMED_SPEED * max_blocks]
    seconds = [each.load_seconds for each in known] or [ASSUMED_LOAD_SECONDS / max_blocks]
    return Capacity(
        max_blocks,
        ((max_blocks, statistics.median(speeds)),),
        network_speed=None,
        load_seconds=statistics.median(seconds),
        disk_seconds=statistics.median(seconds),
    )


def describe(
    base: ServerInfo,
    state: SpanState,
    loaded: LoadedSpan | None,
    *,
    speeds: Speeds | None,
    is_resting: bool,
    addresses: tuple[str, ...],
    round_trips: Sequence[tuple[str, float]],
    unreached: Sequence[str],
) -> ServerInfo:
    """The record of a server in this state. It says what it does for clients only while it does it.

    `speeds` are the last that it knows, also of other blocks. A server that `is_resting` does not move for a while. The
    state has to have something to announce.
    """
    assert state.announced is not None
    span, phase = state.announced
    info = replace(
        base,
        span=span,
        state=phase,
        decode_speed=None if speeds is None else speeds.decode,
        prefill_speed=None if speeds is None else speeds.prefill,
        addresses=addresses,
        pinned=base.pinned or is_resting,
        wants=state.wants,
        ready_at=state.ready_at,
        reason=state.reason[:MAX_REASON],
    )
    if loaded is None or loaded.span != span:
        return info
    engine = loaded.engine
    return replace(
        info,
        cache_tokens_left=engine.cache_tokens_left,
        queue_length=engine.queue_length,
        adapters=engine.adapters.announced,
        head=loaded.weights.head is not None,
        attention=loaded.attention[:MAX_REASON],
        round_trips=tuple(round_trips),
        unreached=tuple(unreached),
    )
