"""Which records of the directory give way where there is no room, and which ones an answer has.

Identities are free and addresses are not. So room is shared between networks first, and between identities then: of
each network one record counts before the second one of any other. A network is what one customer has, a /24 of public
IPv4 addresses or a /64 of IPv6. Among equals, those of a wider network with fewer records come first (a /16 or a /48).

    records, by network:   A A A A A A A A A      in order:  A B C D  A B  A A A A A A A
                           B B                               the first of each network, the second of each, ...
                           C
                           D
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

RECORD_OVERHEAD_BYTES = 640
"""What the table needs for a record beside its bytes, as measured (`benchmarks/directory/memory.py`)."""
ROOM_MADE = 16
"""Where a limit is exceeded, one part in this many is given up at once, because the choice takes a look at all."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The networks from which a peer is connected: what one customer has, and what a provider has."""

    narrow: str
    wide: str


UNKNOWN = Origin("?", "?")
"""That of peers whose connection was not found, for example because it has just ended."""


@dataclass(frozen=True, slots=True)
class Held:
    """A record in the table: that of the peer `owner` under `key`, which came from `origin`.

    `origin` is `None` for this peer's own records. `since` is the time at which the owner first had a record under this
    key that has been renewed until now. Times are Unix times.
    """

    key: int
    owner: str
    origin: Origin | None
    value: bytes
    since: float
    expires: float

    @property
    def size(self) -> int:
        """The bytes that it takes in memory."""
        return len(self.value) + RECORD_OVERHEAD_BYTES


def fair_order(records: Iterable[Held]) -> list[Held]:
    """Records in the order in which they are entitled to room. Within a network the given order stays.

    This peer's own ones come first.
    """
    narrow, wide = Counter[str](), Counter[str]()
    own: list[Held] = []
    ranked: list[tuple[int, Held]] = []
    for each in records:
        if each.origin is None:
            own.append(each)
        else:
            ranked.append((narrow[each.origin.narrow], each))
            narrow[each.origin.narrow] += 1
    twice: list[tuple[int, int, Held]] = []
    for rank, each in sorted(ranked, key=lambda item: item[0]):
        assert each.origin is not None
        twice.append((rank, wide[each.origin.wide], each))
        wide[each.origin.wide] += 1
    return own + [each for _, _, each in sorted(twice, key=lambda item: item[:2])]


def gives_way(records: Iterable[Held], *, most_bytes: int) -> list[Held]:
    """The records to remove so that those that stay take at most `most_bytes`; none if all do.

    In each network, those that came last give way to those that have been renewed for longest: an expiration time says
    nothing, because the owner chooses it. This peer's own records never give way.
    """
    present = list(records)
    if sum(each.size for each in present) <= most_bytes:
        return []
    room = most_bytes - most_bytes // ROOM_MADE
    removed: list[Held] = []
    for each in fair_order(sorted(present, key=lambda each: each.since)):
        room -= each.size
        if room < 0 and each.origin is not None:
            removed.append(each)
    return removed


def shown(records: Sequence[Held], *, most_bytes: int, overhead: int) -> list[Held]:
    """The records of one key that an answer of `most_bytes` has; each takes `overhead` bytes beside its own.

    Shuffle them before, so that repeated answers show all of them.
    """
    if sum(len(each.value) + overhead for each in records) <= most_bytes:
        return list(records)
    chosen: list[Held] = []
    for each in fair_order(records):
        needed = len(each.value) + overhead
        if needed <= most_bytes:
            chosen.append(each)
            most_bytes -= needed
    return chosen
