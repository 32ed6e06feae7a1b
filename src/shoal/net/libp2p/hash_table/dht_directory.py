"""`Directory` on hivemind's Kademlia DHT: one DHT node on this event loop, which stores signed announcements only."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P
from hivemind.p2p.p2p_daemon_bindings.utils import P2PDaemonError
from hivemind.proto import dht_pb2
from hivemind.utils import MSGPackSerializer

from shoal.errors import BootstrapFailed, SwarmError
from shoal.net.catalog import Listing
from shoal.net.identity import Identity
from shoal.net.libp2p.daemon import Daemon
from shoal.net.libp2p.daemon_reasons import plain_reason
from shoal.net.libp2p.duplicate_identity import DuplicateIdentityWatch
from shoal.net.libp2p.hash_table.dht_limits import create_node
from shoal.net.libp2p.hash_table.dht_reads import Traffic, Values, read_everywhere, read_thinly
from shoal.net.libp2p.hash_table.known_peers import KnownPeers
from shoal.net.libp2p.hash_table.opened_records import OpenedRecords
from shoal.net.libp2p.hash_table.peer_origins import PeerOrigins
from shoal.net.libp2p.hash_table.record_table import RecordTable
from shoal.net.libp2p.hash_table.record_validator import RecordValidator
from shoal.net.libp2p.hash_table.store_failures import StoreFailureLog, StoreResponses, store_failure
from shoal.net.libp2p.membership import Membership
from shoal.net.participant import Participant, Publication
from shoal.net.records import (
    CLOCK_SKEW,
    REGISTRY_SHARDS,
    Announcement,
    is_timely,
    registry_key,
    seal,
    shard_key,
    tallies_key,
)
from shoal.net.swarm_key import SwarmKey
from shoal.net.tallies import ShardTally, seal_tally
from shoal.net.tally_book import Report
from shoal.net.transport import MAX_LIFETIME
from shoal.peers import ModelInfo, ServerInfo, ServerState
from shoal.policy.census.histogram import Histogram
from shoal.policy.census.levels import Shard
from shoal.policy.network.clocks import ClockError, clock_error

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
Record = TypeVar("Record", Announcement, ShardTally)

MAX_CLOCK_REQUESTS = 5
"""The peers that are asked for their time, at once."""
BAN_SECONDS = 30
"""How long hivemind sends nothing to a peer that did not answer."""
FEW_SERVERS = 40
"""The records of a swarm with up to this many servers are read from all peers that store them."""


class DhtDirectory:
    """This peer's node of the DHT. Its owner calls `attach` with every daemon that is started, and `close` at the end.

    `stores_records`: store records for other peers, if they can dial this one. `initial_peers`: multiaddresses by which
    the node rejoins the DHT. `swarm_key`: that of a closed swarm, whose DHT answers its members only. `clock`: the Unix
    time.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        stores_records: bool,
        initial_peers: Sequence[str] = (),
        swarm_key: SwarmKey | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._identity = identity
        self._may_store = self._stores_records = stores_records
        self._clock = clock
        self._swarm_key = swarm_key
        self._node: Any = None
        self._table = RecordTable(clock=clock)
        self._opened = OpenedRecords()
        self._known_peers = KnownPeers(identity.peer, initial_peers=initial_peers, stores_records=stores_records)
        self._duplicates = DuplicateIdentityWatch(identity.peer)
        self._store_responses = StoreResponses()
        self._store_failures = StoreFailureLog()
        self._last_expiry: dict[str, float] = {}  # of this peer's own announcement, by model key
        self._traffic = Traffic()
        self._participant = Participant(
            self,
            clock=clock,
            rng=random.Random(random.getrandbits(32)),  # noqa: S311 - nothing secret
            is_client=not stores_records,
        )

    async def attach(self, daemon: Daemon, peers: Sequence[str], is_dialled: bool = True) -> None:
        """Join the DHT through these peer ids; none starts a new DHT. A later node keeps the stored records.

        A peer that others cannot dial stores nothing for them.

        Raises, if this is the first call, `BootstrapFailed` if none of the peers is part of a DHT, and `SwarmError` for
        a peer that stores records and whose clock is wrong: none would be valid.
        """
        former = self._node
        if former is not None:
            await _shut_down(former)
        self._stores_records = self._known_peers.stores_records = self._may_store and is_dialled
        p2p = await P2P.replicate(daemon.control)
        try:
            self._node = node = await create_node(
                Membership(self._identity.peer, self._swarm_key),
                self._table,
                PeerOrigins(daemon),
                p2p=p2p,
                node_id=former.node_id if former else None,
                initial_peers=[f"/p2p/{peer}" for peer in peers],
                client_mode=not self._stores_records,
                record_validator=RecordValidator(self._clock, self._on_announcement, self._opened),
                ensure_bootstrap_success=former is None,
                strict=False,
                # hivemind's defaults wait several seconds for each peer that is gone.
                wait_timeout=1,
                num_workers=16,
                blacklist_time=BAN_SECONDS,
            )
        except RuntimeError:
            await p2p.shutdown()
            if self._swarm_key is None:
                hint = "is it a shoal peer of this version, as `shoal dht` and `shoal serve` print it? If the swarm is "
                hint += "closed, use its invite code, or --swarm-key"
            else:
                hint = "is it the key of this swarm? An open swarm has none"
            raise BootstrapFailed(f"connected, but not to a swarm: {', '.join(peers)}", hint=hint) from None
        except BaseException:
            await p2p.shutdown()
            raise
        self._store_responses.watch(node.protocol)
        self._traffic.watch(node.protocol)
        self._known_peers.attach(daemon, node)
        if former is None and self._may_store and (error := await self._clock_error()) is not None:
            if not error.is_usable:
                raise SwarmError(str(error), hint=error.hint)
            logger.warning("%s; %s", error, error.hint)

    async def close(self) -> None:
        """Leave the DHT. The announcements stay until they expire: announce `LEAVING` before."""
        await self._known_peers.close()
        if self._node is not None:
            await _shut_down(self._node)

    async def announce(self, model: ModelInfo, info: ServerInfo, *, lifetime: float) -> None:
        if not 0 < lifetime <= MAX_LIFETIME:
            raise ValueError(f"a lifetime of {lifetime} s")
        before = self._traffic.num_bytes
        publication = self._participant.next_publication(model, info, lifetime=lifetime)
        if publication is None:
            return
        await self._publish(model, publication)
        self._participant.published(model, publication)
        self._participant.spent(self._traffic.num_bytes - before)
        if info.state is not ServerState.LEAVING:
            await self._report(model, publication)

    async def _publish(self, model: ModelInfo, publication: Publication) -> None:
        # Of two announcements the DHT keeps the one that expires later. So a goodbye with a short lifetime must still
        # expire after the announcement that it replaces. If that one expires too late for any peer to have stored it,
        # because the clock was wrong, it need not be replaced.
        now, last, info = publication.at, self._last_expiry.get(model.key, 0.0), publication.info
        expires = max(now + publication.lifetime, last + 0.001 if last <= now + MAX_LIFETIME + CLOCK_SKEW else 0.0)
        announcement = Announcement.of(model, info, expires=expires, level=publication.level)
        record = seal(self._identity, announcement)
        self._last_expiry[model.key] = expires
        self._store_responses.clear()
        self._duplicates.add_own(info.addresses, now=now)
        is_stored = await self._store(announcement.dht_keys, record, expires)
        # One clock tells why this peer's record is refused: that of a peer that has refused it.
        ahead = None if is_stored else next(iter(await self._seconds_ahead(self._store_responses.refused)), None)
        failure = store_failure(
            is_stored=is_stored, num_refused=len(self._store_responses.refused), seconds_ahead=ahead
        )
        self._store_failures.update(failure, seconds_ahead=ahead)

    async def _report(self, model: ModelInfo, publication: Publication) -> None:
        """Publish how many servers this server's shard has, if it is its turn."""
        report = await self._participant.report(model, publication.info)
        if report is not None:
            expires = self._clock() + publication.lifetime
            tally = ShardTally.of(self._identity.peer, model, *report, expires=expires)
            await self._store(tally.dht_keys, seal_tally(self._identity, tally), expires)

    async def _store(self, keys: Sequence[str], record: bytes, expires: float) -> bool:
        """Store a record under all of these keys, here too. Returns whether other peers store it."""
        subkeys = [self._identity.peer] * len(keys)
        records = [record] * len(keys)
        stored = await self._request(lambda node: node.store_many(list(keys), records, expires, subkeys=subkeys))
        if self._stores_records:
            # The nearest nodes to a key may be there to hide it. Of up to 20 nodes, readers ask all.
            for key in keys:
                self._table.store(DHTID.generate(key), MSGPackSerializer.dumps(record), expires, self._identity.peer)
        return all(stored.values())

    def _on_announcement(self, announcement: Announcement) -> None:
        self._known_peers.record(announcement)
        self._duplicates.record(announcement)

    async def _seconds_ahead(self, peers: Collection[Any]) -> list[float]:
        """How far this clock is ahead of those of up to `MAX_CLOCK_REQUESTS` of these peers, such as answer."""
        protocol = self._joined_node().protocol
        request = dht_pb2.PingRequest(peer=protocol.node_info)

        async def ask(peer: Any) -> float | None:
            with contextlib.suppress(Exception):  # hivemind raises many kinds; other peers may answer
                asked_at = self._clock()
                answer = await protocol.get_stub(peer).rpc_ping(request, timeout=protocol.wait_timeout)
                if answer.dht_time:
                    return float((asked_at + self._clock()) / 2 - answer.dht_time)
            return None

        chosen = random.sample(sorted(peers), min(len(peers), MAX_CLOCK_REQUESTS))
        answers = await asyncio.gather(*(ask(peer) for peer in chosen))
        return [each for each in answers if each is not None]

    async def _clock_error(self) -> ClockError | None:
        """What is wrong with this machine's clock, by what the peers in the table say the time is."""
        table = self._joined_node().protocol.routing_table.peer_id_to_uid
        return clock_error(
            await self._seconds_ahead([peer for peer in table if peer.to_base58() != self._identity.peer])
        )

    async def _explain_nothing(self) -> None:
        """The directory has no valid record. Raises `SwarmError` if the reason is this machine's clock."""
        error = await self._clock_error()
        if error is not None and not error.is_usable:
            raise SwarmError(str(error), hint=error.hint)

    async def servers(self, model: ModelInfo, *, blocks: Collection[int] = ()) -> tuple[ServerInfo, ...]:
        found = await self._participant.servers(model, blocks)
        if not found:
            await self._explain_nothing()
        return found

    async def histogram(self, model: ModelInfo) -> Histogram:
        return await self._participant.histogram(model)

    async def models(self) -> tuple[ModelInfo, ...]:
        found = await self._request(
            lambda node: read_everywhere(node, [registry_key(shard) for shard in range(REGISTRY_SHARDS)])
        )
        announcements = [
            each for key, values in found.items() for each in self._valid(key, values, self._opened.announcement)
        ]
        if not announcements:
            await self._explain_nothing()
        votes = Counter(each.model_info for each in announcements if each.state is not ServerState.LEAVING)
        # The key names the weights. Where peers differ in the other fields, the majority counts.
        chosen: dict[str, ModelInfo] = {}
        for model, _ in votes.most_common():
            chosen.setdefault(model.key, model)
        return tuple(chosen[key] for key in sorted(chosen))

    # What a `Participant` asks.

    @property
    def bytes_received(self) -> int:
        return self._traffic.num_bytes

    async def read(self, model: ModelInfo, shards: Sequence[Shard]) -> dict[Shard, list[Listing]]:
        found = await self._read(model, [shard_key(model.key, shard) for shard in shards])
        return {
            shard: [
                Listing(each.server_info, each.level, each.expires, version=each.expires)
                for each in self._valid(key, found[key], self._opened.announcement)
                if each.num_blocks == model.num_blocks
            ]
            for shard in shards
            if (key := shard_key(model.key, shard)) in found
        }

    async def read_tallies(self, model: ModelInfo, buckets: Sequence[int]) -> dict[int, list[Report]]:
        found = await self._read(model, [tallies_key(model.key, bucket) for bucket in buckets])
        return {
            bucket: [
                Report(each.peer, each.shard, each.tally, each.expires)
                for each in self._valid(key, found[key], self._opened.tally)
                if each.num_blocks == model.num_blocks
            ]
            for bucket in buckets
            if (key := tallies_key(model.key, bucket)) in found
        }

    async def _read(self, model: ModelInfo, keys: Sequence[str]) -> dict[str, list[Values]]:
        """The records under these keys. In a small swarm, all peers that store them are asked."""
        known = self._participant.num_known(model)
        if known > FEW_SERVERS or not known:
            found = await self._request(lambda node: read_thinly(node, keys, stores_records=self._stores_records))
            if known or sum(len(values) for each in found.values() for values in each) > FEW_SERVERS:
                return found
        return await self._request(lambda node: read_everywhere(node, keys))

    def _valid(
        self, key: str, found: Sequence[Values], unseal_record: Callable[[bytes], Record | None]
    ) -> Iterator[Record]:
        """The valid records under a key, unordered, some several times."""
        now = self._clock()
        for peer, value in (item for values in found for item in values.items()):
            record = unseal_record(value)
            is_here = record is not None and record.peer == peer and key in record.dht_keys
            if record is not None and is_here and is_timely(record, now=now) and record.expires > now:
                yield record

    async def _request(self, call: Callable[[Any], Awaitable[Answer]]) -> Answer:
        """What `call` returns for the node. Rejoins the DHT and repeats the call if no other peer was left in it.

        Raises `SwarmError` if no peer answers. A record has been stored on this peer even then.
        """
        node = self._joined_node()
        with translated_errors():
            for _ in range(2):
                was_isolated = self._known_peers.is_isolated
                if was_isolated:
                    await self._known_peers.rejoin()
                    node = self._joined_node()
                before = self.bytes_received
                answer = await call(node)
                has_answers = self.bytes_received > before or not self._known_peers.expects_answers
                if has_answers and not self._known_peers.is_isolated:  # often the call itself finds that out
                    return answer
                if was_isolated:
                    break
        raise SwarmError("the directory does not answer", hint="is this machine's network up?")

    def _joined_node(self) -> Any:
        if self._node is None:
            raise SwarmError("this peer has not joined a swarm")
        return self._node


async def _shut_down(node: Any) -> None:
    node.is_alive = False
    await node.protocol.close()
    await node.p2p.shutdown()


@contextlib.contextmanager
def translated_errors() -> Iterator[None]:
    """Raises `SwarmError` for hivemind's errors, for example while the daemon is being restarted."""
    try:
        yield
    except P2PDaemonError as failure:
        raise SwarmError(f"the directory cannot be reached: {plain_reason(str(failure))}") from failure
    except (OSError, EOFError) as failure:
        reason = "this machine's libp2p daemon does not answer"
        raise SwarmError(f"the directory cannot be reached: {reason}") from failure
