"""Remembers the latest announcement of every server until it expires. Pure: the time is an argument."""

from __future__ import annotations

from collections.abc import Iterable

from shoal.net.records import Announcement
from shoal.peers import ModelInfo


class LatestAnnouncements:
    """The latest announcements, by model and peer.

    An announcement is valid until it expires, even if a lookup misses it: the peers that store it may answer too late
    while a batch occupies their links.
    """

    def __init__(self) -> None:
        self._by_model: dict[str, dict[str, Announcement]] = {}

    def update(self, model: ModelInfo, found: Iterable[Announcement], *, now: float) -> tuple[Announcement, ...]:
        """Add what a lookup has found. Returns the model's latest valid announcements, one for each peer, sorted by it.

        `now` is the Unix time. Announcements with another number of blocks than the model's are ignored.
        """
        remembered = [each for each in self._by_model.get(model.key, {}).values() if each.expires > now]
        latest: dict[str, Announcement] = {}
        for announcement in (*remembered, *found):
            if announcement.num_blocks == model.num_blocks:
                other = latest.setdefault(announcement.peer, announcement)
                latest[announcement.peer] = max(other, announcement, key=lambda each: each.expires)
        self._by_model[model.key] = latest
        return tuple(latest[peer] for peer in sorted(latest))
