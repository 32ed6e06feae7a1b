"""One audit: a witness computes again what a server answered, and if they differ, others tell who is right."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from shoal.client.decoding.auditing.claim import Claim
from shoal.client.decoding.auditing.recomputation import recompute
from shoal.client.decoding.route_planner import RoutePlanner
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
    claimed_BTD, inputs_BTD = claim.outputs.between(*window), claim.inputs.between(*window)

    async def testimony(*, not_by: Sequence[str]) -> Testimony[torch.Tensor]:
        return await recompute(swarm, planner, claim, window, await planner.route_of_others(claim.span, {*not_by}))

    async def second() -> Testimony[torch.Tensor] | None:
        try:
            return await testimony(not_by=[claim.peer, *first.peers])
        except MissingBlocks:
            return None

    def apart(one_BTD: torch.Tensor, other_BTD: torch.Tensor) -> list[float]:
        return distances(one_BTD, other_BTD, inputs_BTD, mask_BT)

    def allowed(ones: Sequence[Form], others: Sequence[Form]) -> Allowed:
        return allowed_between(ones, others, encoding=swarm.config.history_encoding)

    first = await testimony(not_by=[claim.peer])
    claimed = Testimony(claimed_BTD, (claim.peer,), (claim.form,))
    found = await compare(claimed, first, second, apart=apart, allowed=allowed)
    if found.verdict is Verdict.LIED and claim.pushed_by:
        own = await recompute(swarm, planner, claim, window, planner.route_of_one(claim.server, claim.span))
        like_witness = are_alike(apart(own.answer, first.answer), found.allowed)
        return replace(found, verdict=with_own_answer(found.verdict, like_witness=like_witness))
    return found
