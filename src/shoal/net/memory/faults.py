"""The faults of a network in memory, and the questions that it asks about them."""

from __future__ import annotations

from typing import Literal

Pair = tuple[str | None, str | None]
"""A sender and a receiver; None is any peer."""

Side = tuple[str, Literal["up", "down"]]
"""A peer, and one direction of its link."""


class Faults:
    """Which peers are dead, muted, cut off, delayed, or behind slow links."""

    def __init__(self) -> None:
        self._dead: set[str] = set()
        self._muted: set[Pair] = set()
        self._cut: set[frozenset[str]] = set()
        self._delays: dict[frozenset[str], float] = {}
        self._drops: dict[str, int] = {}
        self._rates: dict[Side, float] = {}  # bytes per second
        self._free_at: dict[Side, float] = {}

    def heal(self, *peers: str) -> None:
        """Undo all faults of these peers, or of all peers; dead peers stay dead."""

        def is_healed(*names: str | None) -> bool:
            return not peers or any(peer in names for peer in peers)

        self._muted = {pair for pair in self._muted if not is_healed(*pair)}
        self._cut = {pair for pair in self._cut if not is_healed(*pair)}
        self._delays = {pair: seconds for pair, seconds in self._delays.items() if not is_healed(*pair)}
        self._drops = {peer: left for peer, left in self._drops.items() if not is_healed(peer)}
        self._rates = {side: rate for side, rate in self._rates.items() if not is_healed(side[0])}

    def kill(self, peer: str) -> None:
        """Mark the peer as dead."""
        self._dead.add(peer)

    def revive(self, peer: str) -> None:
        """Mark the peer as alive."""
        self._dead.discard(peer)

    def is_dead(self, peer: str) -> bool:
        """Whether the peer was killed and not revived."""
        return peer in self._dead

    def mute(self, sender: str | None, receiver: str | None) -> None:
        """Hold back the frames from `sender` to `receiver`; None is any peer."""
        self._muted.add((sender, receiver))

    def is_muted(self, sender: str, receiver: str) -> bool:
        """Whether frames from `sender` to `receiver` are held back."""
        return not self._muted.isdisjoint({(sender, receiver), (sender, None), (None, receiver)})

    def cut(self, peer: str, other: str | None) -> None:
        """Make `peer` unreachable for `other`, and the reverse; None is all peers."""
        self._cut.add(frozenset((peer, other or peer)))

    def can_connect(self, one: str, other: str) -> bool:
        """Whether both are alive and not cut off from each other."""
        return not {one, other} & self._dead and self._cut.isdisjoint(map(frozenset, ({one}, {other}, {one, other})))

    def delay(self, seconds: float, *peers: str) -> None:
        """Delay all frames, those of one peer, or those between two."""
        self._delays[frozenset(peers)] = seconds

    def latency(self, one: str, other: str) -> float:
        """The seconds that a frame between the two takes: the longest delay that applies."""
        return max(self._delays.get(frozenset(pair), 0.0) for pair in ((), (one,), (other,), (one, other)))

    def limit(self, peer: str, *, up: float | None, down: float | None) -> None:
        """Let a peer send and receive only this many bytes per second; `None` is any number."""
        sides: dict[Side, float | None] = {(peer, "up"): up, (peer, "down"): down}
        for side, rate in sides.items():
            self._rates.pop(side, None)
            if rate is not None:
                self._rates[side] = rate

    def transmission(self, sender: str, receiver: str, num_bytes: int, *, now: float) -> tuple[float, float]:
        """When the first and the last byte of a frame leave that is sent now, after those before it on these links."""
        links: list[Side] = [side for side in ((sender, "up"), (receiver, "down")) if side in self._rates]
        if not links:
            return now, now
        begins = max(now, *(self._free_at.get(side, 0.0) for side in links))
        for side in links:
            self._free_at[side] = begins + num_bytes / self._rates[side]
        return begins, max(self._free_at[side] for side in links)

    def drop_after(self, peer: str, frames: int) -> None:
        """End the stream of the `frames`-th next frame that `peer` sends."""
        self._drops[peer] = frames

    def count_frame(self, sender: str) -> bool:
        """Count a frame that `sender` has just sent. Returns whether its stream ends behind it."""
        if sender not in self._drops:
            return False
        self._drops[sender] -= 1
        if self._drops[sender] > 0:
            return False
        del self._drops[sender]
        return True
