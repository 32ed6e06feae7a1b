"""One audit: a witness computes again what a server answered, and if they differ, others tell who is right."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.client.decoding.auditing.claim import Claim
from shoal.client.decoding.auditing.distances import distances, logits_distances
from shoal.client.decoding.auditing.logits_tail import LogitsTail
from shoal.client.decoding.auditing.recomputation import Testimony, recompute
from shoal.client.decoding.route_planner import RoutePlanner
from shoal.client.head.logits import Logits
from shoal.client.swarm.swarm import Swarm
from shoal.errors import MissingBlocks
from shoal.policy.audits.likeness import Allowed, Form, allowed_among, are_alike
from shoal.policy.audits.verdict import Verdict, verdict, with_own_answer


@dataclass(frozen=True)
class Findings:
    """What an audit found: the distances of each token from what the first of the `witnesses` computed.

    `accuser` is the only server of the first testimony, and `None` if that came from several.
    """

    verdict: Verdict
    distances: tuple[float, ...]
    allowed: Allowed
    witnesses: tuple[str, ...]
    accuser: str | None


async def examine(
    swarm: Swarm, planner: RoutePlanner, claim: Claim, window: tuple[int, int], mask_BT: torch.Tensor | None
) -> Findings:
    """Audit the tokens of a window, of which those are padding whose mask is 0.

    Raises `MissingBlocks` if no other server holds the blocks, and other `SwarmError`s if witnesses fail.
    """
    claimed, inputs_BTD = claim.outputs.between(*window), claim.inputs.between(*window)
    head = isinstance(claim.outputs, LogitsTail)

    async def testimony(*, not_by: Sequence[str]) -> Testimony:
        route = await planner.route_of_others(claim.span, {*not_by}, head=head)
        return await recompute(swarm, planner, claim, window, route)

    def apart(one: torch.Tensor | Logits, other: torch.Tensor | Logits) -> list[float]:
        if isinstance(one, Logits) or isinstance(other, Logits):
            assert isinstance(one, Logits)
            assert isinstance(other, Logits)
            return logits_distances(one, other)
        return distances(one, other, inputs_BTD, mask_BT)

    def allowed_between(forms: Sequence[Form], others: Sequence[Form]) -> Allowed:
        encoding = swarm.config.history_encoding
        return functools.reduce(Allowed.either, [allowed_among(form, others, encoding=encoding) for form in forms])

    first = await testimony(not_by=[claim.peer])
    allowed = allowed_between([claim.form], first.forms)
    found = apart(claimed, first.outputs)
    witnesses, result = first.peers, verdict(like_witness=are_alike(found, allowed))
    if result is not Verdict.CLEAN:
        with contextlib.suppress(MissingBlocks):
            second = await testimony(not_by=[claim.peer, *first.peers])
            witnesses = (*first.peers, *second.peers)
            result = verdict(
                like_witness=False,
                like_second=are_alike(apart(claimed, second.outputs), allowed_between([claim.form], second.forms)),
                witnesses_alike=are_alike(
                    apart(second.outputs, first.outputs), allowed_between(first.forms, second.forms)
                ),
            )
    if result is Verdict.LIED and claim.pushed_by:
        own = await recompute(swarm, planner, claim, window, planner.route_of_one(claim.server, claim.span))
        like_witness = are_alike(apart(own.outputs, first.outputs), allowed)
        result = with_own_answer(result, like_witness=like_witness)
    accuser = first.peers[0] if len(first.peers) == 1 else None
    return Findings(result, tuple(found), allowed, witnesses, accuser)
