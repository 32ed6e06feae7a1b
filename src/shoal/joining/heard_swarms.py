"""What a machine that listens has heard: swarms, each once, however many members announce it. All of it is a hint."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

from shoal.errors import SwarmError
from shoal.joining.invitation import Invitation
from shoal.joining.invite_code import PRINTED_WAYS, InviteCode, Way
from shoal.joining.lan import Announcement, Lan, Record, printable

if TYPE_CHECKING:
    from shoal.net.own_addresses import Interface

log = logging.getLogger(__name__)

NOTHING_SECONDS = 5.0
"""How long a machine listens if it hears nothing: the question is repeated after one second and after three."""
QUIET_SECONDS = 1.5
"""How long it listens for others after a member was heard: answers take a tenth of a second, or the next question."""
MOST_SECONDS = 10.0
"""How long it listens at most."""
MAX_ANNOUNCEMENTS = 256
"""Members of which a machine keeps what it heard: more than a local network has, and little enough to read."""
MAX_SWARMS = 16
"""Swarms that are listed."""
MAX_WAYS_TRIED = 8
"""Ways in to one swarm that are tried: many members may have announced it, and some of them may have made theirs up."""


@dataclass(frozen=True)
class HeardSwarm:
    """A swarm that members announce: its digest, ways in, what most of the members say, and how many they are.

    `missing` are the blocks that none of these members holds, though others may. `invitation` is the swarm's own
    description, if it was fetched: it has the digest.
    """

    digest: str
    ways: tuple[Way, ...]
    says: Announcement
    num_members: int
    missing: tuple[int, ...] = ()
    invitation: Invitation | None = None

    def code(self, most: int = PRINTED_WAYS) -> InviteCode:
        """The code to join by, with this many ways in at most."""
        return InviteCode(self.digest, self.ways[:most])

    @property
    def model(self) -> str:
        """The model's name, by the invitation or else by what members say."""
        return self.says.model if self.invitation is None else printable(self.invitation.model)

    @property
    def dtype(self) -> str:
        """The same of the dtype."""
        return (self.invitation or self.says).dtype

    @property
    def quantization(self) -> str:
        """The same of the quantization."""
        return (self.invitation or self.says).quantization


class Hearing:
    """Collects announcements as they come, within limits."""

    def __init__(self) -> None:
        self._heard: dict[str, Announcement] = {}

    def take(self, name: str, record: Record | None) -> None:
        """A member of this name announces this; None: nothing any more."""
        self._heard.pop(name, None)
        if record is None or len(self._heard) >= MAX_ANNOUNCEMENTS:
            return
        try:
            self._heard[name] = Announcement.parse(record)
        except SwarmError as refusal:
            log.debug("%r announces no swarm: %s", name, refusal)

    @property
    def num_members(self) -> int:
        """Members whose announcements stand."""
        return len(self._heard)

    @property
    def swarms(self) -> tuple[HeardSwarm, ...]:
        """What was heard, those that most members announce first."""
        by_digest: dict[str, list[Announcement]] = defaultdict(list)
        for each in self._heard.values():
            by_digest[each.code.digest].append(each)
        found = (_swarm(digest, members) for digest, members in by_digest.items())
        return tuple(sorted(found, key=lambda swarm: (-swarm.num_members, swarm.model, swarm.digest)))


async def listen(
    lan: Lan, interfaces: Sequence[Interface], *, report: Callable[[Hearing], None]
) -> tuple[HeardSwarm, ...]:
    """What members announce by these interfaces. `report` is called with each change.

    It ends when nothing has been heard for a while. Raises `SwarmError` if this machine cannot listen.
    """
    hearing = Hearing()
    changed = asyncio.Event()

    def hear(name: str, record: Record | None) -> None:
        hearing.take(name, record)
        report(hearing)
        changed.set()

    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(MOST_SECONDS), lan.listening(interfaces, hear):
            while True:
                async with asyncio.timeout(QUIET_SECONDS if hearing.num_members else NOTHING_SECONDS):
                    await changed.wait()
                changed.clear()
    return hearing.swarms


def _swarm(digest: str, members: Sequence[Announcement]) -> HeardSwarm:
    facts = Counter((each.model, each.dtype, each.quantization, each.num_blocks) for each in members)
    most_said, _ = facts.most_common(1)[0]
    alike = [each for each in members if (each.model, each.dtype, each.quantization, each.num_blocks) == most_said]
    held = {block for each in alike for block in each.span}
    missing = tuple(block for block in range(alike[0].num_blocks) if block not in held)
    return HeardSwarm(digest, _ways([each.code for each in members]), alike[0], len(members), missing)


def _ways(codes: Sequence[InviteCode]) -> tuple[Way, ...]:
    """One way in to each member, then the second ones: a join should survive some members that are not there."""
    in_turn = chain.from_iterable(zip_longest(*(code.ways for code in codes)))
    return tuple(dict.fromkeys(way for way in in_turn if way is not None))[:MAX_WAYS_TRIED]
