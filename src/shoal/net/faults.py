"""What is wrong between the peers of a network in memory."""

from __future__ import annotations

Pair = tuple[str | None, str | None]
"""From whom, to whom; `None` is anybody."""


class Faults:
    """Who is dead, whose frames do not arrive, who cannot reach whom, and how late frames are."""

    def __init__(self) -> None:
        self._dead: set[str] = set()
        self._silent: set[Pair] = set()
        self._cut: set[frozenset[str]] = set()
        self._delays: dict[frozenset[str], float] = {}
        self._drops: dict[str, int] = {}

    def heal(self, *peers: str) -> None:
        """Undo whatever concerns these peers, or all; the dead stay dead."""

        def heals(*names: str | None) -> bool:
            return not peers or any(peer in names for peer in peers)

        self._silent = {pair for pair in self._silent if not heals(*pair)}
        self._cut = {pair for pair in self._cut if not heals(*pair)}
        self._delays = {pair: seconds for pair, seconds in self._delays.items() if not heals(*pair)}
        self._drops = {peer: left for peer, left in self._drops.items() if not heals(peer)}

    def bury(self, peer: str) -> None:
        self._dead.add(peer)

    def revive(self, peer: str) -> None:
        self._dead.discard(peer)

    def is_dead(self, peer: str) -> bool:
        return peer in self._dead

    def silence(self, sender: str | None, receiver: str | None) -> None:
        self._silent.add((sender, receiver))

    def silent(self, sender: str, receiver: str) -> bool:
        """Whether nothing arrives that one sends the other."""
        return not self._silent.isdisjoint({(sender, receiver), (sender, None), (None, receiver)})

    def cut(self, peer: str, other: str | None) -> None:
        self._cut.add(frozenset((peer, other or peer)))

    def reachable(self, one: str, other: str) -> bool:
        return not {one, other} & self._dead and self._cut.isdisjoint(map(frozenset, ({one}, {other}, {one, other})))

    def delay(self, seconds: float, *peers: str) -> None:
        self._delays[frozenset(peers)] = seconds

    def latency(self, one: str, other: str) -> float:
        return max(self._delays.get(frozenset(pair), 0.0) for pair in ((), (one,), (other,), (one, other)))

    def drop_after(self, peer: str, frames: int) -> None:
        self._drops[peer] = frames

    def drops_now(self, sender: str) -> bool:
        """Whether the frame that was just sent is the last of its stream."""
        if sender not in self._drops:
            return False
        self._drops[sender] -= 1
        if self._drops[sender] > 0:
            return False
        del self._drops[sender]
        return True
