"""The guesses of one generation: which are made, and what became of them.

A step carries guesses of the tokens behind the next one. The servers compute all of them in one pass and one trip, and
the client chooses a token at each position as it always does: with the same processors and the same random numbers. A
guess is right if it is the token that was chosen, and then the answer behind it counts too. So the text is the same as
without guesses, sampled or not, and only the number of trips differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.client.generation.drafting.drafter import Drafter, ReadsAhead, Source
from shoal.policy.speculation.acceptance import Acceptance
from shoal.policy.speculation.guess_count import Balance, Offer, best_offer
from shoal.policy.speculation.step_times import StepTimes


@dataclass(frozen=True)
class Guesses:
    """The tokens that a step guesses, in order, and where they come from."""

    tokens: tuple[int, ...] = ()
    source: Source | None = None


NO_GUESSES = Guesses()


class Speculation:
    """Decides how many tokens a generation guesses, and which of its drafters does, by what its own steps have shown.

    One thread at a time uses it. With `fixed`, each step carries that many, however they turn out.
    """

    def __init__(
        self, *drafters: Drafter, fixed: int | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.num_guessed = 0
        """How many guesses were sent to servers."""
        self.num_right = 0
        """How many of them were right."""
        self._drafters = drafters
        self._fixed = fixed
        self._clock = clock
        self._acceptances: dict[str, Acceptance] = {}
        self._times = StepTimes()
        self._balance = Balance()
        self._draft_seconds = 0.0  # which the latest guesses took to make

    @property
    def is_behind(self) -> bool:
        """Whether a drafter has to read more of the text before it guesses."""
        return any(drafter.is_behind for drafter in self._drafters if isinstance(drafter, ReadsAhead))

    def read_piece(self) -> None:
        """Let such a drafter read a little more."""
        for drafter in self._drafters:
            if isinstance(drafter, ReadsAhead):
                drafter.read_piece()

    def guesses(self, *, most: int) -> Guesses:
        """What to send behind the last token of the text, at most `most`."""
        self._draft_seconds = 0.0
        found = [(drafter, source) for drafter in self._drafters if (source := drafter.source()) is not None]
        chosen = self._chosen([source for _, source in found], most)
        if chosen is None:
            return NO_GUESSES
        index, count = chosen
        drafter, source = found[index]
        started = self._clock()
        tokens = tuple(drafter.guesses(count))
        self._draft_seconds = self._clock() - started
        return Guesses(tokens, source) if tokens else NO_GUESSES

    def _chosen(self, sources: Sequence[Source], most: int) -> tuple[int, int] | None:
        """The index of the source that guesses, and how many tokens; None if nothing is guessed."""
        offers = [Offer(self._acceptance(source).rate, source.seconds_each) for source in sources]
        if self._fixed is not None:
            count = min(self._fixed, most)
            likeliest = max(range(len(offers)), key=lambda index: offers[index].rate, default=None)
            return None if likeliest is None or count == 0 else (likeliest, count)
        if not self._times.is_known:
            return None
        most_seconds = self._balance.may_lose(self._times.of(1))
        return best_offer(self._times, offers, most=most, most_seconds=most_seconds)

    def judged(self, guesses: Guesses, tokens: Sequence[int]) -> None:
        """A step with these guesses gave these tokens."""
        if guesses.source is not None:
            num_right = sum(token == guess for token, guess in zip(tokens, guesses.tokens, strict=False))
            self.num_guessed += len(guesses.tokens)
            self.num_right += num_right
            self._acceptances[guesses.source.name] = self._acceptance(guesses.source).after(
                num_right=num_right, num_guesses=len(guesses.tokens)
            )
        for drafter in self._drafters:
            drafter.append(tokens)

    def timed(self, guesses: Guesses, num_tokens: int, seconds: float) -> None:
        """The step with these guesses gave `num_tokens`, and took `seconds` until the next could be sent.

        The guesses of the next were made in that time, which says nothing of how long a step takes, and is a cost.
        """
        of_step = max(0.0, seconds - self._draft_seconds)
        self._times = self._times.after(1 + len(guesses.tokens), of_step)
        plain_seconds = num_tokens * self._times.of(1) if guesses.tokens else of_step
        self._balance = self._balance.after(seconds, plain_seconds=plain_seconds)

    def _acceptance(self, source: Source) -> Acceptance:
        return self._acceptances.get(source.name, Acceptance(source.prior))
