"""What followed from texts that a client has sent: the names of pages that servers inside a ring may have cached."""

from __future__ import annotations

from collections.abc import Sequence

MOST_REMEMBERED = 50_000
"""The pages that are remembered, of some 200 bytes each."""


class RememberedPages:
    """The names of pages at places inside of rings, by the pages of the text that they followed from.

    What a server inside a ring is given follows from the text, from the place of its blocks, and from what the servers
    before it computed. Those may be others now, so a name is a guess.
    """

    def __init__(self) -> None:
        self._names: dict[bytes, bytes] = {}  # the latest last

    def note(self, place: bytes, text: Sequence[bytes], names: Sequence[bytes]) -> None:
        """At a place, the pages of these names followed from the pages of a text, both from the first one on."""
        for page, name in zip(text, names, strict=False):
            self._names.pop(place + page, None)
            self._names[place + page] = name
        while len(self._names) > MOST_REMEMBERED:
            del self._names[next(iter(self._names))]

    def names(self, place: bytes, text: Sequence[bytes]) -> list[bytes]:
        """The names of the pages that followed from the pages of this text, as far as they are remembered."""
        found: list[bytes] = []
        for page in text:
            name = self._names.get(place + page)
            if name is None:
                break
            found.append(name)
        return found

    def forget(self, place: bytes, text: Sequence[bytes]) -> None:
        """Other pages follow from this text by now."""
        for page in text:
            self._names.pop(place + page, None)
