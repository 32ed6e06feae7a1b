"""How likely a guessed token is right, by how those before it turned out."""

from __future__ import annotations

from dataclasses import dataclass, replace

PRIOR_WEIGHT = 2.0
"""How many judged guesses count as much as what is expected of a kind of guesses before any was judged."""
MEMORY = 40.0
"""About how many judged guesses count: a text that was copied a while ago says little of one that is not."""


@dataclass(frozen=True)
class Acceptance:
    """How many of the `judged` guesses of one kind were `right`. Later ones count more.

    A guess is judged only if all before it in its step were right. Before any was judged, `prior` is the part of them
    that is expected to be right.
    """

    prior: float
    right: float = 0.0
    judged: float = 0.0

    @property
    def rate(self) -> float:
        """The part of such guesses that is expected to be right, between 0 and 1."""
        return (self.right + PRIOR_WEIGHT * self.prior) / (self.judged + PRIOR_WEIGHT)

    def after(self, *, num_right: int, num_guesses: int) -> Acceptance:
        """After a step with `num_guesses` of this kind, of which the first `num_right` were right, and the next not."""
        judged = num_right + (num_right < num_guesses)
        kept = max(0.0, 1.0 - judged / MEMORY)
        return replace(self, right=kept * self.right + num_right, judged=kept * self.judged + judged)


def expected_tokens(rate: float, num_guesses: int) -> float:
    """How many tokens a step gives on average: the first is always right, and each guess if all before it are."""
    total = chance = 1.0
    for _ in range(num_guesses):
        chance *= rate
        total += chance
    return total
