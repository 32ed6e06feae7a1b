"""Guesses of several texts are made: in company by drafters that share something, one after another by all others."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.client.generation.drafting.drafter import Company, Drafter, GuessesTogether, Made, Source


@dataclass(frozen=True, eq=False)
class Wish:
    """A text wants `count` guesses of this drafter at most, which are of this kind."""

    drafter: Drafter
    source: Source
    count: int


def grant(wishes: Sequence[Wish], clock: Callable[[], float] = time.perf_counter) -> list[Made | Exception]:
    """The guesses for each of these texts, or the exception with which its drafter fails."""
    found: dict[int, Made | Exception] = {}
    companies: dict[Company, list[int]] = {}
    for index, wish in enumerate(wishes):
        if isinstance(wish.drafter, GuessesTogether) and (company := wish.drafter.company) is not None:
            companies.setdefault(company, []).append(index)
        else:
            found[index] = _alone(wish, clock)
    for company, members in companies.items():
        if len(members) == 1:
            found[members[0]] = _alone(wishes[members[0]], clock)
        else:
            made = company.guesses([(wishes[each].drafter, wishes[each].count) for each in members])
            found.update(zip(members, made, strict=True))
    return [found[index] for index in range(len(wishes))]


def _alone(wish: Wish, clock: Callable[[], float]) -> Made | Exception:
    started = clock()
    try:
        tokens = tuple(wish.drafter.guesses(wish.count))
    except Exception as error:  # what a drafter does wrong is the affair of its text
        return error
    return Made(tokens, clock() - started)
