"""The guesses of one generation: which are made, and what became of them.

A step carries guesses of the tokens behind the next one. The servers compute all of them in one pass and one trip, and
the client chooses a token at each position as it always does: with the same processors and the same random numbers. A
guess is right if it is the token that was chosen, and then the answer behind it counts too. So the text is the same as
without guesses, sampled or not, and only the number of trips differs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from shoal.client.generation.drafting.drafter import Drafter, LooksFurther, Made, ReadsAhead, ReadsStates, Source
from shoal.client.generation.drafting.wishes import Wish
from shoal.policy.speculation.acceptance import Acceptance
from shoal.policy.speculation.guess_count import Balance, Offer, best_offer
from shoal.policy.speculation.rounds_ahead import MOST_ROUNDS, tokens_ahead
from shoal.policy.speculation.step_times import StepTimes


@dataclass(frozen=True)
class Guesses:
    """The tokens that a step guesses, in order, and where they come from.

    All tokens of a step that is ahead are guesses, its first one too, which is a token of the text otherwise.
    """

    tokens: tuple[int, ...] = ()
    source: Source | None = None

    def reached(self) -> Guesses:
        """Those of a step that is ahead no more, since its first token was right."""
        return replace(self, tokens=self.tokens[1:])


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
        self._balance_ahead = Balance()  # of rounds ahead alone
        self._draft_seconds = 0.0  # which guesses took to make since the last step was timed
        self._guessing: Drafter | None = None  # whose guesses are under way
        self._is_whole = False  # whether all guesses of the last round that had some were right
        self._num_in_vain = 0  # tokens of steps ahead that did not count, since the last step was timed

    @property
    def is_behind(self) -> bool:
        """Whether a drafter has to read more of the text before it guesses."""
        return any(drafter.is_behind for drafter in self._drafters if isinstance(drafter, ReadsAhead))

    def read_piece(self) -> None:
        """Let such a drafter read a little more."""
        for drafter in self._drafters:
            if isinstance(drafter, ReadsAhead):
                drafter.read_piece()

    def wish(self, *, most: int) -> Wish | None:
        """Which drafter is to guess behind the last token of the text, and how many tokens, at most `most`."""
        found = [(drafter, source) for drafter in self._drafters if (source := drafter.source()) is not None]
        chosen = self._chosen([source for _, source in found], most)
        if chosen is None:
            return None
        index, count = chosen
        return Wish(*found[index], count)

    def granted(self, wish: Wish, made: Made) -> Guesses:
        """What to send, now that the guesses it wished for are made."""
        self._guessing = wish.drafter
        self._draft_seconds += made.seconds
        return Guesses(made.tokens, wish.source) if made.tokens else NO_GUESSES

    def further(self, under_way: Sequence[Guesses], *, most: int) -> Guesses:
        """What to send behind guesses that are not judged yet, at most `most`. The first token is a guess too."""
        drafter = self._guessing
        if not self._is_whole or len(under_way) >= MOST_ROUNDS or not isinstance(drafter, LooksFurther):
            return NO_GUESSES
        source = drafter.source()
        assumed = [token for guesses in under_way for token in guesses.tokens]
        if source is None or not assumed:
            return NO_GUESSES
        count = self._num_further(source, len(assumed), most)
        started = self._clock()
        tokens = tuple(drafter.further(assumed, count)) if count > 0 else ()
        self._draft_seconds += self._clock() - started
        return Guesses(tokens, source) if tokens else NO_GUESSES

    def _num_further(self, source: Source, num_assumed: int, most: int) -> int:
        if self._fixed is not None:
            return min(1 + self._fixed, most)
        offer = Offer(self._acceptance(source).rate, source.seconds_each)
        most_seconds = min(each.may_lose(self._times.of(1)) for each in (self._balance, self._balance_ahead))
        return tokens_ahead(self._times, offer, num_assumed=num_assumed, most=most, most_seconds=most_seconds)

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

    def judged(self, guesses: Guesses, tokens: Sequence[int], *, ahead: Sequence[Guesses] = ()) -> bool:
        """A step with these guesses gave these tokens. Returns whether the step that is `ahead`, if any, still counts.

        If it does not, none behind it does.
        """
        assumed = guesses.tokens + (ahead[0].tokens[:1] if ahead else ())
        num_right = sum(token == guess for token, guess in zip(tokens, assumed, strict=False))
        is_whole = num_right == len(assumed)
        if guesses.source is not None or ahead:
            source = guesses.source or ahead[0].source
            assert source is not None
            self.num_guessed += len(assumed)
            self.num_right += num_right
            self._acceptances[source.name] = self._acceptance(source).after(
                num_right=num_right, num_guesses=len(assumed)
            )
            self._is_whole = is_whole
            if ahead and not is_whole:
                self._num_in_vain = sum(len(each.tokens) for each in ahead)
                self.num_guessed += self._num_in_vain - 1
        for drafter in self._drafters:
            drafter.append(tokens)
        return bool(ahead) and is_whole

    @property
    def reads_states(self) -> bool:
        """Whether a drafter guesses from hidden states, too."""
        return any(isinstance(drafter, ReadsStates) for drafter in self._drafters)

    def read_states(self, states_ND: Tensor) -> None:
        """The model's last hidden states of the tokens before the newest one, since they were last told."""
        for drafter in self._drafters:
            if isinstance(drafter, ReadsStates):
                drafter.append_states(states_ND)

    def timed(self, guesses: Guesses, num_tokens: int, seconds: float, *, was_ahead: bool = False) -> None:
        """The step with these guesses gave `num_tokens`, `seconds` after the one before it.

        If it was not ahead, it was sent then: that is how long it took. The guesses of the next were made in that time,
        which says nothing of how long a step takes, and is a cost.
        """
        of_step = max(0.0, seconds - self._draft_seconds)
        if not was_ahead:
            self._times = self._times.after(1 + len(guesses.tokens), of_step)
        plain_seconds = num_tokens * self._times.of(1) if guesses.tokens or was_ahead else of_step
        self._balance = self._balance.after(seconds, plain_seconds=plain_seconds)
        alone_seconds = max(seconds, self._times.of(1 + len(guesses.tokens))) if was_ahead else seconds
        lost = self._num_in_vain * self._times.each
        self._balance_ahead = self._balance_ahead.after(seconds, plain_seconds=alone_seconds - lost)
        self._draft_seconds, self._num_in_vain = 0.0, 0

    def _acceptance(self, source: Source) -> Acceptance:
        return self._acceptances.get(source.name, Acceptance(source.prior))
