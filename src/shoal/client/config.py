"""What a client is told at its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.protocol import Encoding


@dataclass(frozen=True)
class ClientConfig:
    """How a client chooses its servers and how long it waits for them. Times are in seconds."""

    allowed_servers: frozenset[str] | None = None
    """Use these peers only; `None` allows all."""
    blocked_servers: frozenset[str] = frozenset()
    salt: str = ""
    """Servers share what they have computed of equal beginnings among sessions of equal salts only."""
    silence_seconds: float = 5.0
    """A server that computes says so every second; one that is silent for so long is lost."""
    longest_answer_seconds: float = 300.0
    """A server that says for so long that it is working on one request does not mean it."""
    patience_seconds: float = 30.0
    """How long to look for servers in place of those that were lost, or wait for those that are busy."""
    refresh_seconds: float = 20.0
    """The age at which a picture of the swarm is taken anew."""
    remote_head: bool = False
    """Let the last server compute the output head in sessions, if any offers to."""
    head_top_k: int | None = None
    """Ask it for the logits of so many of the likeliest tokens only."""
    standby: bool = False
    """Keep a second server warm for each that a session is on: a failure then costs a step, and no replay."""
    wire: Encoding = "raw"
    """How hidden states and gradients travel. Whatever else than raw loses precision, so only the user chooses it."""

    @classmethod
    def choosing(
        cls,
        allowed: Sequence[str] | None,
        blocked: Sequence[str] | None,
        *,
        wire: Encoding = "raw",
        standby: bool = False,
        remote_head: bool = False,
        head_top_k: int | None = None,
    ) -> ClientConfig:
        """The default, with the user's lists of servers and what the user wants of them."""
        return cls(
            allowed_servers=None if allowed is None else frozenset(allowed),
            blocked_servers=frozenset(blocked or ()),
            wire=wire,
            standby=standby,
            remote_head=remote_head,
            head_top_k=head_top_k,
        )
