"""Which texts a client has begun before: servers may have cached what they computed of them."""

from __future__ import annotations

from collections.abc import Sequence

MOST_NOTED = 10_000
"""The first pages that are remembered, of 16 bytes each. Servers have forgotten older ones too."""


class SentBeginnings:
    """The names of the first pages of all sequences that the client has sent to any server, the latest last."""

    def __init__(self) -> None:
        self._names: dict[bytes, None] = {}

    def note(self, names: Sequence[bytes]) -> bool:
        """Sequences that begin with the pages of these names are about to be sent; returns whether any was before."""
        was_sent = False
        for name in names:
            was_sent |= name in self._names
            self._names.pop(name, None)
            self._names[name] = None
        while len(self._names) > MOST_NOTED:
            del self._names[next(iter(self._names))]
        return was_sent
