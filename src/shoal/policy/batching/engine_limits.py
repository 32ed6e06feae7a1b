"""How a server divides its compute time and its memory among clients."""

from __future__ import annotations

from dataclasses import dataclass

RECHECK_SECONDS = 0.003
"""How often the loop reconsiders whether ready steps should wait for others: a fraction of the fastest pass."""
IDLE_CHECK_SECONDS = 1.0
"""How often steps that wait for pages are reconsidered without news: sessions become idle without saying so."""
RECENTLY_DECODED_SECONDS = 0.5
"""After a decoding pass, sessions count as decoding for this long, although none of their steps waits: a client needs
about this long at most to send its next token."""


@dataclass(frozen=True)
class Limits:
    """What an operator may set about who computes when, and how much may wait."""

    max_num_batched_tokens: int = 1024
    """The tokens of one pass, of all sessions together. A step that is larger gets a pass for itself."""
    prefill: float = 0.5
    """The part of a pass's time that prefills may take while other sessions decode: 0 up to, but not, 1."""
    training: float = 0.2
    """The part of the time that training gets while sessions wait too: 0 to 1."""
    queue_length: int = 64
    """The steps that may wait for pages. A client whose step comes later is told to come back."""
    queue_seconds: float = 20.0
    """How long a step may wait for pages before its client is told to come back."""
    queued_passes: int = 64
    """The single passes of one network that may wait. A client whose pass comes later is told to come back."""
    waiting_bytes: int = 1 << 30
    """The inputs of single passes that wait for their turn. A client with more is told to come back."""
    adapter_bytes: int = 1 << 30
    """The factors of all clients' adapters that the server keeps."""
    activation_bytes: int = 1 << 31
    """What the server saves of forward passes for backward passes; beyond that, it computes blocks again."""
    activation_seconds: float = 120.0
    """How long a forward pass is saved at least, while its client has a stream to the server."""

    def __post_init__(self) -> None:
        if not (0 <= self.prefill < 1 and 0 <= self.training <= 1):
            raise ValueError(
                f"shares of {self.prefill} and {self.training}: parts of the time, and prefill not all of it"
            )
