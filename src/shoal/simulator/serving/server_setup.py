"""What a simulated server is: how long its passes take, how many pages it has, and its limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from shoal.policy.batching.engine_limits import Limits
from shoal.policy.batching.pass_times import PassTimeModel
from shoal.simulator.serving.page_counts import PAGE_TOKENS


@dataclass(frozen=True)
class Part:
    """A session's part of a pass: `num_tokens` new tokens, behind `num_past` that are cached."""

    num_tokens: int
    num_past: int
    num_remote_pages: int = 0

    @property
    def num_pairs(self) -> int:
        """The pairs of a new token and a token that it sees. Attention takes time for each."""
        return self.num_tokens * self.num_past + self.num_tokens * (self.num_tokens + 1) // 2


@dataclass(frozen=True)
class ServerSetup:
    """A server: seconds of a pass, of each of its tokens, of each pair of tokens in attention; pages; limits.

    With `num_remote_pages`, other servers lend these pages. A pass in which a session has some of them takes
    `remote_seconds` longer: every block asks the others and waits for what they answer.
    A client that is refused comes back after `retry_seconds`.
    """

    num_pages: int = 16384 // PAGE_TOKENS
    pass_seconds: float = 0.050
    token_seconds: float = 0.0015
    pair_seconds: float = 6e-7
    limits: Limits = field(default_factory=Limits)
    retry_seconds: float = 2.0
    num_remote_pages: int = 0
    remote_seconds: float = 0.0

    def seconds_of(self, parts: Sequence[Part]) -> float:
        """How long a pass of these parts takes."""
        num_tokens = sum(part.num_tokens for part in parts)
        num_pairs = sum(part.num_pairs for part in parts)
        seconds = self.pass_seconds + self.token_seconds * num_tokens + self.pair_seconds * num_pairs
        return seconds + self.remote_seconds * any(part.num_remote_pages for part in parts)

    @property
    def pass_time(self) -> PassTimeModel:
        """What the server believes of its passes when it starts."""
        return PassTimeModel.measured(
            decode_seconds=self.pass_seconds + self.token_seconds, prefill_token_seconds=self.token_seconds
        )
