"""When a client audits which server: so rarely that it costs a small part of the decoding, and never predictably.

Costs are counted in tokens of one block, decoded one at a time. A witness computes many tokens in a pass, which costs
less by as much as its speed with long inputs is above that with single tokens. The same holds for the passes without a
cache that a client makes: they earn audits as decoded tokens do. A server that the client has not audited yet is
audited once whatever that costs; what it costs is saved later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import random

AuditLevel = Literal["off", "low", "high"]

RATES: dict[AuditLevel, float] = {"off": 0.0, "low": 0.03, "high": 0.3}
"""What audits cost at each level, as a part of the compute of the decoding."""
FIRST_AUDIT_TOKENS = 24
"""A server that is new to the client is audited after at most this many tokens, at a moment that it cannot foresee."""
MOST_FAILED = 8
"""An audit whose witnesses fail is made again at once, by others, unless it failed so often in a row."""
PASS_TOKENS = FIRST_AUDIT_TOKENS // 4
"""A pass without a cache counts as this many tokens there: a new server is audited within its first four passes."""
PASS_CHANCE = 0.5
"""How often a pass is audited if the budget pays for it. Audits would fall on the same of passes that take turns."""
USUAL_SPEEDUP = 10.0
"""How many times faster servers compute tokens of long inputs than single ones, if they do not say."""
MOST_SPEEDUP = 1000.0
"""What an announcement can save at most."""
MOST_CREDIT_TOKENS = 4096
"""How many decoded tokens' part of the compute is saved at most: audits do not come in bursts after a long pause."""


@dataclass(frozen=True)
class AuditBudget:
    """What audits may cost now, in decoded tokens of one block. Below 0, it has to be earned back first."""

    rate: float
    credit: float = 0.0

    def earned(self, num_tokens: float, num_blocks: int) -> AuditBudget:
        """After `num_tokens` were decoded through `num_blocks`, or after a pass that costs as much.

        What a long pass costs can be saved whatever the rate, or none would ever be audited again.
        """
        most = max(self.rate * MOST_CREDIT_TOKENS, num_tokens) * num_blocks
        return replace(self, credit=max(self.credit, min(most, self.credit + self.rate * num_tokens * num_blocks)))

    def spent(self, cost: float) -> AuditBudget:
        """After an audit of this cost."""
        return replace(self, credit=self.credit - cost)


@dataclass(frozen=True)
class Candidate:
    """A server whose outputs could be audited: how many tokens of them, at what cost, and how often it was clean.

    One that was never audited is due at a time of its own.
    """

    num_tokens: int
    cost: float
    num_clean: int
    is_due: bool

    @property
    def is_new(self) -> bool:
        """Whether it was never audited."""
        return not self.num_clean


def audit_cost(num_tokens: int, num_blocks: int, *, decode_speed: float | None, prefill_speed: float | None) -> float:
    """What it costs a witness to compute `num_tokens` through `num_blocks`, in single decoded tokens of a block.

    The speeds are those that it announces.
    """
    speedup = prefill_speed / decode_speed if decode_speed and prefill_speed else USUAL_SPEEDUP
    return num_tokens * num_blocks / min(max(speedup, 1.0), MOST_SPEEDUP)


def next_audit(candidates: Sequence[Candidate], budget: AuditBudget, rng: random.Random) -> int | None:
    """The index of the server to audit now; None if none is.

    Of servers that are new and due, the first. Else one at random that the budget pays for: the likelier, the more of
    its outputs are not audited, and the fewer audits it has passed.
    """
    if not budget.rate:
        return None
    for index, each in enumerate(candidates):
        if each.is_new and each.is_due:
            return index
    affordable = [i for i, each in enumerate(candidates) if not each.is_new and each.cost <= budget.credit]
    if not affordable:
        return None
    weights = [candidates[i].num_tokens / math.sqrt(candidates[i].num_clean) for i in affordable]
    return rng.choices(affordable, weights)[0]


def audits_pass(candidate: Candidate, budget: AuditBudget, rng: random.Random) -> bool:
    """Whether a server's pass is audited while it is computed."""
    if next_audit([candidate], budget, rng) is None:
        return False
    return candidate.is_new or rng.random() < PASS_CHANCE
