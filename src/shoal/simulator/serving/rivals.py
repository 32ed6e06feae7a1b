"""The rules of other serving systems, as far as they are rules: pure functions of an `EngineView`, like the live ones.

They choose among the steps of remote clients, which arrive one at a time, so a rule cannot compute a session's next
token before its client has sent it. To preempt is to take pages, as everywhere here: systems that move pages to the
host's memory instead (FastServe) have no such memory here, and their sessions are computed again.

The `session` of each request has to be a `SimulatedHolder`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoal.policy.batching.pass_rules import Choice, EngineView
from shoal.policy.batching.preemption import Holder
from shoal.policy.batching.scheduling import RequestView
from shoal.simulator.serving.one_server import SimulatedHolder

WATERMARK = 0.01
"""The part of the pages that stay free when a session begins under `paging`."""


def run_to_completion(view: EngineView) -> Choice:
    """Batches of requests, each run to its end before the next one begins (as in FasterTransformer).

    The server reserves pages for the longest answer that each client allows, and takes jobs into a batch in the order
    of arrival while there is room. Whole prompts are computed in the first pass.
    """
    if any(holder.running for holder in view.holders):
        return Choice(tuple((index, view.requests[index].num_tokens) for index in _running(view)))
    return Choice(tuple((index, view.requests[index].num_tokens) for index in _that_fit(view, math.inf)))


def iteration_level(view: EngineView) -> Choice:
    """A batch that sessions join and leave after each pass, in the order of arrival (ORCA, OSDI 2022).

    The server reserves pages for the longest answer that each client allows. Whole prompts are computed beside
    decoding steps.
    """
    chosen = [*_running(view), *_that_fit(view, view.max_num_batched_tokens)]
    return Choice(tuple((index, view.requests[index].num_tokens) for index in chosen))


def paging(view: EngineView) -> Choice:
    """Pages as sessions grow; first come, first served (vLLM, arXiv 2309.06180).

    A pass computes whole prompts that there are pages for, or else decodes. The session that gives way is the one
    whose client came last; it comes back to its old place.
    """
    is_empty = not any(holder.running for holder in view.holders)
    free = view.num_free_pages - (0 if is_empty else math.ceil(WATERMARK * view.num_pages))
    chosen: list[int] = []
    room = view.max_num_batched_tokens
    for index in _waiting(view):
        request = view.requests[index]
        needed = request.num_pages(request.num_tokens)
        if needed > free or (chosen and request.num_tokens > room):
            break
        chosen.append(index)
        free -= needed
        room -= request.num_tokens
    if chosen:
        return Choice(tuple((index, view.requests[index].num_tokens) for index in chosen))
    free = view.num_free_pages
    for index in sorted(_running(view), key=lambda each: _place(_session(view.requests[each]))):
        request = view.requests[index]
        needed = request.num_pages(request.num_tokens)
        if needed > free:
            last = max(range(len(view.holders)), key=lambda each: _place(view.holders[each]))
            return Choice(preempted=last)
        chosen.append(index)
        free -= needed
    return Choice(tuple((index, view.requests[index].num_tokens) for index in chosen))


@dataclass(frozen=True)
class SkipJoinQueues:
    """A multi-level feedback queue that jobs join at the level of their first pass (FastServe, arXiv 2305.05920).

    Level i has a quantum of `quantum_seconds · 2^i` of passes. A job begins at the first level whose quantum is not
    less than the time of its prompt, and goes down a level when it has used up the quantum of its own. A pass takes the
    `max_rows` steps of highest priority, whole. A step that has waited `promote_seconds` has the highest priority. A
    session that cannot go on, or was promoted, takes the pages of those of lower priority, the
    lowest first; other new ones wait for free pages. FastServe has the host's memory for sessions that make room: if
    new jobs made all others be computed again, little else would be computed.
    """

    quantum_seconds: float
    token_seconds: float
    max_rows: int = 64
    promote_seconds: float = 30.0
    num_levels: int = 12

    def __call__(self, view: EngineView) -> Choice:
        order = sorted(
            range(len(view.requests)), key=lambda index: self._priority_of_request(view.requests[index], view.now)
        )
        chosen: list[int] = []
        free = view.num_free_pages
        for index in order:
            if len(chosen) == self.max_rows:
                break
            request = view.requests[index]
            needed = request.num_pages(request.num_tokens)
            if needed > free:
                kept = [_session(view.requests[each]).opened for each in (*chosen, index)]
                lower = self._lowest(view, request, kept) if self._may_take_pages(request, view.now) else None
                if lower is not None:
                    return Choice(preempted=lower)
                continue
            chosen.append(index)
            free -= needed
        return Choice(tuple((index, view.requests[index].num_tokens) for index in chosen))

    def _may_take_pages(self, request: RequestView, now: float) -> bool:
        return request.running or now - request.arrived_at >= self.promote_seconds

    def level(self, session: SimulatedHolder) -> int:
        """The level of a session, from the length of its first step and the seconds of passes that it has had."""
        waited_long = session.began_at - session.since >= self.promote_seconds
        level = 0 if waited_long else self._first_level(session.first_tokens * self.token_seconds)
        used = session.service_seconds
        while level < self.num_levels - 1 and used >= self.quantum_seconds * 2**level:
            used -= self.quantum_seconds * 2**level
            level += 1
        return level

    def _first_level(self, seconds: float) -> int:
        levels = range(self.num_levels - 1)
        return next((level for level in levels if self.quantum_seconds * 2**level >= seconds), self.num_levels - 1)

    def _priority(self, session: Holder) -> tuple[int, float, int]:
        assert isinstance(session, SimulatedHolder)
        return (self.level(session), *_place(session))

    def _priority_of_request(self, request: RequestView, now: float) -> tuple[int, float, int]:
        session = _session(request)
        if now - request.arrived_at >= self.promote_seconds:
            return (-1, *_place(session))
        return self._priority(session)

    def _lowest(self, view: EngineView, request: RequestView, kept: Sequence[int]) -> int | None:
        """The session of lowest priority that holds pages, if that is lower than the request's, and not `kept`."""
        above = self._priority_of_request(request, view.now)
        priorities = [(self._priority(holder), index) for index, holder in enumerate(view.holders)]
        lower = [each for each in priorities if each[0] > above and view.holders[each[1]].opened not in kept]
        return max(lower)[1] if lower else None


def _running(view: EngineView) -> list[int]:
    return [index for index, request in enumerate(view.requests) if request.running]


def _waiting(view: EngineView) -> list[int]:
    """The requests that have not begun, in the order in which their clients came."""
    waiting = [index for index, request in enumerate(view.requests) if not request.running]
    return sorted(waiting, key=lambda index: _place(_session(view.requests[index])))


def _that_fit(view: EngineView, max_tokens: float) -> Iterable[int]:
    """The first requests in the order of arrival for whose longest answers there is room beside all reserved pages."""
    left = view.num_pages - sum(_reserved(view.holders))
    room = max_tokens
    for number, index in enumerate(_waiting(view)):
        request = view.requests[index]
        (needed,) = _reserved([_session(request)])
        if needed > left or (number and request.num_tokens > room):
            return
        left -= needed
        room -= request.num_tokens
        yield index


def _reserved(holders: Sequence[Holder]) -> list[int]:
    return [holder.reserved_pages for holder in holders if isinstance(holder, SimulatedHolder)]


def _place(session: Holder) -> tuple[float, int]:
    return session.since, session.opened


def _session(request: RequestView) -> Holder:
    assert request.session is not None
    return request.session
