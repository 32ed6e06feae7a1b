"""How credit becomes priority: the weight of a payer in the sharing of a server's compute.

A payer of weight 4 gets four times the time of one of weight 1, if both want more than there is. If it is alone, or if
there is enough for all, nothing changes. No weight is below 1, so no payer waits longer than its share demands.

    weight
      4 |*
        |   *
        |        *
        |                *
      1 |                                *
        +----------------------------------
        0     credit    3 x credit         consumed here, in the same weeks
"""

from __future__ import annotations

from collections.abc import Mapping

MAX_WEIGHT = 4.0
"""The weight of a payer that has credit and has consumed nothing here: enough to be felt, and no door that closes."""


def weight_of(credit: float, consumed: float) -> float:
    """The weight of a payer by its credit here, and what it has consumed here lately.

    It depends on their ratio only: an account that is divided into several has the same weights, and credit is used up
    by those whom its owner lends it to.
    """
    if credit <= 0:
        return 1.0
    return 1.0 + (MAX_WEIGHT - 1.0) / (1.0 + max(consumed, 0.0) / credit)


def charged(credits: Mapping[str, float], work: float) -> dict[str, float]:
    """How work for a payer is charged to the accounts behind it: in proportion to their `credits`.

    So it is no use to leave an account out that has consumed much.
    """
    total = sum(credit for credit in credits.values() if credit > 0)
    return {account: work * credit / total for account, credit in credits.items() if credit > 0}
