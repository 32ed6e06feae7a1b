"""What happens in a client or a server, as frozen events, and the observers that are told of it.

`Observers.emit` is called on the event loop and returns at once: each observer is called on its own thread, behind a
bounded queue. An observer that raises is logged once and told nothing more. The log is an observer too, and the only
one that is called directly.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shoal.spans import Span

log = logging.getLogger(__name__)

MAX_QUEUED = 1024
"""Events that wait for one observer. Later ones are dropped, so that an observer that hangs takes no more memory."""
CLOSE_SECONDS = 1.0
"""How long an observer may take for the events that are left when its client or server closes."""


@dataclass(frozen=True)
class RouteChosen:
    """The client chose servers for a span. `seconds` is what a step is expected to take, from end to end."""

    model: str
    span: Span
    servers: tuple[tuple[str, Span], ...]
    """Peer ids, each with the blocks that it shall compute, in order."""
    seconds: float
    explain: Callable[[], str] = field(compare=False)
    """Makes a line that says where the time is expected to go."""

    @property
    def line(self) -> str:
        """The event in a line for people."""
        return f"blocks {self.span}: {self.explain()}"


@dataclass(frozen=True)
class ServerLost:
    """A server vanished, fell silent or broke the protocol while the client used it."""

    peer: str
    reason: str


@dataclass(frozen=True)
class StageReplaced:
    """Other servers took over a stage of a session: warm standby servers, or servers that replay its history."""

    peer: str
    """The server that was replaced."""
    replacements: tuple[str, ...]


@dataclass(frozen=True)
class WaitingForBlocks:
    """A client cannot go on, because no server computes `blocks` now, and waits until one does.

    It is told when the wait begins, when there is news, and every 15 s. `expected_seconds` is when the servers that are
    loading the blocks say that they will be ready; `None` if none says so. The client has waited for `waited_seconds`,
    and gives up after `patience_seconds` without these blocks.
    """

    model: str
    blocks: tuple[int, ...]
    reason: str
    """What is missing, and who is loading it."""
    expected_seconds: float | None
    waited_seconds: float
    patience_seconds: float

    @property
    def line(self) -> str:
        """One line for people."""
        start = f"waiting for {self.waited_seconds:.0f} s: " if self.waited_seconds >= 1 else "waiting: "
        return f"{start}{self.reason} (for {self.patience_seconds:.0f} s at most)"


@dataclass(frozen=True)
class WaitEnded:
    """A client waits no more, after `waited_seconds`. Unless it `goes_on`, it has given up or was interrupted."""

    model: str
    blocks: tuple[int, ...]
    waited_seconds: float
    goes_on: bool

    @property
    def line(self) -> str:
        """The event in a line for people."""
        if self.goes_on:
            return f"going on after a wait of {self.waited_seconds:.0f} s"
        return f"not waiting any more, after {self.waited_seconds:.0f} s"


@dataclass(frozen=True)
class ServerAudited:
    """Other servers computed too what a server has answered for `num_tokens` tokens of the blocks of `span`.

    `distance` is how far it was from what the first of the `witnesses` computed, typically, in units of what the blocks
    change; that of gradients is relative to them. The `finding` is one of "clean", "lied", "witness_lied", "misled" and
    "unsettled" (`shoal.policy.audits.verdict`).
    """

    peer: str
    span: Span
    num_tokens: int
    distance: float
    finding: str
    witnesses: tuple[str, ...]


@dataclass(frozen=True)
class TextDoubtful:
    """The outputs of a session's tokens from `start` to `end` are not to be trusted, so neither is what was chosen from
    them: the tokens after each. What follows is computed from right ones, if there is a server that gives them.
    """

    session: int
    model: str
    start: int
    end: int
    reason: str

    @property
    def line(self) -> str:
        """The event in a line for people."""
        return f"the last {self.end - self.start} tokens may be wrong: {self.reason}"


@dataclass(frozen=True)
class PassesDoubtful:
    """What a server computed in `num_passes` passes without a cache, of training for example, is not to be trusted.

    They are the forward ones since its last clean audit of a forward pass, and the same for backward ones. The audited
    pass itself is right, unless the servers only differ.
    """

    model: str
    peer: str
    num_passes: int
    reason: str

    @property
    def line(self) -> str:
        """The event in a line for people."""
        return f"up to {self.num_passes} passes of {self.peer} may be wrong, and the training with them: {self.reason}"


@dataclass(frozen=True)
class SessionOpened:
    """A client's session chose its first servers. `session` tells apart the sessions that are open at one time."""

    session: int
    model: str
    span: Span
    batch_size: int


@dataclass(frozen=True)
class SessionClosed:
    """A client's session ended, after `num_tokens` tokens of each sequence."""

    session: int
    model: str
    num_tokens: int


@dataclass(frozen=True)
class PassComputed:
    """A server computed one pass over the blocks of `span`, for the steps of `num_requests` sessions.

    `num_tokens` counts those of all sequences. `seconds` is the time of the pass, without what its steps waited before.
    """

    span: Span
    num_requests: int
    num_tokens: int
    seconds: float


@dataclass(frozen=True)
class BlocksChanged:
    """A server holds other blocks than before; `before` is `None` when it starts, `now` when it ends."""

    before: Span | None
    now: Span | None
    reason: str = ""
    """Why it took these blocks, or let them go."""


@dataclass(frozen=True)
class AdapterStored:
    """A server stored a client's adapter of `num_bytes` bytes for its blocks."""

    peer: str
    """The client's peer id."""
    name: str
    num_bytes: int


Event = (
    RouteChosen
    | ServerLost
    | StageReplaced
    | WaitingForBlocks
    | WaitEnded
    | ServerAudited
    | TextDoubtful
    | PassesDoubtful
    | SessionOpened
    | SessionClosed
    | PassComputed
    | BlocksChanged
    | AdapterStored
)

Observer = Callable[[Event], None]
"""What is told of events. It is called with one event at a time, in the order in which they happened."""


class LogObserver:
    """Writes a line for each event. It formats nothing that the log's level leaves out."""

    def __call__(self, event: Event) -> None:
        match event:
            case RouteChosen() if log.isEnabledFor(logging.INFO):
                log.info("%s", event.line)
            case ServerLost(reason=reason):
                log.warning("%s; looking for another server", reason)
            case StageReplaced(peer=peer, replacements=replacements) if log.isEnabledFor(logging.INFO):
                log.info("%s replaced by %s", peer, ", ".join(replacements))
            case ServerAudited(peer=peer, span=span, num_tokens=num_tokens, distance=distance, finding=finding):
                log.debug("audit of %s, blocks %s, %d tokens: %s, %.3g", peer, span, num_tokens, finding, distance)
            case WaitingForBlocks() | WaitEnded() | TextDoubtful() | PassesDoubtful():
                log.warning("%s", event.line)
            case SessionOpened(model=model, span=span, batch_size=batch_size):
                log.debug("a session of %d sequences on blocks %s of %s", batch_size, span, model)
            case SessionClosed(model=model, num_tokens=num_tokens):
                log.debug("a session of %s ended after %d tokens", model, num_tokens)
            case PassComputed(num_requests=num_requests, num_tokens=num_tokens, seconds=seconds):
                log.debug("%d requests, %d tokens: %.3g s", num_requests, num_tokens, seconds)
            case BlocksChanged(before=before, now=now, reason=reason):
                log.info("blocks %s, before: %s; %s", now, before, reason)
            case AdapterStored(peer=peer, name=name, num_bytes=num_bytes):
                log.info("adapter %s of %s stored, %d bytes", name, peer, num_bytes)


class Observers:
    """Tells observers of events, each on its own thread, which starts with its first event.

    `direct` are called by `emit` itself: for those that return at once, such as the log, or a simulator that needs all
    events in one order.
    """

    def __init__(self, observers: Sequence[Observer] = (), *, direct: Sequence[Observer] | None = None) -> None:
        self._direct: list[Observer] = [LogObserver()] if direct is None else list(direct)
        self._queues = [_Queue(observer) for observer in observers]

    def emit(self, event: Event) -> None:
        """Tell all of them. Never raises, and never waits for a queued observer."""
        for observer in tuple(self._direct):
            try:
                observer(event)
            except Exception:  # whatever an observer does, the one who tells of the event goes on
                _report(observer)
                self._direct.remove(observer)
        for queue in self._queues:
            queue.put(event)

    async def close(self) -> None:
        """Let the observers see what was emitted, for up to `CLOSE_SECONDS`, and end their threads."""
        await asyncio.gather(*(asyncio.to_thread(queue.close) for queue in self._queues))


class _Queue:
    """The events that wait for one observer, and its thread."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._events: deque[Event] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._has_dropped = False

    def put(self, event: Event) -> None:
        with self._changed:
            if self._is_closed:
                return
            if len(self._events) >= MAX_QUEUED:
                if not self._has_dropped:
                    log.warning("the observer %r is too slow: it misses events", self._observer)
                self._has_dropped = True
                return
            self._events.append(event)
            if self._thread is None:
                self._thread = threading.Thread(target=self._deliver, name="shoal-observer", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _deliver(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._events or self._is_closed)
                if not self._events:
                    return
                event = self._events.popleft()
            try:
                self._observer(event)
            except Exception:  # the same: this observer is told nothing more
                _report(self._observer)
                with self._changed:
                    self._is_closed = True
                    self._events.clear()
                return

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)


def _report(observer: Observer) -> None:
    log.exception("the observer %r failed and is told nothing more", observer)
