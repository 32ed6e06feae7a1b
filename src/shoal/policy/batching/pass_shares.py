"""How the time of a pass is divided between payers, so that none keeps the others from their share of the compute.

One more decoding step makes a pass hardly longer: the weights are read once for all. So payers do not take turns. All
decode in the same pass, if each keeps its share: with n payers, the pass takes at most n times as long as the one with
the least work would need alone. That is what a server of its own, n times slower, would give each of them.

    2 payers, A with 1 step, B with 60      alone, A's pass takes 52 ms
    all 61 steps                            142 ms: A has 36 % of its speed
    1 step of A, 34 of B                    103 ms: A has half of its speed, which is its share

Beyond that, each payer decodes with as much time as the others, its oldest steps first. What cannot be cut, a step of
a thousand sequences, is computed at once; then its payer is in *debt* for what the pass took too long, and takes no
part until the others have had as much time. Prompts get what is left of the pass.

Payers may have weights (`shoal.policy.contribution.priority`). A share is then a payer's weight as a part of all
weights: beside a payer of weight 1, one of weight 4 keeps four fifths of its speed, and leaves a fifth to the other.

This bounds how long a pass is by what parts of it are expected to take. What it took is known later, and counts
(`PassShares.excess`): who asks for more than it seems to be gets into debt as well.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from shoal.policy.batching.engine_limits import IDLE_CHECK_SECONDS, RECHECK_SECONDS
from shoal.policy.batching.fair_queueing import FairQueue
from shoal.policy.batching.pass_times import MIN_PREFILL_TOKENS, PassLoad, PassTimeModel
from shoal.policy.batching.scheduling import RequestView

Fits = Callable[[float, float], bool]
"""Whether a pass may have steps that add the first, in seconds, if the payer with the least work adds the second."""
Weighed = Callable[[str, float], float]
"""What a payer of weight 1 would add that may demand the same of a pass as a payer whose steps add so much."""
SHORT_SECONDS = 0.1
"""Prompts that take about as long come in order of arrival."""
AGED_SECONDS = 10.0
"""A payer none of whose prompts was computed for so long does not wait for shorter ones any more."""
ROUNDING = 1e-9
"""What sums of the same costs may differ by, as a part of them."""


@dataclass(frozen=True)
class Debts:
    """The seconds that payers have had beyond their share, while others wanted the time too."""

    seconds: Mapping[str, float] = field(default_factory=dict)

    def of(self, payer: str) -> float:
        """What a payer owes."""
        return self.seconds.get(payer, 0.0)

    def after(
        self,
        elapsed: float,
        *,
        present: Collection[str],
        took_part: Collection[str] = (),
        excess: Mapping[str, float] | None = None,
    ) -> Debts:
        """After `elapsed` seconds of compute, or of waiting for those `present`.

        Payers that took no part in it have paid off their part of it. Others have an `excess`, which they owe from now
        on. What all of those present owe cancels out, and a payer that is alone owes nothing.
        """
        if len(present) < 2:
            return Debts()
        left = dict(self.seconds)
        for payer in self.seconds:
            if payer not in took_part:
                left[payer] -= elapsed / max(1, len(present) - (payer in present))
        for payer, more in (excess or {}).items():
            left[payer] = left.get(payer, 0.0) + more
        mutual = max(0.0, min(left.get(payer, 0.0) for payer in present))
        return Debts({payer: owed - mutual for payer, owed in left.items() if owed > mutual})


def idle_seconds(debts: Debts) -> float:
    """How long steps wait that no pass takes before they are looked at again: not long if others may let them in."""
    return RECHECK_SECONDS if debts.seconds else IDLE_CHECK_SECONDS


@dataclass(frozen=True)
class Sharing:
    """What the division of a pass follows from, beside the requests.

    The payers `away` decode, although none of their steps waits just now; the next one is expected in `next_in`
    seconds. `used` and `prompted_at`, when a prompt of each was last computed, say whose prompts come first. Others
    that had prompts computed a moment ago may soon have more: the shortest were computed in `prompt_seconds`. `weights`
    are those of payers that have others than 1.
    """

    pass_time: PassTimeModel
    away: frozenset[str] = frozenset()
    next_in: float | None = None
    debts: Debts = field(default_factory=Debts)
    used: FairQueue = field(default_factory=FairQueue)
    prompted_at: Mapping[str, float] = field(default_factory=dict)
    prompt_seconds: float = inf
    weights: Mapping[str, float] = field(default_factory=dict)

    def weight(self, payer: str) -> float:
        """The weight of a payer."""
        return self.weights.get(payer, 1.0)


@dataclass(frozen=True)
class PassShares:
    """Which requests take no part in the next pass, and for how many `prefill_seconds` prompts may.

    The `later` ones take part if nothing else can be computed. The pass should take `seconds` at most, so that each
    payer has its share: its weight, as a part of the `total_weight` of all. `weights` are those that are not 1.
    """

    left_out: frozenset[int] = frozenset()
    later: frozenset[int] = frozenset()
    prefill_seconds: float = inf
    seconds: float = inf
    total_weight: float = 1.0
    weights: Mapping[str, float] = field(default_factory=dict)

    def excess(self, charges: Mapping[str, float], seconds: float) -> Mapping[str, float]:
        """What each payer owes after the pass took `seconds`, of which each payer is charged its part.

        It is what the pass took too long, divided between those that had more than their share of it.
        """
        shares = {payer: self.seconds * self.weights.get(payer, 1.0) / self.total_weight for payer in charges}
        beyond = {payer: charge - shares[payer] for payer, charge in charges.items() if charge > shares[payer]}
        too_long = seconds - self.seconds
        if too_long <= 0 or not beyond:
            return {}
        return {payer: too_long * more / sum(beyond.values()) for payer, more in beyond.items()}


def payer_of(request: RequestView) -> str:
    """Who a request counts for."""
    return "" if request.session is None else request.session.peer


def charges(parts: Sequence[tuple[str, PassLoad]], pass_time: PassTimeModel, seconds: float) -> dict[str, float]:
    """The seconds of a pass that each payer is charged, for its parts of it. They add up to the `seconds` it took.

    A part costs what it adds. What reading the weights takes is divided evenly between the payers.
    """
    added: dict[str, float] = {}
    for payer, work in parts:
        added[payer] = added.get(payer, 0.0) + pass_time.added_by(work)
    weights = pass_time.decoded_tokens.fixed / len(added)
    total = sum(added.values()) + weights * len(added)
    return {payer: seconds * (own + weights) / total for payer, own in added.items()}


def pass_shares(requests: Sequence[RequestView], sharing: Sharing) -> PassShares:
    """How the next pass is divided. With one payer, and where all fits, no payer is limited."""
    waiting = {payer_of(request) for request in requests}
    present = waiting | sharing.away
    prompt_seconds = max(sharing.prompt_seconds, sharing.pass_time.decoded_tokens.fixed)
    if len(present) < 2:
        return PassShares(prefill_seconds=prompt_seconds)
    quantum = sharing.pass_time.decoded_tokens.fixed
    indebted = {payer for payer in waiting if sharing.debts.of(payer) > quantum}
    if waiting <= indebted:
        return _in_the_gap(requests, sharing)
    left_out = {index for index, request in enumerate(requests) if payer_of(request) in indebted}
    later = _later_prompts(requests, sharing.used, waiting - indebted) - left_out
    shares = _divided(requests, sharing, present=present, left_out=left_out)
    return replace(shares, later=later, prefill_seconds=min(shares.prefill_seconds, prompt_seconds))


def prompt_turns(requests: Sequence[RequestView], sharing: Sharing, *, now: float) -> dict[str, tuple[int, int, float]]:
    """When the prompts of each payer have their turn, the least first. With one payer, it is empty.

    Payers that have used less come first, a quantum apart. Of others, those come first whose prompts take less, all
    together, `SHORT_SECONDS` apart; but no payer waits for that that had no turn for `AGED_SECONDS`. Of those that are
    equal in that too, the one with the larger weight comes first.
    """
    prompts = [(payer_of(request), request) for request in requests if not request.decodes]
    payers = {payer for payer, _ in prompts}
    if len(payers) < 2:
        return {}
    work, since = dict.fromkeys(payers, 0.0), dict.fromkeys(payers, now)
    for payer, request in prompts:
        work[payer] += sharing.pass_time.added_by(request.work(request.num_tokens))
        since[payer] = min(since[payer], request.arrived_at)
    since = {payer: max(at, sharing.prompted_at.get(payer, at)) for payer, at in since.items()}
    is_aged = {payer: now - since[payer] > AGED_SECONDS for payer in payers}
    length = {payer: 0 if is_aged[payer] else int(work[payer] / SHORT_SECONDS) for payer in payers}
    return {payer: (sharing.used.turn_of(payer, payers), length[payer], -sharing.weight(payer)) for payer in payers}


def _later_prompts(requests: Sequence[RequestView], used: FairQueue, payers: Collection[str]) -> frozenset[int]:
    """The prompts of payers that have used more than others whose prompts wait too."""
    prompts = [(index, payer_of(request)) for index, request in enumerate(requests) if not request.decodes]
    among = {payer for _, payer in prompts if payer in payers}
    return frozenset(index for index, payer in prompts if payer in among and used.turn_of(payer, among) > 0)


def _divided(
    requests: Sequence[RequestView], sharing: Sharing, *, present: Collection[str], left_out: set[int]
) -> PassShares:
    """The pass of the payers that owe nothing, beside those that are away."""
    model, total_weight = sharing.pass_time, sum(sharing.weight(payer) for payer in present)
    token, fixed = model.decoded_tokens.each, model.decoded_tokens.fixed  # of reading the weights of the blocks
    steps: dict[str, list[tuple[float, int]]] = {}
    pages: dict[str, float] = {}  # what the first page of a prompt takes
    for index, request in enumerate(requests):
        if index in left_out:
            continue
        payer = payer_of(request)
        if request.decodes:
            steps.setdefault(payer, []).append((model.added_by(request.work(request.num_tokens)), index))
        else:
            pages[payer] = min(pages.get(payer, inf), _first_page(request, model))
    if not steps and not sharing.away:  # no session decodes: prompts take turns, and not parts of a pass
        return PassShares(left_out=frozenset(left_out), total_weight=total_weight, weights=sharing.weights)
    # Prompts have their payers' shares of the pass, if these do nothing else in it, and in any case a page or half.
    for_prompts = sum(sharing.weight(payer) for payer in pages.keys() - steps.keys()) / total_weight
    page = min(pages.values(), default=0.0)

    def weighed(payer: str, added: float) -> float:
        """What a payer of weight 1 would add that may demand the same of a pass as this one, which adds `added`."""
        weight = sharing.weight(payer)
        return added if weight == 1.0 else (fixed + added) / weight - fixed

    least_away = min((weighed(payer, token) for payer in sharing.away - steps.keys()), default=inf)

    def limit(least: float) -> float:
        """How long a pass may take if the payer with the least work adds so much."""
        return total_weight * (fixed + (least if least < inf else token))

    def fits(total: float, least: float) -> bool:
        allowed = limit(least)
        return fixed + total <= (allowed - max(allowed * for_prompts, min(page, allowed / 2))) * (1 + ROUNDING)

    loads = {payer: sum(cost for cost, _ in own) for payer, own in steps.items()}
    total, least = sum(loads.values()), min([least_away, *(weighed(payer, load) for payer, load in loads.items())])
    if loads and not fits(total, least):
        total, least, beyond = _in_turns(steps, least_away, fits, weighed)
        left_out |= beyond
    seconds = limit(least)
    return PassShares(
        left_out=frozenset(left_out),
        prefill_seconds=max(0.0, seconds - fixed - total),
        seconds=seconds,
        total_weight=total_weight,
        weights=sharing.weights,
    )


def _in_the_gap(requests: Sequence[RequestView], sharing: Sharing) -> PassShares:
    """The pass of payers that owe time to others, which are all away: what is done before the next one comes."""
    model, seconds = sharing.pass_time, sharing.next_in or 0.0
    left = seconds - model.decoded_tokens.fixed
    left_out = set[int]()
    for index, request in sorted(enumerate(requests), key=lambda each: not each[1].decodes):
        decodes = request.decodes
        cost = model.added_by(request.work(request.num_tokens)) if decodes else _first_page(request, model)
        if cost > left:
            left_out.add(index)
        elif decodes:
            left -= cost
    return PassShares(left_out=frozenset(left_out), prefill_seconds=max(0.0, left), seconds=seconds)


def _first_page(request: RequestView, model: PassTimeModel) -> float:
    """What the least part of a prompt takes that a pass computes."""
    num_tokens = request.num_tokens if request.unsplittable else max(1, MIN_PREFILL_TOKENS // request.num_rows)
    return model.added_by(request.work(min(request.num_tokens, num_tokens)))


def _in_turns(
    steps: Mapping[str, Sequence[tuple[float, int]]], least_away: float, fits: Fits, weighed: Weighed
) -> tuple[float, float, set[int]]:
    """What the steps add that take part, how much the payer with the least work adds, and which take no part.

    Whose steps have taken least for its weight comes next, for as long as the pass fits. One step takes part that never
    fits, the first of its payer.
    """
    left_out = {index for own in steps.values() for _, index in own}
    total, ended, long = 0.0, least_away, list[tuple[int, float, float]]()
    # What the steps of a payer add as a payer of weight 1, what they add, the place of its next one, and its name.
    queue = list[tuple[float, float, int, str]]()
    firsts = sorted((weighed(payer, own[0][0]), own[0][0], payer) for payer, own in steps.items())
    for least, cost, payer in firsts:
        index = steps[payer][0][1]
        if fits(total + cost, min(least_away, firsts[0][0])):
            total += cost
            left_out.discard(index)
            queue.append((least, cost, 1, payer))
        else:
            long.append((index, cost, least))
    if long:
        index, cost, _ = min(long)  # that which came first
        left_out.discard(index)
        total += cost
        ended = min(ended, *(least for _, _, least in long))
    while queue:
        least, added, place, payer = heapq.heappop(queue)
        if place == len(steps[payer]):
            ended = min(ended, least)
            continue
        cost, index = steps[payer][place]
        more = weighed(payer, added + cost)
        if fits(total + cost, min(ended, more, queue[0][0] if queue else inf)):
            total += cost
            left_out.discard(index)
            heapq.heappush(queue, (more, added + cost, place + 1, payer))
        else:
            ended = min(ended, least)
    return total, ended, left_out
