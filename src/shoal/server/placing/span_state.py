"""Which blocks a server holds and which it is about to hold: a value with named transitions, without I/O.

    choosing ──claimed──> claiming ──confirmed──> loading ──loaded──> serving <──────────────┐
       ^                   │ unclaimed               │  ^               │ claimed             │ unclaimed
       └───────────────────┘                         │  │ drained       v                     │
       ^                                       failed│  │            claiming ────────────────┤
       └─────────────────────────────────────────────┘  └─ draining <──┤ confirmed           │
                                                                       └─────> extending ────┘ loaded, failed, unclaimed

A server that keeps some of its blocks, and has room for the others beside them, *extends*: it serves what it holds
until it has loaded what is missing. Another one drains first. A server that fails to load goes back to the blocks that
it had before, if there are any and they have not failed too. From every phase it can leave the swarm, which is the end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Self

from shoal.peers import ServerState
from shoal.policy.placement.joining import Placed
from shoal.spans import Span

AVOIDED_SECONDS = 600.0
"""How long a server does not try again to load blocks that it could not load: what was in the way may stay for long."""


class SpanPhase(StrEnum):
    """What a server is doing about its blocks."""

    CHOOSING = "choosing"  # it has none, and has claimed none
    CLAIMING = "claiming"  # it has announced which blocks it wants, and looks at what others have announced
    DRAINING = "draining"  # its clients take their sessions elsewhere
    LOADING = "loading"
    SERVING = "serving"
    EXTENDING = "extending"  # it serves, and loads what it lacks of other blocks
    LEAVING = "leaving"


@dataclass(frozen=True)
class SpanState:
    """The blocks of a server and its phase.

    `held` is what it holds and answers for, with the reason for which it took these blocks; `wanted` is what it has
    claimed or loads. `before` is what it held until now, while it loads other blocks. `ready_at` is the Unix time at
    which the wanted blocks are expected to be served, `None` before the claim is confirmed. Until the Unix times in
    `avoided`, it does not load these spans. `last` is the span that it announced last.
    """

    phase: SpanPhase = SpanPhase.CHOOSING
    held: Placed | None = None
    wanted: Placed | None = None
    before: Placed | None = None
    ready_at: float | None = None
    avoided: tuple[tuple[Span, float], ...] = ()
    last: Span | None = None

    @property
    def answers(self) -> bool:
        """Whether requests for the held blocks are computed."""
        return self.held is not None and self.phase is not SpanPhase.LEAVING

    @property
    def announced(self) -> tuple[Span, ServerState] | None:
        """The span and the state to announce; `None` if there was never anything to announce."""
        match self.phase:
            case SpanPhase.SERVING | SpanPhase.EXTENDING:
                assert self.held is not None
                return self.held.span, ServerState.ONLINE
            case SpanPhase.CLAIMING if self.held is not None:
                return self.held.span, ServerState.ONLINE
            case SpanPhase.CLAIMING | SpanPhase.DRAINING | SpanPhase.LOADING:
                assert self.wanted is not None
                return self.wanted.span, ServerState.JOINING
            case _:
                return None if self.last is None else (self.last, ServerState.LEAVING)

    @property
    def wants(self) -> Span | None:
        """The blocks to announce beside those that it serves: it has claimed them, or loads them."""
        is_online = self.announced is not None and self.announced[1] is ServerState.ONLINE
        return self.wanted.span if is_online and self.wanted is not None else None

    @property
    def reason(self) -> str:
        """Why it took, or takes, the announced blocks, or those that it wants."""
        placed = self.wanted or self.held
        return "" if placed is None else placed.reason

    def avoids(self, span: Span, *, now: float) -> bool:
        """Whether it could not load this span, or a part of it that it tried, not long ago."""
        return any(until > now and failed in span for failed, until in self.avoided)

    def is_resting(self, *, now: float) -> bool:
        """Whether it should not go to other blocks, because it could not load some not long ago.

        Others then do what the plan of all would have it do.
        """
        return any(until > now for _, until in self.avoided)

    # -- transitions: each raises `ValueError` in a phase that does not allow it --------------------------------------

    def claimed(self, wanted: Placed) -> Self:
        """It wants these blocks, and looks whether others want them too. A claim may replace an earlier one."""
        self._check(SpanPhase.CHOOSING, SpanPhase.CLAIMING, SpanPhase.SERVING)
        last = wanted.span if self.held is None else self.held.span
        return replace(self, phase=SpanPhase.CLAIMING, wanted=wanted, ready_at=None, last=last)

    def unclaimed(self) -> Self:
        """It gives the claim up: it stays with what it holds, or has to choose again."""
        self._check(SpanPhase.CLAIMING, SpanPhase.EXTENDING)
        phase = SpanPhase.CHOOSING if self.held is None else SpanPhase.SERVING
        return replace(self, phase=phase, wanted=None, ready_at=None)

    def confirmed(self, *, ready_at: float, extends: bool = False) -> Self:
        """The claim stands: it loads the blocks.

        If it holds others, it lets its clients go first, unless it `extends` what it holds.
        """
        self._check(SpanPhase.CLAIMING)
        assert self.wanted is not None
        goes = SpanPhase.EXTENDING if extends else SpanPhase.DRAINING
        phase = SpanPhase.LOADING if self.held is None else goes
        last = self.last if phase is SpanPhase.EXTENDING else self.wanted.span
        return replace(self, phase=phase, ready_at=ready_at, last=last)

    def drained(self) -> Self:
        """Its clients are gone, and so are its blocks: it loads the new ones."""
        self._check(SpanPhase.DRAINING)
        return replace(self, phase=SpanPhase.LOADING, before=self.held, held=None)

    def loaded(self) -> Self:
        """It holds the wanted blocks, and answers."""
        self._check(SpanPhase.LOADING, SpanPhase.EXTENDING)
        assert self.wanted is not None
        return replace(
            self,
            phase=SpanPhase.SERVING,
            held=self.wanted,
            wanted=None,
            before=None,
            ready_at=None,
            last=self.wanted.span,
        )

    def failed(self, why: str, *, now: float) -> Self:
        """The wanted blocks could not be loaded.

        It goes on with those that it holds, loads those again that it had before, or has to choose others.
        """
        self._check(SpanPhase.LOADING, SpanPhase.EXTENDING)
        assert self.wanted is not None
        failed = self.wanted.span
        kept = tuple((span, until) for span, until in self.avoided if until > now and span != failed)
        state = replace(self, avoided=(*kept, (failed, now + AVOIDED_SECONDS)), before=None)
        if self.phase is SpanPhase.EXTENDING:
            return replace(state, phase=SpanPhase.SERVING, wanted=None, ready_at=None)
        if self.before is None or any(span == self.before.span for span, _ in kept):
            return replace(state, phase=SpanPhase.CHOOSING, wanted=None, ready_at=None)
        back = Placed(self.before.span, f"back from {failed}: {why}")
        return replace(state, wanted=back, last=back.span)

    def leaving(self) -> Self:
        """It leaves the swarm."""
        return replace(self, phase=SpanPhase.LEAVING)

    def _check(self, *allowed: SpanPhase) -> None:
        if self.phase not in allowed:
            raise ValueError(f"not possible while {self.phase.value}")
