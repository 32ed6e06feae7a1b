"""Which states of recurrent layers a server keeps, so that another session can begin with them.

Keys and values of a sequence hold all of its prefixes. A state holds only the last one, and takes as much memory as
hundreds of tokens. So copies are kept at few places, at ends of pages.
"""

from __future__ import annotations

MIN_INTERVAL = 128
"""Tokens between two snapshots at least: computing them takes little time beside a long prompt."""
MAX_SNAPSHOTS = 16
"""Snapshots of one sequence, about. A prompt is computed in as many parts."""
SPARE_SHARE = 1 / 8
"""The share of all pages that stays available beside snapshots."""


def snapshot_interval(num_tokens: int) -> int:
    """How many tokens lie between two snapshots of a sequence of this length.

    Longer sequences have fewer, at some of the same places.
    """
    interval = MIN_INTERVAL
    while num_tokens > MAX_SNAPSHOTS * interval:
        interval *= 2
    return interval


def tokens_to_snapshot(position: int, num_tokens: int) -> int:
    """How many tokens from `position` to the next snapshot of a sequence that will have `num_tokens`."""
    interval = snapshot_interval(num_tokens)
    return interval - position % interval


def keeps_snapshot(position: int, *, num_pages: int, num_available: int, needed: int) -> bool:
    """Whether the states after `position` tokens are kept, which takes `needed` pages when the sequence goes on."""
    has_room = num_available - needed >= SPARE_SHARE * num_pages
    return has_room and position > 0 and position % snapshot_interval(position) == 0
