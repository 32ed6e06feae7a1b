"""`Directory` on hivemind's Kademlia table: one node, on our own event loop, that only keeps signed announcements."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from hivemind.dht.crypto import DHTRecord
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage
from hivemind.dht.validation import RecordValidatorBase
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer

from shoal.errors import BootstrapFailed, SwarmError
from shoal.net.identity import Identity
from shoal.net.libp2p.daemon import Daemon
from shoal.net.libp2p.daemon_reasons import in_our_words
from shoal.net.libp2p.known_peers import KnownPeers
from shoal.net.libp2p.reception import Answers, Reception, fault_of
from shoal.net.libp2p.table_limits import install
from shoal.net.libp2p.twin import Twins
from shoal.net.records import (
    CLOCK_SKEW,
    MAX_RECORD_BYTES,
    REGISTRY_SHARDS,
    Announcement,
    block_key,
    is_timely,
    registry_key,
    seal,
    unseal,
)
from shoal.net.transport import MAX_LIFETIME
from shoal.peers import ModelInfo, ServerInfo, ServerState

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

ASKED_FOR_TIME = 3
"""So many of the peers that refuse a record are asked what time it is, until one tells."""
install()


class DhtDirectory:
    """A part of the swarm's table, and the way to the rest. `attach` it to every daemon that is started."""

    def __init__(
        self,
        identity: Identity,
        *,
        keeps_records: bool,
        initial_peers: Sequence[str] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._identity = identity
        self._keeps_records = keeps_records
        self._clock = clock
        self._node: Any = None
        self._others = KnownPeers(identity.peer, initial_peers=initial_peers, keeps_records=keeps_records)
        self._twins = Twins(identity.peer)
        self._answers = Answers()
        self._reception = Reception()
        self._last_expiry: dict[str, float] = {}
        self._newest: dict[str, dict[str, Announcement]] = {}  # of each model, of each peer

    async def attach(self, daemon: Daemon, peers: Sequence[str]) -> None:
        """Join the table through these peers; none begins a new one. What we kept for others is kept on.

        Raises `BootstrapFailed` if this is the first time and none of them is part of a table.
        """
        former = self._node
        if former is not None:
            former.is_alive = False
            await former.p2p.shutdown()
        p2p = await P2P.replicate(daemon.control)
        try:
            self._node = node = await DHTNode.create(
                p2p=p2p,
                node_id=former.node_id if former else None,
                initial_peers=[f"/p2p/{peer}" for peer in peers],
                client_mode=not self._keeps_records,
                record_validator=SignedRecords(self._clock, heard=self._hear),
                ensure_bootstrap_success=former is None,
                strict=False,
                # The defaults wait for seconds on each of the nodes that are gone.
                wait_timeout=1,
                num_workers=16,
                blacklist_time=30,
                # Reads must be fresh, see `_NoCache`.
                cache_locally=False,
                cache_nearest=0,
                cache_on_store=False,
                cache_refresh_before_expiry=0,
                reuse_get_requests=False,
            )
        except RuntimeError:
            await p2p.shutdown()
            hint = "is it a shoal peer of this version? `shoal dht` and `shoal serve` print the address to use"
            raise BootstrapFailed(f"connected, but not to a swarm: {', '.join(peers)}", hint=hint) from None
        except BaseException:
            await p2p.shutdown()
            raise
        node.protocol.cache = _NoCache()
        self._answers.listen(node.protocol)
        if former is not None:
            node.protocol.storage = former.protocol.storage
        self._others.attach(daemon, node)

    async def close(self) -> None:
        """Leave the table. What we announced stays until it ends: announce `LEAVING` before."""
        await self._others.close()
        if self._node is not None:
            self._node.is_alive = False
            await self._node.p2p.shutdown()

    async def announce(self, model: ModelInfo, info: ServerInfo, *, lifetime: float) -> None:
        if not 0 < lifetime <= MAX_LIFETIME:
            raise ValueError(f"a lifetime of {lifetime} s")
        # Of two announcements the one that ends later wins, so a short goodbye must still end after what it replaces.
        # One that nobody could keep, because the clock was wrong then, need not be replaced.
        now, last = self._clock(), self._last_expiry.get(model.key, 0.0)
        expires = max(now + lifetime, last + 0.001 if last <= now + MAX_LIFETIME + CLOCK_SKEW else 0.0)
        announcement = Announcement.of(model, info, expires=expires)
        record = seal(self._identity, announcement)
        self._last_expiry[model.key] = expires
        self._answers.clear()
        self._twins.announces(info.addresses, now=now)
        keys = list(announcement.table_keys)
        peer = self._identity.peer
        stored = await self._ask(
            lambda node: node.store_many(keys, [record] * len(keys), expires, subkeys=[peer] * len(keys))
        )
        is_kept = all(stored.values())
        ahead = None if is_kept else await self._seconds_ahead()
        fault = fault_of(is_kept=is_kept, num_refused=len(self._answers.refused), seconds_ahead=ahead)
        self._reception.becomes(fault, seconds_ahead=ahead)

    def _hear(self, announcement: Announcement) -> None:
        self._others.record(announcement)
        self._twins.record(announcement)

    async def _seconds_ahead(self) -> float | None:
        """How far our clock is before that of a peer that has just refused a record; `None` if none tells."""
        protocol = self._joined().protocol
        for peer in sorted(self._answers.refused)[:ASKED_FOR_TIME]:
            request = dht_pb2.PingRequest(peer=protocol.node_info)
            with contextlib.suppress(Exception):  # whatever it is, this peer does not tell
                answer = await protocol.get_stub(peer).rpc_ping(request, timeout=protocol.wait_timeout)
                if answer.dht_time:
                    return float(self._clock() - answer.dht_time)
        return None

    async def servers(self, model: ModelInfo) -> tuple[ServerInfo, ...]:
        keys = [block_key(model.key, block) for block in range(model.num_blocks)]
        found = await self._read(keys)
        # What was announced holds until it ends. Those who keep it may be late with their answer, and are then silently
        # passed over: all links are busy when a batch goes over them.
        known = [each for each in self._newest.get(model.key, {}).values() if each.expires > self._clock()]
        newest: dict[str, Announcement] = {}
        for announcement in known + found:
            if announcement.num_blocks == model.num_blocks:
                other = newest.setdefault(announcement.peer, announcement)
                newest[announcement.peer] = max(other, announcement, key=lambda each: each.expires)
        self._newest[model.key] = newest
        return tuple(newest[peer].server_info for peer in sorted(newest))

    async def models(self) -> tuple[ModelInfo, ...]:
        announcements = await self._read([registry_key(shard) for shard in range(REGISTRY_SHARDS)])
        votes = Counter(one.model_info for one in announcements if one.state is not ServerState.LEAVING)
        # A key names the weights; where peers differ on what else to call them, most are right.
        chosen: dict[str, ModelInfo] = {}
        for model, _ in votes.most_common():
            chosen.setdefault(model.key, model)
        return tuple(chosen[key] for key in sorted(chosen))

    async def _read(self, keys: Sequence[str]) -> list[Announcement]:
        """The valid announcements under these keys, in no order, some several times."""
        # NaN is later than nothing and nothing is later than it: no answer is late enough to end the search early, so
        # a stranger who claims that his is the last word does not silence the others.
        found = await self._ask(lambda node: node.get_many(keys, sufficient_expiration_time=math.nan))
        now = self._clock()
        valid = []
        for key, entry in found.items():
            for peer, value in entry.value.items() if entry is not None and isinstance(entry.value, dict) else ():
                announcement = unseal(value.value) if isinstance(value.value, bytes) else None
                if announcement is not None and announcement.peer == peer and key in announcement.table_keys:
                    valid.append(announcement)
        return [one for one in valid if is_timely(one, now=now) and one.expires > now]

    async def _ask(self, call: Callable[[Any], Awaitable[Answer]]) -> Answer:
        """What the table answers; asked again if the others were lost, which is often noticed by asking.

        Raises `SwarmError` if nobody answers. Even then a record was kept here, for whoever still reaches us.
        """
        node = self._joined()
        with _translated_errors():
            for _ in range(2):
                was_lost = self._others.lost
                if was_lost:
                    await self._others.rejoin()
                    node = self._joined()
                answer = await call(node)
                if not self._others.lost:
                    return answer
                if was_lost:
                    break
        raise SwarmError("the directory does not answer", hint="is this machine's network up?")

    def _joined(self) -> Any:
        if self._node is None:
            raise SwarmError("this peer has not joined a swarm")
        return self._node


@contextlib.contextmanager
def _translated_errors() -> Iterator[None]:
    """The table's ways of failing, such as a daemon that is being restarted, as one of ours."""
    try:
        yield
    except P2PDaemonError as failure:
        raise SwarmError(f"the directory cannot be reached: {in_our_words(str(failure))}") from failure
    except (OSError, EOFError) as failure:
        reason = "this machine's libp2p daemon does not answer"
        raise SwarmError(f"the directory cannot be reached: {reason}") from failure


class SignedRecords(RecordValidatorBase):  # type: ignore[misc]
    """Refuses whatever is not an announcement, under one of its own keys, by the peer that it is about.

    The table asks before it keeps a record for others and again when it reads one. Values without a subkey and keys
    that are none of ours are refused too: otherwise anybody overwrites them for ever.
    """

    def __init__(
        self, clock: Callable[[], float] = time.time, heard: Callable[[Announcement], None] = lambda _: None
    ) -> None:
        self._clock = clock
        self._heard = heard

    def validate(self, record: DHTRecord) -> bool:
        value = _bytes_in_msgpack(record.value)
        announcement = unseal(value) if value is not None else None
        valid = (
            announcement is not None
            and record.expiration_time == announcement.expires
            and record.subkey == MSGPackSerializer.dumps(announcement.peer)
            and is_timely(announcement, now=self._clock())
            and record.key in _digests(announcement.table_keys)
        )
        if valid and announcement is not None:
            self._heard(announcement)
        return valid


class _NoCache(DHTLocalStorage):  # type: ignore[misc]
    """Keeps nothing. hivemind answers from its cache *instead of* its storage when the cache ends later, and anybody
    may put a record of his own there: one would hide all others under that key."""

    def store(self, *_: object, **__: object) -> bool:
        return False

    def store_subkey(self, *_: object, **__: object) -> bool:
        return False


@lru_cache(maxsize=1024)
def _digests(keys: tuple[str, ...]) -> frozenset[bytes]:
    """The keys as the table knows them."""
    return frozenset(DHTID.generate(key).to_bytes() for key in keys)


def _bytes_in_msgpack(raw: object) -> bytes | None:
    """The byte string that this is the msgpack encoding of; None for anything else, which is not even decoded."""
    if not isinstance(raw, bytes) or len(raw) > MAX_RECORD_BYTES + 3:
        return None
    for value in raw[2:], raw[3:]:  # behind one byte of length, or two
        if MSGPackSerializer.dumps(value) == raw:
            return value
    return None
