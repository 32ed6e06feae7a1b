"""How much credit a server gives to its peers, for what they have computed for its own users and for its contacts.

A *contact* is a peer that has computed something for this server's users. What it gave is the only source of credit:

    direct       what a peer gave counts for itself
    passed on    up to half of what a contact gave counts for the peers whose work the contact has acknowledged, each
                 its part of all that the contact has acknowledged

The sum of all credit is therefore never more than what this server's users have received. Identities that give nothing
to them, and acknowledge each other's work, earn nothing, however much they sign. One that gives a little can divide
that between as many identities as it likes. No path has more than one contact: what longer ones say, a server cannot
judge.

Work is in millions of parameter-tokens: the tokens, times the parameters of the blocks that computed them. Backward
passes count twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shoal.spans import Span

MILLION = 10**6
BACKWARD = 2
"""A backward pass counts as this many forward passes: it computes gradients of inputs and of activations."""
PERIOD_SECONDS = 7 * 24 * 3600
"""Work is summed up by weeks of Unix time."""
NUM_PERIODS = 4
"""The weeks that count, this one included: what was computed a month ago earns nothing any more."""
PASSED_ON = 0.5
"""The part of what a contact gave that may count for others. The rest stays its own, however much it takes elsewhere:
what a peer gives directly is always worth something there."""

Claims = Mapping[tuple[str, str], float]
"""The work that the first peer of a pair, a contact, has acknowledged to the second one."""


def parameter_tokens(block_parameters: Sequence[int], num_tokens: int, span: Span) -> int:
    """The work of computing tokens through the blocks of a span, of a model whose blocks have these parameters."""
    return num_tokens * sum(block_parameters[span.start : span.end])


def period_of(unix_time: float) -> int:
    """The week of a time."""
    return int(unix_time // PERIOD_SECONDS)


def counts(period: int, *, now: int) -> bool:
    """Whether the work of a week still counts in the week `now`."""
    return now - NUM_PERIODS < period <= now


def credits_of(given: Mapping[str, float], claims: Claims) -> dict[str, float]:
    """The credit of each peer that has any.

    `given` is what peers have computed for this server's users; `claims` are what contacts acknowledge to others.
    Claims of peers that gave nothing, and those of peers to themselves, count nothing.
    """
    found = {peer: work for peer, work in given.items() if work > 0}
    claimed: dict[str, float] = {}
    for (contact, peer), work in claims.items():
        if contact != peer and work > 0 and contact in found:
            claimed[contact] = claimed.get(contact, 0.0) + work
    parts = {contact: min(1.0, PASSED_ON * found[contact] / work) for contact, work in claimed.items()}
    credit = {peer: work - claimed.get(peer, 0.0) * parts.get(peer, 0.0) for peer, work in found.items()}
    for (contact, peer), work in claims.items():
        if contact != peer and work > 0 and contact in parts:
            credit[peer] = credit.get(peer, 0.0) + work * parts[contact]
    return credit
