"""The directory as a simulation has it: the newest record of each server, in the format of the live swarm."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from shoal.net.identity import SIGNATURE_BYTES
from shoal.net.records import Announcement
from shoal.peers import ModelInfo, ServerInfo, ServerState
from shoal.policy.machines.machine import Machine, machine_of, machines_of
from shoal.simulator.world.hardware import Hardware
from shoal.spans import Span

LIFETIME = 60.0
"""Seconds for which a record lives (`shoal.server.announcer`)."""


@dataclass(frozen=True)
class Notice:
    """A record: what others make of it for placement and for routes, and how many bytes it has under how many keys."""

    info: ServerInfo
    machines: tuple[Machine, ...]
    num_bytes: int
    num_keys: int


class Noticeboard:
    """The records of one model. `version` grows with every change, so that equal versions mean equal views."""

    def __init__(self, model: ModelInfo) -> None:
        self.model = model
        self.version = 0
        self._notices: dict[str, Notice] = {}
        self._serving: dict[str, Machine] = {}
        self._machines: tuple[Machine, ...] | None = None
        self._servers: tuple[ServerInfo, ...] | None = None

    def publish(self, info: ServerInfo, *, now: float) -> None:
        """Replace a server's record. What others read has the precision and the limits of real records."""
        record = Announcement.of(self.model, info, expires=now + LIFETIME)
        read = record.server_info
        num_bytes = len(record.model_dump_json()) + SIGNATURE_BYTES
        self._notices[info.peer] = Notice(read, machines_of(read, now=now), num_bytes, len(record.dht_keys))
        if (serving := machine_of(read, now=now)) is not None and info.state is ServerState.ONLINE:
            self._serving[info.peer] = serving
        self._changed()

    def remove(self, peer: str) -> None:
        """The record of a server that has gone is not read any more."""
        self._serving.pop(peer, None)
        if self._notices.pop(peer, None) is not None:
            self._changed()

    def serving(self, peer: str) -> Machine:
        """A server as it announced itself when it went online the last time, whatever it claims now."""
        return self._serving[peer]

    @property
    def peers(self) -> Set[str]:
        """All servers that have a record."""
        return self._notices.keys()

    @property
    def machines(self) -> tuple[Machine, ...]:
        """What a server reads now, as placement sees it."""
        if self._machines is None:
            self._machines = tuple(each for notice in self._notices.values() for each in notice.machines)
        return self._machines

    @property
    def servers(self) -> tuple[ServerInfo, ...]:
        """What a client reads now."""
        if self._servers is None:
            self._servers = tuple(notice.info for notice in self._notices.values())
        return self._servers

    @property
    def read_bytes(self) -> int:
        """The bytes of all records under all of their keys: what reading everything costs."""
        return sum(notice.num_bytes * notice.num_keys for notice in self._notices.values())

    def _changed(self) -> None:
        self.version += 1
        self._machines = self._servers = None


def server_info(
    peer: str,
    hardware: Hardware,
    span: Span,
    state: ServerState,
    *,
    zone: str,
    up_since: float,
    wants: Span | None = None,
    ready_at: float | None = None,
) -> ServerInfo:
    """What such a server announces about itself."""
    per_block, per_row = hardware.block_seconds(len(span))
    return ServerInfo(
        peer=peer,
        span=span,
        state=state,
        fingerprint="simulated",
        decode_speed=1 / (len(span) * (per_block + per_row)),
        prefill_speed=1 / (len(span) * per_row),
        cache_tokens_left=1 << 16,
        dtype="bfloat16",
        quantization="none",
        version="simulated",
        capacity=hardware.capacity,
        zone=zone,
        up_since=up_since,
        wants=wants,
        ready_at=ready_at,
    )
