"""Which gradients of factors are in which sums on servers: what a batch's backward pass still has to take from there.

A gradient counts where the client has used the answer of the pass that found it, and only there. If an answer is not
used, because the connection broke or other inputs were pushed, the server may or may not have added its gradients. Then
the sum is closed: later passes begin another one. When a sum is taken, it says of how many passes it is. If those are
more than the client has counted, the sum is of no use, as it is if the server is lost. What it should have had is then
computed again.
"""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from shoal.client.training.pass_plan import MicrobatchPiece
from shoal.policy.routing.route import Hop
from shoal.spans import Span


@dataclass(frozen=True)
class SummedPass:
    """A piece of the microbatch `number` whose gradients are in a sum, and the gradient [B, T, D] of its outputs."""

    number: int
    piece: MicrobatchPiece
    grad_BTD: torch.Tensor


@dataclass
class ServerSum:
    """A sum on the server of a hop, and the passes that the client counts in it."""

    name: str
    hop: Hop
    passes: list[SummedPass] = field(default_factory=list)

    def is_whole(self, *, num_microbatches: int) -> bool:
        """Whether all gradients of the batch for these blocks are in this one sum, which may be rounded then."""
        return len(self.passes) == num_microbatches


def _new_name() -> str:
    return secrets.token_hex(16)


class SumLedger:
    """The sums of one batch's backward pass, one for each server and span, more after failures."""

    def __init__(self, new_name: Callable[[], str] = _new_name) -> None:
        self._new_name = new_name
        self._open: dict[tuple[str, Span], str] = {}
        self._sums: dict[str, ServerSum] = {}

    def name_for(self, hop: Hop) -> str:
        """The name of the sum that the next pass on this hop goes into."""
        key = hop.server.peer, hop.span
        if key not in self._open:
            name = self._open[key] = self._new_name()
            self._sums[name] = ServerSum(name, hop)
        return self._open[key]

    def count(self, name: str, one: SummedPass) -> None:
        """The answer of a pass is used, and its gradients are in this sum."""
        self._sums[name].passes.append(one)

    def close(self, hops: Iterable[Hop]) -> None:
        """Passes on these hops were asked for, and their answers are not used: nothing more goes into their sums."""
        for hop in hops:
            self._open.pop((hop.server.peer, hop.span), None)

    @property
    def sums(self) -> Sequence[ServerSum]:
        """The sums that have anything, those of earlier blocks first, with their passes in the order of the batch."""
        found = [each for each in self._sums.values() if each.passes]
        for each in found:
            each.passes.sort(key=lambda one: one.number)
        return sorted(found, key=lambda each: (each.hop.span.start, each.hop.span.end, each.passes[0].number))
