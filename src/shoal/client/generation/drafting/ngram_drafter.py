"""Guesses that repeat the text itself: what followed the last tokens where they stood before.

    text     the cat sat on the mat . the cat sat
                         └──────────┘        │
    guesses              on the mat . the ... ◀── "the cat sat" stood there before

It costs no computation, and is right where a text quotes, is rewritten, or has a form that comes again. The longer the
place that is found matches backwards, the likelier it is right, so guesses of different lengths are different kinds.
Where a text that is copied has one token changed, the old place no longer matches; it is tried all the same, one token
further on.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.client.generation.drafting.drafter import Source

LONGEST_GRAM = 3
"""Places are found by this many last tokens, or by fewer if there are none."""
MOST_PLACES = 16
"""How many places, the latest ones, are compared for each gram."""
LONGEST_MATCH = 32
"""Longer matches are not told apart."""
RESUMED = Source("resumed", 0.4)
MIN_COPIED = 4
"""How many tokens must have been copied from a place for it to be tried again after one that was changed."""
SOURCES = (
    (1, Source("match of 1", 0.1)),
    (2, Source("match of 2", 0.25)),
    (4, Source("match of 3 or 4", 0.4)),
    (8, Source("match of 5 to 8", 0.6)),
    (16, Source("match of 9 to 16", 0.75)),
    (LONGEST_MATCH, Source("longer match", 0.85)),
)
"""By the length of the match, at most: a few tokens come again by chance."""


class NgramDrafter:
    """Repeats what followed the last tokens of a text before. `source` and `guesses` change nothing."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}  # by gram: the positions behind it, the latest last
        self._place: int | None = None  # from which the next token would be copied
        self._length = 0  # how many tokens before the place are the text's last ones
        self._resumed = False  # whether a token before these was changed
        for token in tokens:
            self._record(token)
        self._search()  # once, for its end: a prompt may have many thousand tokens

    def append(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens."""
        for token in tokens:
            is_copied = self._place is not None and token == self._tokens[self._place]
            self._record(token)
            if is_copied and self._place is not None:
                self._place, self._length = self._place + 1, self._length + 1
            else:
                self._search()

    def source(self) -> Source | None:
        """How likely its guesses are right, by how they are found."""
        if self._place is None:
            return None
        if self._resumed and self._length < LONGEST_GRAM:
            return RESUMED
        return next(source for most, source in SOURCES if min(self._length, LONGEST_MATCH) <= most)

    def guesses(self, count: int) -> list[int]:
        """What followed the place that is found. Where that reaches the end of the text, it is repeated."""
        if self._place is None:
            return []
        period = len(self._tokens) - self._place
        return [self._tokens[self._place + index % period] for index in range(count)]

    def further(self, assumed: Sequence[int], count: int) -> list[int]:
        """What follows behind guesses of its own, and nothing behind others."""
        found = self.guesses(len(assumed) + count)
        return found[len(assumed) :] if found[: len(assumed)] == list(assumed) else []

    def _record(self, token: int) -> None:
        """Add a token to the text. What it follows is a place that can be found from now on."""
        end = len(self._tokens)
        for length in range(1, min(LONGEST_GRAM, end) + 1):
            places = self._places.setdefault(tuple(self._tokens[end - length :]), [])
            places.append(end)
            del places[:-MOST_PLACES]
        self._tokens.append(token)

    def _search(self) -> None:
        """Find another place, because the last token is not that of the one before."""
        found, length = self._longest_match()
        self._resumed = self._place is not None and self._length >= MIN_COPIED and length < LONGEST_GRAM
        if self._resumed and self._place is not None:
            self._place, self._length = self._place + 1, 0
        else:
            self._place, self._length = found, length

    def _longest_match(self) -> tuple[int | None, int]:
        """The latest place before which the text matches its end for longest, and for how many tokens."""
        for gram in range(min(LONGEST_GRAM, len(self._tokens)), 0, -1):
            if places := self._places.get(tuple(self._tokens[-gram:])):
                return max(((place, self._match_length(place)) for place in places), key=lambda each: each[::-1])
        return None, 0

    def _match_length(self, place: int) -> int:
        """How many tokens before a place are the last ones of the text, at most `LONGEST_MATCH`."""
        length = 0
        while length < min(LONGEST_MATCH, place) and self._tokens[place - 1 - length] == self._tokens[-1 - length]:
            length += 1
        return length
