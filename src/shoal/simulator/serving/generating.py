"""The clients of a simulated server: each sends a prompt, then one token after another, until it has its answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.errors import UserError
from shoal.policy.batching.pass_rules import PassRule
from shoal.simulator.serving.agenda import Agenda
from shoal.simulator.serving.generations import Generation
from shoal.simulator.serving.one_server import OneServer, PassRecord, SimulatedSession
from shoal.simulator.serving.page_counts import PAGE_TOKENS, pages_for
from shoal.simulator.serving.server_setup import ServerSetup


@dataclass(frozen=True)
class Completed:
    """How a generation went: when its first and its last token were computed, and how often it was refused."""

    job: Generation
    first_at: float
    ended_at: float
    num_refusals: int

    @property
    def completion_seconds(self) -> float:
        """From the arrival to the last token."""
        return self.ended_at - self.job.arrives_at

    @property
    def first_token_seconds(self) -> float:
        """From the arrival to the first token."""
        return self.first_at - self.job.arrives_at


@dataclass(frozen=True)
class Served:
    """All generations, in the order in which they ended, and what the server did.

    `num_tokens` are those that it computed, by job. `num_preempted` counts sessions that had begun, `num_busy` steps
    that were refused because others waited, or because they had waited too long.
    """

    completed: tuple[Completed, ...]
    seconds: float
    busy_seconds: float
    num_passes: int
    num_tokens: Counter[int]
    num_preempted: int
    num_busy: int

    @property
    def num_recomputed(self) -> int:
        """How many of the computed tokens had been computed before, for a session that lost its pages."""
        needed = sum(one.job.num_prompt + one.job.num_answer - 1 for one in self.completed)
        return self.num_tokens.total() - needed


class Client:
    """One generation: what the server lacks is sent in one step, and what it refuses is sent again."""

    def __init__(
        self,
        job: Generation,
        server: OneServer,
        agenda: Agenda,
        retry_seconds: float,
        done: Callable[[Completed], None],
    ) -> None:
        self._job = job
        self._server = server
        self._agenda = agenda
        self._retry_seconds = retry_seconds
        self._done = done
        self._away = job.seconds_away()
        self._num_answered = self._num_refusals = 0
        self._first_at = 0.0
        self._session: SimulatedSession | None = None

    def send(self) -> None:
        """Send all that the server lacks: at first the prompt, later one token, or everything again."""
        if self._session is None:
            self._session = self._server.open(self._job)
        num_inputs = self._job.num_prompt + self._num_answered
        num_lacking = num_inputs - self._session.num_tokens
        self._server.submit(self._session, num_lacking, answer=self._answered, refuse=self._refused)

    def _answered(self) -> None:
        self._num_answered += 1
        if self._num_answered == 1:
            self._first_at = self._agenda.now
        is_last = self._num_answered == self._job.num_answer
        if is_last:
            self._done(Completed(self._job, self._first_at, self._agenda.now, self._num_refusals))
        self._agenda.after(next(self._away), self._leave if is_last else self.send)

    def _refused(self) -> None:
        self._num_refusals += 1
        self._leave()
        self._agenda.after(self._retry_seconds, self.send)

    def _leave(self) -> None:
        assert self._session is not None
        self._server.close(self._session)
        self._session = None


def serve(
    jobs: Sequence[Generation],
    setup: ServerSetup,
    rule: PassRule,
    *,
    on_pass: Callable[[PassRecord], None] = lambda record: None,
    on_completed: Callable[[int], None] = lambda num_completed: None,
) -> Served:
    """Let a server compute all jobs. Time passes until the last one has its answer.

    `on_pass` is called with each pass, `on_completed` with the number of jobs that have ended. Raises `UserError` for
    a job that is larger than the cache.
    """
    _check_fits(jobs, setup)
    agenda = Agenda()
    completed: list[Completed] = []
    num_tokens = Counter[int]()
    num_passes = 0

    def count(record: PassRecord) -> None:
        nonlocal num_passes
        num_passes += 1
        for job, tokens in record.parts:
            num_tokens[job] += tokens
        server.check()
        on_pass(record)

    def done(one: Completed) -> None:
        completed.append(one)
        on_completed(len(completed))

    server = OneServer(setup, rule, agenda, on_pass=count)
    for job in jobs:
        agenda.at(job.arrives_at, Client(job, server, agenda, setup.retry_seconds, done).send)
    agenda.run(until=lambda: len(completed) == len(jobs))
    assert len(completed) == len(jobs), "jobs are left, and nothing will ever happen"
    return Served(
        tuple(completed),
        agenda.now,
        server.tally.busy_seconds,
        num_passes,
        num_tokens,
        server.tally.num_preempted,
        server.tally.num_busy,
    )


def _check_fits(jobs: Sequence[Generation], setup: ServerSetup) -> None:
    largest = max((job.max_tokens for job in jobs), default=0)
    if pages_for(largest) > setup.num_pages:
        raise UserError(
            f"a job of up to {largest:,} tokens can never fit into a cache of {setup.num_pages * PAGE_TOKENS:,} tokens",
            hint="--cache-tokens sets its size",
        )
