"""Sessions and their steps as the preemption policy sees them: which step is next, and which session gives way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from shoal.policy.preemption import Holder, preempted_for_new, preempted_for_running
from shoal.policy.scheduling import SchedulerOutput
from shoal.server.engine.requests import StepRequest
from shoal.server.kv.session_cache import SessionCache


def in_order(steps: Sequence[StepRequest], sessions: Collection[SessionCache]) -> Sequence[StepRequest]:
    """The steps as they came, but those that still wait for pages come after those of peers that hold fewer pages."""
    if sum(not step.session.running for step in steps) < 2:
        return steps
    held = Counter[str]()
    for session in sessions:
        held[session.peer] += len(session.pages)
    return sorted(steps, key=lambda step: 0 if step.session.running else held[step.session.peer])


def session_to_preempt(
    sessions: Collection[SessionCache], steps: Sequence[StepRequest], output: SchedulerOutput, *, now: float
) -> SessionCache | None:
    """The session that gives up its pages before there is a pass of these steps, if one has to or should.

    Its client sends everything again, here or elsewhere. The session may have been given pages that were known already,
    and have asked for nothing since.
    """
    if not output.short_of_pages and output.kept_out is None:
        return None
    holding = [session for session in sessions if session.pages]
    at_work = {step.session for step in steps}
    holders = [_holder(session, at_work=session in at_work) for session in holding]
    if output.short_of_pages:
        return holding[preempted_for_running(holders, now=now)]
    assert output.kept_out is not None
    index, num_missing = output.kept_out
    step = steps[index]
    others = [number for number, session in enumerate(holding) if session is not step.session]
    found = preempted_for_new(
        [holders[number] for number in others],
        peer=step.session.peer,
        num_pages=step.view().num_pages(step.num_left),
        num_missing=num_missing,
        waited=now - step.arrived_at,
        now=now,
    )
    return None if found is None else holding[others[found]]


def _holder(session: SessionCache, *, at_work: bool) -> Holder:
    return Holder(
        session.peer,
        len(set(session.pages)),
        used_at=session.used_at,
        began_at=session.began_at,
        opened=session.opened,
        at_work=at_work,
    )
