"""One audit: a witness computes again what a server answered, and if they differ, others tell who is right."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from shoal.client.decoding.auditing.claim import Claim
from shoal.client.decoding.auditing.logits_tail import LogitsTail, logits_distances
from shoal.client.decoding.auditing.recomputation import recompute
from shoal.client.decoding.route_planner import RoutePlanner
from shoal.client.head.logits import Logits
from shoal.client.swarm.comparing.distances import distances
from shoal.client.swarm.comparing.findings import Findings, Testimony, allowed_between, compare
from shoal.client.swarm.swarm import Swarm
from shoal.errors import MissingBlocks
from shoal.policy.audits.likeness import Allowed, Form, are_alike
from shoal.policy.audits.verdict import Verdict, with_own_answer


async def examine(
    swarm: Swarm, planner: RoutePlanner, claim: Claim, window: tuple[int, int], mask_BT: torch.Tensor | None
) -> Findings:
    """Audit the tokens of a window, of which those are padding whose mask is 0.

    Raises `MissingBlocks` if no other server holds the blocks, and other `SwarmError`s if witnesses fail.
    """
    claimed, inputs_BTD = claim.outputs.between(*window), claim.inputs.between(*window)
    head = isinstance(claim.outputs, LogitsTail)

    async def testimony(*, not_by: Sequence[str]) -> Testimony[torch.Tensor | Logits]:
        route = await planner.route_of_others(claim.span, {*not_by}, head=head)
        return await recompute(swarm, planner, claim, window, route)

    async def second() -> Testimony[torch.Tensor | Logits] | None:
        try:
            return await testimony(not_by=[claim.peer, *first.peers])
        except MissingBlocks:
            return None

    def apart(one: torch.Tensor | Logits, other: torch.Tensor | Logits) -> list[float]:
        if isinstance(one, Logits) or isinstance(other, Logits):
            assert isinstance(one, Logits)
            assert isinstance(other, Logits)
            return logits_distances(one, other)
        return distances(one, other, inputs_BTD, mask_BT)

    def allowed(ones: Sequence[Form], others: Sequence[Form]) -> Allowed:
        return allowed_between(ones, others, encoding=swarm.config.history_encoding)

    first = await testimony(not_by=[claim.peer])
    answer = Testimony[torch.Tensor | Logits].of(claimed, [claim.server])
    found = await compare(answer, first, second, apart=apart, allowed=allowed)
    if found.verdict is Verdict.LIED and claim.pushed_by:
        own = await recompute(swarm, planner, claim, window, planner.route_of_one(claim.server, claim.span))
        like_witness = are_alike(apart(own.answer, first.answer), found.allowed)
        return replace(found, verdict=with_own_answer(found.verdict, like_witness=like_witness))
    return found
