"""How fast a server is believed to be: as it announces, up to twice the fastest that steps have confirmed.

A speed of 1e9 costs nothing to announce. So a claim counts up to a ceiling, which is the same for all servers of a
swarm: twice the best that any of them has shown this client. The factor lets a faster server win where speed matters;
once it has computed a step, the ceiling is twice its own speed. Before the first step, the ceiling follows from what
the servers announce that have answered: twice the speed that a quarter of them reach, and two at least. It is a
quarter, not a half, because half of a sound swarm may be slow machines in reserve; and few liars are no quarter. If
more lie, the first step on one of them, or on the server that overtakes it, ends that.

Speeds are in block-tokens per second, so that they do not depend on the length of a span.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoal.peers import ServerInfo

BELIEVED = 2.0
"""How many times the best speed that is known another server may have."""
TOP = 4
"""One in this many servers reaches the speed that counts before the first step."""
PROMPT_TOKENS = 32
"""A step of fewer tokens does not show how fast a server reads prompts."""
LEAST_SECONDS = 0.002
"""A step that seems to take less counts as this long: a server that answers at once has computed nothing."""
MOST_GAIN = 512.0
"""How many times as many tokens a server may decode with full passes as with one session: the largest batch that a
server times has this many."""


@dataclass(frozen=True)
class Fastest:
    """The best speeds that steps have confirmed, in block-tokens per second; None before the first such step."""

    decode: float | None = None
    prefill: float | None = None

    def after(self, num_blocks: int, num_tokens: int, seconds: float) -> Fastest:
        """With a step of `num_tokens` tokens in `num_blocks` blocks, which took `seconds` by this client's clock."""
        seconds = max(seconds, LEAST_SECONDS)
        decode = max(num_blocks / seconds, self.decode or 0.0)
        if num_tokens < PROMPT_TOKENS:
            return Fastest(decode, self.prefill)
        return Fastest(decode, max(num_tokens * num_blocks / seconds, self.prefill or 0.0))


@dataclass(frozen=True)
class Ceiling:
    """The highest speeds that are believed of any server, in block-tokens per second."""

    decode: float = float("inf")
    prefill: float = float("inf")

    def block_seconds(self, num_tokens: int) -> float:
        """The fewest seconds in which any server computes `num_tokens` in one block."""
        return max(1 / self.decode, num_tokens / self.prefill)


def ceiling(confirmed: Fastest, answered: Sequence[ServerInfo]) -> Ceiling:
    """What is believed at most, by what steps have `confirmed`, and of what they have not by what servers announce.

    `answered` are servers that have answered this client. Where nothing is known, all is believed.
    """
    decode, prefill = confirmed.decode, confirmed.prefill
    if decode is None:
        decode = _upper(server.decode_speed * len(server.span) for server in answered if server.decode_speed)
    if prefill is None:
        prefill = _upper(server.prefill_speed * len(server.span) for server in answered if server.prefill_speed)
    return Ceiling(BELIEVED * decode, BELIEVED * max(decode, prefill))  # no prompt is read more slowly than steps are


def _upper(speeds: Iterable[float]) -> float:
    """The speed that one server in `TOP` reaches, and two at least if there are two."""
    fastest_first = sorted(speeds, reverse=True)
    if not fastest_first:
        return float("inf")
    num_servers = len(fastest_first)
    return fastest_first[min(max(2, -(-num_servers // TOP)), num_servers) - 1]
