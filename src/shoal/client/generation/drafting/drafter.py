"""What speculation needs of a source of guesses."""

# N tokens, D hidden size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Source:
    """A kind of guesses. Of two guesses of one kind, one is as likely to be right as the other.

    `prior` is the part of them that is expected to be right before any was judged. One of them takes `seconds_each` to
    make, in company if the last ones were made so.
    """

    name: str
    prior: float
    seconds_each: float = 0.0


@runtime_checkable
class Drafter(Protocol):
    """Guesses how one text goes on."""

    def append(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens."""
        ...

    def source(self) -> Source | None:
        """The kind of the guesses that it would make now; None if it has none. It makes none yet."""
        ...

    def guesses(self, count: int) -> list[int]:
        """The next tokens, at most `count`, if `source` has just said that there are some."""
        ...


@dataclass(frozen=True)
class Made:
    """Guesses of one text, and the seconds for which it waited until the last of them was there."""

    tokens: tuple[int, ...] = ()
    seconds: float = 0.0


class Company(Protocol):
    """What several drafters share, such as a model. It guesses for their texts in less time than one after another."""

    def guesses(self, wanted: Sequence[tuple[Any, int]]) -> list[Made | Exception]:
        """What the `guesses` of these drafters are, at most as many each; an exception where one fails."""
        ...


@runtime_checkable
class GuessesTogether(Drafter, Protocol):
    """A drafter that can guess in the company of others, for several texts at once."""

    @property
    def company(self) -> Company | None:
        """The drafters that have the same one guess together; with `None`, it guesses alone."""
        ...


@runtime_checkable
class LooksFurther(Drafter, Protocol):
    """A drafter that also guesses behind guesses that are not judged yet. With it, several rounds can be under way."""

    def further(self, assumed: Sequence[int], count: int) -> list[int]:
        """The next tokens, at most `count`, if the text went on with those that are `assumed`; there may be none."""
        ...


@runtime_checkable
class ReadsStates(Drafter, Protocol):
    """A drafter that guesses from the model's last hidden states, too, which the client gets from the last server."""

    def append_states(self, states_ND: Tensor) -> None:
        """Those of the tokens before the last one, N of them, after the final norm. It is told after each `append`."""
        ...


@runtime_checkable
class ReadsAhead(Drafter, Protocol):
    """A drafter that takes a while to read a text, and does it in pieces while the servers compute."""

    @property
    def is_behind(self) -> bool:
        """Whether it has more to read than a guess should wait for. Until it has read that, it has no source."""
        ...

    def read_piece(self) -> None:
        """Read a little more, if it is behind."""
        ...
