"""Rules: which tokens a server computes next, and which session gives up its pages for them.

A rule is a pure function of what the server knows, an `EngineView`. The engine and the simulator call the same rules.
An operator chooses one by name (`RULES`, `shoal serve --scheduling`):

    fair         Pages are shared between peers. The session that gives way is one of the peer that holds most.
    first-come   The oldest sessions run to their end. The session that gives way is the one whose client came last,
                 and its client keeps its place. New sessions leave room for those that run to grow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shoal.errors import UserError
from shoal.policy.batching.pass_shares import PassShares, Sharing, pass_shares, payer_of, prompt_turns
from shoal.policy.batching.pass_times import PrefillBudget
from shoal.policy.batching.preemption import (
    Holder,
    of_the_largest,
    preempted_for_new,
    preempted_for_running,
    preempted_while_nobody_runs,
)
from shoal.policy.batching.scheduling import RequestView, SchedulerOutput, schedule

DEFAULT_RULE = "fair"
ROOM_TO_GROW = 1
"""Pages that stay free for each running session when another one begins (`first_come`)."""
LARGE_SHARE = 0.25
"""A peer whose sessions hold more than this part of all pages yields first, whenever it came (`first_come`)."""
PLACE_SECONDS = 60.0
"""How long a client that was told to come back keeps its place. Clients are told to come back in two seconds."""
MAX_PLACES = 1024
"""The most places that a server keeps."""


@dataclass(frozen=True)
class EngineView:
    """What a server knows when it chooses its next pass.

    The `requests` are the steps that wait, in order of arrival, each with its `session`; the `holders` are the sessions
    that hold pages. A pass has at most `max_num_batched_tokens` tokens, with as many of prefills as `prefill` has time
    for. How it is divided between payers follows from `sharing`; without it, they are not told apart.
    """

    requests: Sequence[RequestView]
    holders: Sequence[Holder]
    num_pages: int
    num_free_pages: int
    max_num_batched_tokens: int
    prefill: PrefillBudget
    now: float
    sharing: Sharing | None = None


@dataclass(frozen=True)
class Choice:
    """What a rule chooses: the chunks of the next pass, pairs of a request's index and how many tokens of each row.

    If `preempted` is the index of a holder, that session gives up its pages first, and the rule is asked again.
    `shares` is how the pass was divided between payers.
    """

    chunks: tuple[tuple[int, int], ...] = ()
    preempted: int | None = None
    shares: PassShares = field(default_factory=PassShares)


PassRule = Callable[[EngineView], Choice]


def fair(view: EngineView) -> Choice:
    """Decoding first, then prompts. Pages are shared fairly between peers (`preemption.py`).

    Of prompts, those come first whose payers have used less compute, and ask for less; then those that have begun, or
    whose peers hold fewer pages; then those that arrived first.

    Where prompts find no pages, it is pages that are shared, and not compute: otherwise a session that gave up its
    pages would wait for all newcomers, each of which would be preempted in its turn.
    """
    order: Sequence[int] = range(len(view.requests))
    if sum(not request.running for request in view.requests) > 1:
        held = Counter[str]()
        for holder in view.holders:
            held[holder.peer] += holder.num_pages
        order = sorted(order, key=lambda each: _pages_of_peer(view.requests[each], held))
    turns = {} if view.sharing is None else prompt_turns(view.requests, view.sharing, now=view.now)
    by_compute = sorted(order, key=lambda each: turns.get(payer_of(view.requests[each]), (0, 0, 0.0)))
    output, shares = _scheduled(view, by_compute)
    if output.kept_out is not None and turns:  # what is short are pages, not compute
        output, shares = _scheduled(view, order, in_turns=False)
    if output.short_of_pages:
        return Choice(preempted=preempted_for_running(view.holders, now=view.now))
    return _unless_new_ones_deserve_room(view, output, shares, view.holders)


def first_come(view: EngineView) -> Choice:
    """Decoding first, then prompts in the order in which clients came. Sessions run to their end in that order.

    The session that gives way is idle, or of a peer with a large share of the pages, or the one whose client came last.
    So a session gives way only to older ones, of which there are ever fewer. A session begins when there is room
    for it and for the others to grow.
    """

    def place(index: int) -> tuple[bool, float, int]:
        request = view.requests[index]
        session = _session_of(request)
        return (False, 0.0, 0) if request.running else (True, session.since, session.opened)

    order = sorted(range(len(view.requests)), key=place)
    num_running = sum(holder.running for holder in view.holders)
    output, shares = _scheduled(view, order, pages_kept_free=ROOM_TO_GROW * num_running)
    if output.short_of_pages:
        return Choice(preempted=last_come(view.holders, num_pages=view.num_pages, now=view.now))
    large = _with_large_shares(view.holders, view.num_pages)
    yielding = [holder for holder in view.holders if holder.peer in large or holder.is_idle(view.now)]
    return _unless_new_ones_deserve_room(view, output, shares, yielding)


def last_come(holders: Sequence[Holder], *, num_pages: int, now: float) -> int:
    """The index of the session that gives way under `first_come`. There must be a holder.

    It is one of the idle ones, as `fair` chooses; or of a peer that holds a large share of the pages in several
    sessions, or of all, the one that came last.
    """
    idle = [index for index, holder in enumerate(holders) if holder.is_idle(now)]
    if idle:
        return of_the_largest(holders, idle)
    large = _with_large_shares(holders, num_pages)
    among = [index for index, holder in enumerate(holders) if holder.peer in large] or range(len(holders))
    return max(among, key=lambda index: (holders[index].since, holders[index].opened))


def _with_large_shares(holders: Sequence[Holder], num_pages: int) -> set[str]:
    """The peers that hold a large share of the pages, in more than one session."""
    held, sessions = Counter[str](), Counter[str]()
    for holder in holders:
        held[holder.peer] += holder.num_pages
        sessions[holder.peer] += 1
    return {peer for peer in held if held[peer] > LARGE_SHARE * num_pages and sessions[peer] > 1}


def _scheduled(
    view: EngineView, order: Sequence[int], *, pages_kept_free: int = 0, in_turns: bool = True
) -> tuple[SchedulerOutput, PassShares]:
    """The pass of the requests in this order that take part in it, by their indices, and how it is divided.

    Unless `in_turns` is false, prompts of payers that have used more wait for those of others.
    """
    shares = PassShares() if view.sharing is None else pass_shares(view.requests, view.sharing)
    output = SchedulerOutput()
    for left_out in (shares.left_out | shares.later, shares.left_out)[0 if in_turns else 1 :]:
        output = _scheduled_without(left_out, view, order, shares.prefill_seconds, pages_kept_free)
        if output.chunks or output.short_of_pages or not shares.later:
            break
    return output, shares


def _scheduled_without(
    left_out: Collection[int], view: EngineView, order: Sequence[int], prefill_seconds: float, pages_kept_free: int
) -> SchedulerOutput:
    running = [view.requests[index] for index in left_out if view.requests[index].running]
    order = _round_robin(view, [index for index in order if index not in left_out])
    output = schedule(
        [view.requests[index] for index in order],
        num_free_pages=view.num_free_pages,
        max_num_batched_tokens=view.max_num_batched_tokens,
        prefill=replace(view.prefill, seconds=min(view.prefill.seconds, prefill_seconds)),
        pages_kept_free=pages_kept_free + sum(step.num_pages(step.num_tokens) for step in running),
    )
    chunks = tuple((order[index], num_tokens) for index, num_tokens in output.chunks)
    kept_out = None if output.kept_out is None else (order[output.kept_out[0]], output.kept_out[1])
    return replace(output, chunks=chunks, kept_out=kept_out)


def _round_robin(view: EngineView, order: Sequence[int]) -> Sequence[int]:
    """The same order; but if a pass has too few tokens for all that decode, one step of each payer comes first."""
    decoding = [view.requests[index] for index in order if view.requests[index].decodes]
    if sum(step.num_rows * step.num_tokens for step in decoding) <= view.max_num_batched_tokens:
        return order
    rounds, before = dict[int, int](), Counter[str]()
    for index in order:
        if view.requests[index].decodes:
            rounds[index] = before[payer_of(view.requests[index])]
            before[payer_of(view.requests[index])] += 1
    return sorted(order, key=lambda index: rounds.get(index, 0))


def _unless_new_ones_deserve_room(
    view: EngineView, output: SchedulerOutput, shares: PassShares, yielding: Sequence[Holder]
) -> Choice:
    """The scheduled pass, unless one of the `yielding` sessions gives its pages to a session that has not begun."""
    chunks = output.chunks
    if output.kept_out is None:
        return Choice(chunks, shares=shares)
    index, num_missing = output.kept_out
    request = view.requests[index]
    new, waited = _session_of(request), view.now - request.arrived_at
    others = [holder for holder in yielding if holder.opened != new.opened]
    found = preempted_for_new(
        others,
        peer=new.peer,
        num_pages=request.num_pages(request.num_tokens),
        num_missing=num_missing,
        waited=waited,
        now=view.now,
        weight=new.weight,
    )
    if found is None and not chunks and not shares.left_out:
        others = [holder for holder in view.holders if holder.opened != new.opened]
        found = preempted_while_nobody_runs(others, num_missing=num_missing, waited=waited, now=view.now)
    if found is None:
        return Choice(chunks, shares=shares)
    return Choice(preempted=list(view.holders).index(others[found]))


def _pages_of_peer(request: RequestView, held: Mapping[str, int]) -> float:
    if request.running:
        return 0.0
    session = _session_of(request)
    return held[session.peer] / session.weight


def _session_of(request: RequestView) -> Holder:
    assert request.session is not None
    return request.session


RULES: Mapping[str, PassRule] = {"fair": fair, "first-come": first_come}


def rule_of(name: str) -> PassRule:
    """The rule of this name. Raises `UserError` if there is none."""
    if name not in RULES:
        raise UserError(f"there is no scheduling {name!r}", hint=", ".join(RULES))
    return RULES[name]


@dataclass(frozen=True)
class Places:
    """Since when clients wait that were told to come back, so that they need not begin to wait again.

    `kept` has, for each peer, when it came and when it was told to come back. A peer has one place: its earliest.
    """

    kept: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def of(self, peer: str, now: float) -> float:
        """Since when a client waits that comes now."""
        since, told_at = self.kept.get(peer, (now, now))
        return since if now - told_at <= PLACE_SECONDS else now

    def told_to_come_back(self, peer: str, *, since: float, now: float) -> Places:
        """With the place of a client that is told to come back now."""
        kept = {each: place for each, place in self.kept.items() if now - place[1] <= PLACE_SECONDS}
        kept[peer] = (min(since, kept[peer][0]) if peer in kept else since, now)
        while len(kept) > MAX_PLACES:
            del kept[next(iter(kept))]
        return Places(kept)

    def taken(self, peer: str) -> Places:
        """Without the place of a client that has come back."""
        return self if peer not in self.kept else Places({p: place for p, place in self.kept.items() if p != peer})
