"""How fast a server would be with a span of any length, from passes that it measured and the memory that it has.

A pass reads the weights once for all sessions, so more sessions at a time mean more tokens per second. How many there
can be is a matter of the cache, and a longer span leaves less of it: its blocks take memory, and each token takes some
in every block. So a server is fastest, for each of its blocks, with a short span.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass

from shoal.peers import MAX_SPEED_POINTS
from shoal.policy.machines.max_blocks import cache_tokens

SESSION_TOKENS = 1024
"""The cache of a typical session: a question, an answer, and what was said before."""
MAX_SCALE = 2.0
"""A profile that was measured on some blocks counts for spans that are at most this many times longer or shorter."""
MAX_SPEED = 1e9
"""Tokens per second: no machine is faster, and records have no room for more."""


@dataclass(frozen=True)
class BlockTime:
    """The seconds of one kind of pass: `fixed`, whatever it goes through, and `per_block` for each block."""

    fixed: float
    per_block: float

    @classmethod
    def between(cls, *, one: float, whole: float, num_blocks: int) -> BlockTime:
        """The time of a pass that takes `one` second through one block and `whole` seconds through `num_blocks`.

        It is right for `num_blocks` in any case, and for one block unless the two contradict each other, as they do if
        the machine was disturbed meanwhile.
        """
        if num_blocks > 1 and one < whole < one * num_blocks:
            per_block = (whole - one) / (num_blocks - 1)
            return cls(one - per_block, per_block)
        return cls(0.0, whole / num_blocks)

    def seconds(self, num_blocks: int) -> float:
        """The time of a pass through `num_blocks` blocks."""
        return self.fixed + num_blocks * self.per_block


@dataclass(frozen=True)
class SpeedProfile:
    """How long the passes of one machine take, measured on `num_blocks` blocks of a model.

    `decode` is the time for one token of one session, `prefill` that for `prefill_tokens` tokens of a prompt. `batches`
    are times for one token of each of several sessions, by the number of sessions, which grows and begins with 1. A
    machine that computes one session after another has no other batch. Raises `ValueError` for a time that is none.
    """

    num_blocks: int
    decode: BlockTime
    prefill: BlockTime
    prefill_tokens: int
    batches: tuple[tuple[int, BlockTime], ...]

    def __post_init__(self) -> None:
        times = [self.decode, self.prefill, *(time for _, time in self.batches)]
        if any(not 0 < each.per_block < math.inf or not 0 <= each.fixed < math.inf for each in times):
            raise ValueError("a pass that takes no time, or for ever")
        sizes = [size for size, _ in self.batches]
        if self.num_blocks < 1 or self.prefill_tokens < 1 or sizes[:1] != [1] or sizes != sorted(set(sizes)):
            raise ValueError("a profile without its passes")

    def fits(self, num_blocks: int) -> bool:
        """Whether it tells the speed of a span of this length: passes through few blocks have warmer caches."""
        return self.num_blocks / MAX_SCALE <= num_blocks <= self.num_blocks * MAX_SCALE

    def decode_speed(self, num_blocks: int) -> float:
        """Tokens per second of one session that decodes through a span of `num_blocks` blocks."""
        return min(MAX_SPEED, 1 / self.decode.seconds(num_blocks))

    def prefill_speed(self, num_blocks: int) -> float:
        """Tokens per second of a prompt through a span of `num_blocks` blocks."""
        return min(MAX_SPEED, self.prefill_tokens / self.prefill.seconds(num_blocks))

    def block_speed(self, num_blocks: int, *, num_sessions: int) -> float:
        """Decoded tokens per second of one block, in a span of `num_blocks` with cache for `num_sessions` sessions.

        Larger batches than were measured are not expected to be faster than the largest that was.
        """
        sizes = [size for size, _ in self.batches]
        possible = {size for size in sizes if size < num_sessions} | {max(1, min(num_sessions, sizes[-1]))}
        return min(MAX_SPEED, max(num_blocks * size / self._seconds(size, num_blocks) for size in possible))

    def _seconds(self, size: int, num_blocks: int) -> float:
        """The time of a pass of `size` sessions: linear between the sizes that were measured."""
        sizes = [each for each, _ in self.batches]
        index = bisect_left(sizes, size)
        after, seconds_after = sizes[index], self.batches[index][1].seconds(num_blocks)
        if after == size:
            return seconds_after
        before, seconds_before = sizes[index - 1], self.batches[index - 1][1].seconds(num_blocks)
        return seconds_before + (seconds_after - seconds_before) * (size - before) / (after - before)


@dataclass(frozen=True)
class CacheRoom:
    """What decides how large the cache of a server is, in bytes.

    `free_bytes` are free before any block is loaded. A block takes `block_bytes`, a token `token_bytes` in the cache of
    each block, and `output_bytes` beside them. `num_tokens` is set if the operator chose the size of the cache.
    """

    free_bytes: float
    block_bytes: float
    token_bytes: float
    output_bytes: float = 0.0
    num_tokens: int | None = None

    def num_sessions(self, num_blocks: int) -> int:
        """For how many typical sessions there is cache beside a span of `num_blocks` blocks; at least 1."""
        num_tokens = self.num_tokens
        if num_tokens is None:
            num_tokens = cache_tokens(
                free_before=self.free_bytes,
                free_after=self.free_bytes - num_blocks * self.block_bytes,
                token_bytes=num_blocks * self.token_bytes + self.output_bytes,
            )
        return max(1, num_tokens // SESSION_TOKENS)


def span_lengths(max_blocks: int) -> tuple[int, ...]:
    """At most `MAX_SPEED_POINTS` lengths of spans from 1 to `max_blocks`, each by about the same factor longer."""
    steps = MAX_SPEED_POINTS - 1
    lengths = {round(max_blocks ** (step / steps)) for step in range(MAX_SPEED_POINTS)}
    return tuple(sorted(lengths))


def block_speeds(profile: SpeedProfile, room: CacheRoom, max_blocks: int) -> tuple[tuple[int, float], ...]:
    """The saturated speed of one block, in tokens per second, for several lengths of spans up to `max_blocks`.

    Lengths between two that are as fast are left out: they say nothing new.
    """
    speeds = [
        (length, profile.block_speed(length, num_sessions=room.num_sessions(length)))
        for length in span_lengths(max_blocks)
    ]
    ends = (0, len(speeds) - 1)
    return tuple(
        (length, speed)
        for index, (length, speed) in enumerate(speeds)
        if index in ends or not speeds[index - 1][1] == speed == speeds[index + 1][1]
    )
