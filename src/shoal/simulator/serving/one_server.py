"""The simulated server: what `shoal.server.engine.loop` does, for sessions whose tokens are only counted.

The loop begins a pass as soon as there is one to compute, waits a little for steps that are expected, and looks again
when something has changed. Times of the live loop (`RECHECK_SECONDS` and others) and its functions of `shoal.policy`
are used as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shoal.policy.batching.compute_account import ComputeAccount, client_weights
from shoal.policy.batching.engine_limits import RECENTLY_DECODED_SECONDS, RECHECK_SECONDS
from shoal.policy.batching.pass_rules import EngineView, PassRule, Places
from shoal.policy.batching.pass_shares import PassShares, idle_seconds
from shoal.policy.batching.pass_times import PassLoad
from shoal.policy.batching.preemption import Holder
from shoal.policy.batching.scheduling import (
    DECODE_TOKENS,
    RequestView,
    batching_delay,
    prefill_budget,
    seconds_to_next,
    shortest_prefill_seconds,
)
from shoal.policy.batching.session_times import Rhythm
from shoal.simulator.serving.agenda import Agenda
from shoal.simulator.serving.generations import Generation
from shoal.simulator.serving.page_counts import PAGE_TOKENS, PageCounts, pages_for
from shoal.simulator.serving.server_setup import Part, ServerSetup


@dataclass(frozen=True)
class SimulatedHolder(Holder):
    """What rules of other systems know too: `first_tokens` of the session's first step, `reserved_pages` for the most
    tokens that its client allows, and the `service_seconds` of the passes that computed it."""

    first_tokens: int = 0
    reserved_pages: int = 0
    service_seconds: float = 0.0


@dataclass(eq=False)
class SimulatedSession:
    """A session: as `shoal.server.kv.session_cache.SessionCache`, but its pages are only counted."""

    job: Generation
    opened: int
    num_tokens: int
    num_pages: int
    used_at: float
    began_at: float
    since: float
    running: bool = False
    preempted: bool = False
    num_remote_pages: int = 0
    first_tokens: int = 0
    service_seconds: float = 0.0
    rhythm: Rhythm = field(default_factory=Rhythm)
    step: SimulatedStep | None = None

    def pages_needed(self, num_tokens: int) -> int:
        """How many pages `num_tokens` more tokens take."""
        return pages_for(self.num_tokens + num_tokens) - self.num_pages

    def holder(self) -> SimulatedHolder:
        """The session as rules see it."""
        return SimulatedHolder(
            self.job.peer,
            self.num_pages,
            self.used_at,
            self.began_at,
            self.opened,
            at_work=self.step is not None,
            since=self.since,
            running=self.running,
            first_tokens=self.first_tokens,
            reserved_pages=pages_for(self.job.max_tokens),
            service_seconds=self.service_seconds,
        )


@dataclass(eq=False)
class SimulatedStep:
    """A step that waits or is computed: `num_left` of its tokens are not computed yet."""

    session: SimulatedSession
    num_left: int
    arrived_at: float
    answer: Callable[[], None]
    refuse: Callable[[], None]

    @property
    def decodes(self) -> bool:
        """Whether it decodes, as `RequestView.decodes` has it."""
        return self.session.running and self.num_left <= DECODE_TOKENS

    def view(self, holder: Holder) -> RequestView:
        """The step as rules see it."""
        session = self.session
        return RequestView(
            1,
            self.num_left,
            session.running,
            session.pages_needed,
            arrived_at=self.arrived_at,
            session=holder,
            num_past=session.num_tokens,
        )


@dataclass(frozen=True)
class PassRecord:
    """A pass: when it began, how long it took, and the jobs in it with their numbers of tokens, in order."""

    began_at: float
    seconds: float
    parts: tuple[tuple[int, int], ...]


@dataclass
class Tally:
    """What has happened: sessions preempted that had begun, steps refused because there was no room, and for how long
    passes were computed."""

    num_preempted: int = 0
    num_busy: int = 0
    busy_seconds: float = 0.0


class OneServer:
    """Computes the steps of sessions, as a rule chooses. `on_pass` is called with each pass when it has ended."""

    def __init__(
        self,
        setup: ServerSetup,
        rule: PassRule,
        agenda: Agenda,
        *,
        on_pass: Callable[[PassRecord], None] = lambda record: None,
    ) -> None:
        self.pages = PageCounts(setup.num_pages, num_remote=setup.num_remote_pages)
        self.tally = Tally()
        self._setup = setup
        self._rule = rule
        self._agenda = agenda
        self._on_pass = on_pass
        self._sessions: list[SimulatedSession] = []
        self._steps: list[SimulatedStep] = []
        self._numbers = itertools.count()
        self._pass_time = setup.pass_time
        self._places = Places()
        self._account = ComputeAccount()
        self._resting_since: float | None = None  # that nothing can be computed although steps wait
        self._is_occupied = False  # with a pass, or with choosing one
        self._news = 0  # how often something has changed: a timer that was set before does not count

    # -- what clients ask for -----------------------------------------------------------------------------------------

    def open(self, job: Generation) -> SimulatedSession:
        """A new session, with the pages that are kept of its job."""
        now, known = self._agenda.now, self.pages.find(job.number)
        session = SimulatedSession(job, next(self._numbers), known * PAGE_TOKENS, known, now, now, now)
        self._sessions.append(session)
        return session

    def submit(
        self, session: SimulatedSession, num_tokens: int, *, answer: Callable[[], None], refuse: Callable[[], None]
    ) -> None:
        """Compute more tokens of a session, and call `answer`, or `refuse`."""
        limits, now = self._setup.limits, self._agenda.now
        if session.preempted:
            refuse()
            return
        if not session.running:
            if sum(not step.session.running for step in self._steps) >= limits.queue_length:
                self.tally.num_busy += 1
                refuse()
                return
            session.since = self._places.of(session.job.peer, now)
            self._places = self._places.taken(session.job.peer)
            session.first_tokens = num_tokens
        step = SimulatedStep(session, num_tokens, now, answer, refuse)
        session.step, session.used_at = step, now
        session.rhythm = session.rhythm.after_arrival(now, decodes=step.decodes)
        self._steps.append(step)
        self._agenda.after(limits.queue_seconds, lambda: self._give_up(step))
        self._wake()

    def close(self, session: SimulatedSession) -> None:
        """Release a session's pages."""
        self._release(session)
        self._sessions.remove(session)
        self._wake()

    def check(self) -> None:
        """Raise `AssertionError` unless every page is held once, or is free."""
        self.pages.check(sum(session.num_pages for session in self._sessions))

    def _release(self, session: SimulatedSession) -> None:
        self.pages.release(
            session.job.number,
            num_pages=session.num_pages,
            num_full=session.num_tokens // PAGE_TOKENS,
            num_remote=session.num_remote_pages,
        )
        session.num_pages = session.num_remote_pages = session.num_tokens = 0
        session.running = False

    def _give_up(self, step: SimulatedStep) -> None:
        if step.session.step is step and not step.session.running:
            self.tally.num_busy += 1
            self._refuse(step.session)

    def _preempt(self, session: SimulatedSession) -> None:
        self.tally.num_preempted += session.running
        session.preempted = True
        self._refuse(session)
        self._release(session)

    def _refuse(self, session: SimulatedSession) -> None:
        """The client has to come back, now or when it sends its next step, and keeps its place until then."""
        now = self._agenda.now
        self._places = self._places.told_to_come_back(session.job.peer, since=session.since, now=now)
        if session.step is not None:
            step, session.step = session.step, None
            self._steps.remove(step)
            self._agenda.after(0.0, step.refuse)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Something has changed."""
        self._news += 1
        if not self._is_occupied:
            self._iterate()

    def _look_again(self, seconds: float) -> None:
        news = self._news
        self._agenda.after(seconds, lambda: self._iterate() if news == self._news and not self._is_occupied else None)

    def _iterate(self) -> None:
        """Begin a pass if there is one to begin; otherwise wait for news, or for a time."""
        self._news += 1
        if self._resting_since is not None:
            seconds, self._resting_since = self._agenda.now - self._resting_since, None
            self._account = self._account.after_waiting(seconds, present=self._present())
        if not self._steps:
            self._resting_since = self._agenda.now
            return
        if wait := self._batching_delay():
            self._look_again(min(wait, RECHECK_SECONDS))
            return
        chunks, shares = self._choose()
        if chunks:
            self._begin_pass(chunks, shares)
        else:
            self._resting_since = self._agenda.now
            self._look_again(idle_seconds(self._account.debts))

    def _choose(self) -> tuple[list[tuple[SimulatedStep, int]], PassShares]:
        """The steps of the next pass, each with how many of its tokens are computed. Pages are taken if need be."""
        self._is_occupied = True
        while True:
            steps = list(self._steps)
            holding = [session for session in self._sessions if session.num_pages]
            choice = self._rule(self._view(steps, holding))
            if choice.preempted is None:
                break
            self._preempt(holding[choice.preempted])
        self._is_occupied = False
        return [(steps[index], num_tokens) for index, num_tokens in choice.chunks], choice.shares

    def _view(self, steps: Sequence[SimulatedStep], holding: Sequence[SimulatedSession]) -> EngineView:
        holders = {session.opened: session.holder() for session in holding}
        requests = [step.view(holders.get(step.session.opened) or step.session.holder()) for step in steps]
        limits, waiting = self._setup.limits, {step.session.job.peer for step in steps}
        return EngineView(
            requests=requests,
            holders=list(holders.values()),
            num_pages=self.pages.num_pages,
            num_free_pages=self.pages.num_available,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            prefill=prefill_budget(
                self._pass_time, requests, limits=limits, is_decoding=self._is_decoding, next_in=self._seconds_to_next()
            ),
            now=self._agenda.now,
            sharing=self._account.sharing(
                self._pass_time,
                away=self._present() - waiting,
                next_in=self._seconds_to_next(),
                waiting=waiting,
                now=self._agenda.now,
            ),
        )

    def _begin_pass(self, chosen: Sequence[tuple[SimulatedStep, int]], shares: PassShares) -> None:
        now, present = self._agenda.now, self._present()
        works = [
            (step.session.job.peer, step.view(step.session.holder()).work(num_tokens)) for step, num_tokens in chosen
        ]
        work = PassLoad.total(each for _, each in works)
        parts: list[Part] = []
        for step, num_tokens in chosen:
            session = step.session
            if not session.running:
                session.began_at = now
            needed = session.pages_needed(num_tokens)
            session.num_remote_pages += self.pages.take(needed)
            session.num_pages += needed
            session.running = True
            parts.append(Part(num_tokens, session.num_tokens, session.num_remote_pages))
        seconds = self._setup.seconds_of(parts)
        self._is_occupied = True

        def end() -> None:
            self._account = self._account.after_pass(
                works,
                self._agenda.now - now,
                shares=shares,
                pass_time=self._pass_time,
                present=present,
                queued={step.session.job.peer for step in self._steps if not step.decodes},
                now=self._agenda.now,
                recently=self._recently,
            )
            self._pass_time = self._pass_time.learnt(work, self._agenda.now - now)
            self._end_pass(chosen, PassRecord(now, seconds, _summary(chosen)))

        self._agenda.after(seconds, end)

    def _end_pass(self, chosen: Sequence[tuple[SimulatedStep, int]], record: PassRecord) -> None:
        self.tally.busy_seconds += record.seconds
        for step, num_tokens in chosen:
            session = step.session
            session.used_at = self._agenda.now
            session.num_tokens += num_tokens
            session.service_seconds += record.seconds
            step.num_left -= num_tokens
            if not step.num_left:
                session.step = None
                session.rhythm = session.rhythm.after_answer(self._agenda.now)
                self._steps.remove(step)
                self._agenda.after(0.0, step.answer)
        self._is_occupied = False
        self._on_pass(record)
        self._iterate()

    # -- how long to wait, and how much to take, as the live loop does ------------------------------------------------

    def _batching_delay(self) -> float:
        ready = [step.session.job.peer for step in self._steps if step.decodes]
        if not ready:
            least = shortest_prefill_seconds(
                self._pass_time, [step.view(step.session.holder()) for step in self._steps]
            )
            next_in = self._seconds_to_next()
            return next_in if self._is_decoding and next_in is not None and next_in < least else 0.0
        coming = [
            (session.rhythm.expected_at, session.job.peer)
            for session in self._sessions
            if session.step is None and session.rhythm.expected_at is not None
        ]
        num_ready, weights = client_weights(ready, [peer for _, peer in coming])
        return batching_delay(
            [expected_at for expected_at, _ in coming],
            num_ready=num_ready,
            now=self._agenda.now,
            pass_seconds=self._pass_time.decode_seconds,
            weights=weights,
        )

    def _seconds_to_next(self) -> float | None:
        expected = [each.rhythm.expected_at for each in self._sessions if each.rhythm.expected_at is not None]
        return seconds_to_next(expected, now=self._agenda.now)

    @property
    def _recently(self) -> float:
        return max(RECENTLY_DECODED_SECONDS, 4 * self._pass_time.decode_seconds)

    @property
    def _is_decoding(self) -> bool:
        return bool(self._account.decoding(now=self._agenda.now, recently=self._recently))

    def _present(self) -> frozenset[str]:
        """The clients whose steps wait, or that decoded a moment ago."""
        decoding = self._account.decoding(now=self._agenda.now, recently=self._recently)
        return decoding | {step.session.job.peer for step in self._steps}


def _summary(chosen: Sequence[tuple[SimulatedStep, int]]) -> tuple[tuple[int, int], ...]:
    return tuple((step.session.job.number, num_tokens) for step, num_tokens in chosen)
