"""Sessions and their steps as the rules see them (`shoal.policy.batching.pass_rules`)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from shoal.policy.batching.engine_limits import Limits
from shoal.policy.batching.pass_rules import EngineView
from shoal.policy.batching.pass_shares import Sharing
from shoal.policy.batching.pass_times import PassTimeModel
from shoal.policy.batching.preemption import Holder
from shoal.policy.batching.scheduling import prefill_budget
from shoal.server.engine.requests import StepRequest
from shoal.server.kv.pages import PagePool
from shoal.server.kv.session_cache import SessionCache


def engine_view(
    steps: Sequence[StepRequest],
    holding: Sequence[SessionCache],
    pool: PagePool,
    *,
    limits: Limits,
    pass_time: PassTimeModel,
    is_decoding: bool,
    next_in: float | None,
    sharing: Sharing,
    now: float,
) -> EngineView:
    """What a rule chooses from: the steps that wait, and the sessions that are `holding` pages.

    A session may have been given pages that were known already, and have asked for nothing since. `is_decoding` says
    whether sessions decode, although none of their steps may wait; the next one is expected in `next_in` seconds.
    """
    at_work = {step.session for step in steps}
    holders = {session: _holder(session, sharing, at_work=session in at_work) for session in holding}
    requests = [
        replace(
            step.view(),
            arrived_at=step.arrived_at,
            session=holders.get(step.session) or _holder(step.session, sharing, at_work=True),
        )
        for step in steps
    ]
    return EngineView(
        requests=requests,
        holders=list(holders.values()),
        num_pages=pool.num_pages,
        num_free_pages=pool.num_available,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        prefill=prefill_budget(pass_time, requests, limits=limits, is_decoding=is_decoding, next_in=next_in),
        now=now,
        sharing=sharing,
    )


def holding_pages(sessions: Collection[SessionCache]) -> list[SessionCache]:
    """The sessions that hold pages. Any of them may be preempted."""
    return [session for session in sessions if any(row.pages for row in session.rows)]


def drop_snapshots_if_short(steps: Sequence[StepRequest], pool: PagePool) -> None:
    """Keep no states of running sessions for others, if there are no pages for the copies that these go on with."""
    running = [step for step in steps if step.session.running and step.session.has_states]
    if sum(step.session.pages_needed(step.num_left) for step in running) > pool.num_available:
        for step in running:
            step.session.drop_snapshots()


def _holder(session: SessionCache, sharing: Sharing, *, at_work: bool) -> Holder:
    one_row = len(session.rows) == 1  # whose pages are all different; counting them takes no time
    num_pages = len(session.rows[0].pages) if one_row else len(set(session.pages))
    return Holder(
        session.payer,
        num_pages + session.num_state_pages,
        used_at=session.times.used_at,
        began_at=session.times.began_at,
        opened=session.opened,
        at_work=at_work,
        since=session.times.since,
        running=session.running,
        weight=sharing.weight(session.payer),
    )
