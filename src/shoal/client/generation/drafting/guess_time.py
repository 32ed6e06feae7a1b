"""How long a model on this machine takes to guess one token: measured before its first text, and again with each."""

from __future__ import annotations

import time
from collections.abc import Callable

NEWEST = 0.1
"""What the newest measurement of the seconds of a guess counts, against all before it."""
WARM_UPS = 4
"""The model's first steps. The fastest of them says how long one takes: the very first takes longer than all others."""
MOST_MEASURED = 8
"""A guess behind more new tokens than this says little of how long others take."""


class GuessTime:
    """The seconds of one guess. `guess` makes one, of a made-up text."""

    def __init__(self, guess: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.seconds_each = min(self._seconds_of(guess) for _ in range(WARM_UPS))

    def measured(self, guess: Callable[[], list[int]], *, num_new: int) -> list[int]:
        """The guesses that this call makes, behind `num_new` new tokens. Its seconds count from now on."""
        started = self._clock()
        found = guess()
        self.took(self._clock() - started, num_guesses=len(found), num_new=num_new)
        return found

    def took(self, seconds: float, *, num_guesses: int, num_new: int) -> None:
        """So many guesses of one text, or of several in the same passes, took so long, behind `num_new` new tokens."""
        if num_new <= MOST_MEASURED and num_guesses > 0:
            self.seconds_each += NEWEST * (seconds / num_guesses - self.seconds_each)

    def _seconds_of(self, guess: Callable[[], object]) -> float:
        started = self._clock()
        guess()
        return self._clock() - started
