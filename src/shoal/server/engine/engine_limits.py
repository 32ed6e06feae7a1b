"""How a server divides its time and its room."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What is settable about who computes when, and who waits."""

    max_num_batched_tokens: int = 1024
    """The most tokens of a pass."""
    prefill: float = 0.5
    """The most that prefills take of a pass's time while others decode."""
    training: float = 0.2
    """What training gets of the time while sessions are waiting too."""
    queue_length: int = 64
    """So many steps that need pages may wait for them; those who come after them are told to come back."""
    queue_seconds: float = 20.0
    """So long they wait at most."""
    waiting_bytes: int = 1 << 30
    """Inputs of single passes that are kept until their turn. Whoever comes with more is told to come back."""
    adapter_bytes: int = 1 << 30
    """Factors of clients' adapters that are kept, of all clients together."""
    activation_bytes: int = 1 << 31
    """What is kept of forward passes for backward passes; beyond, blocks are computed again."""
    activation_seconds: float = 120.0
    """So long at least."""

    def __post_init__(self) -> None:
        if not (0 <= self.prefill < 1 and 0 <= self.training <= 1):
            raise ValueError(
                f"shares of {self.prefill} and {self.training}: parts of the time, and prefill not all of it"
            )
