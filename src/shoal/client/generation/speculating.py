"""The guesses of one generation: which are made, and what became of them.

A step carries guesses of the tokens behind the next one. The servers compute all of them in one pass and one trip, and
the client chooses a token at each position as it always does: with the same processors and the same random numbers. A
guess is right if it is the token that was chosen, and then the answer behind it counts too. So the text is the same as
without guesses, sampled or not, and only the number of trips differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.client.generation.drafting.drafter import Drafter, Source
from shoal.policy.speculation.acceptance import Acceptance
from shoal.policy.speculation.guess_count import Balance, num_guesses
from shoal.policy.speculation.step_times import StepTimes


@dataclass(frozen=True)
class Guesses:
    """The tokens that a step guesses, in order, and where they come from."""

    tokens: tuple[int, ...] = ()
    source: Source | None = None


NO_GUESSES = Guesses()


class Speculation:
    """Decides how many tokens a generation guesses, by what its own steps have shown. One thread at a time uses it.

    With `fixed`, each step carries that many, however they turn out.
    """

    def __init__(self, drafter: Drafter, *, fixed: int | None = None) -> None:
        self.num_guessed = 0
        """How many guesses were sent to servers."""
        self.num_right = 0
        """How many of them were right."""
        self._drafter = drafter
        self._fixed = fixed
        self._acceptances: dict[str, Acceptance] = {}
        self._times = StepTimes()
        self._balance = Balance()

    def guesses(self, *, most: int) -> Guesses:
        """What to send behind the last token of the text, at most `most`."""
        if (source := self._drafter.source()) is None:
            return NO_GUESSES
        count = self._count(source, most) if self._fixed is None else min(self._fixed, most)
        return Guesses(tuple(self._drafter.guesses(count)), source) if count else NO_GUESSES

    def _count(self, source: Source, most: int) -> int:
        if not self._times.is_known:
            return 0
        most_seconds = self._balance.may_lose(self._times.of(1))
        return num_guesses(self._times, self._acceptance(source).rate, most=most, most_seconds=most_seconds)

    def judged(self, guesses: Guesses, tokens: Sequence[int]) -> None:
        """A step with these guesses gave these tokens."""
        if guesses.source is not None:
            num_right = sum(token == guess for token, guess in zip(tokens, guesses.tokens, strict=False))
            self.num_guessed += len(guesses.tokens)
            self.num_right += num_right
            self._acceptances[guesses.source.name] = self._acceptance(guesses.source).after(
                num_right=num_right, num_guesses=len(guesses.tokens)
            )
        self._drafter.append(tokens)

    def timed(self, guesses: Guesses, num_tokens: int, seconds: float) -> None:
        """The step with these guesses gave so many tokens, and took so long until the next could be sent."""
        self._times = self._times.after(1 + len(guesses.tokens), seconds)
        plain_seconds = num_tokens * self._times.of(1) if guesses.tokens else seconds
        self._balance = self._balance.after(seconds, plain_seconds=plain_seconds)

    def _acceptance(self, source: Source) -> Acceptance:
        return self._acceptances.get(source.name, Acceptance(source.prior))
