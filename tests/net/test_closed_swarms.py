"""A closed swarm on the real network: a peer without its key meets no member, reads no list, and is not listed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from hivemind import p2p as p2p_module
from hivemind.dht import node as node_module
from hivemind.p2p import P2PHandlerError
from hivemind.proto import dht_pb2

from shoal.errors import BootstrapFailed
from shoal.net import NetworkConfig, join
from shoal.net.libp2p.membership import REQUEST, STREAM
from shoal.net.records import Announcement, seal, shard_key
from shoal.net.swarm_key import PROOF_BYTES, SwarmKey
from shoal.net.transport import Node, Stream, StreamBroken
from shoal.policy.census.levels import Shard

from .test_libp2p import MODEL, PATIENCE, echo, foreign_daemon, info

pytestmark = pytest.mark.anyio

KEY = SwarmKey(b"sixteen bytes, a")
OTHER = SwarmKey(b"sixteen bytes, b")


@asynccontextmanager
async def closed(*are_clients: bool, key: SwarmKey | None = KEY) -> AsyncIterator[list[Node]]:
    """A node that starts a swarm with a key, and members that join by it."""
    async with asyncio.timeout(PATIENCE), AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(join(NetworkConfig(host="127.0.0.1", swarm_key=key)))]
        for is_client in are_clients:
            config = NetworkConfig(nodes[0].transport.addresses, host="127.0.0.1", client_mode=is_client, swarm_key=key)
            nodes.append(await stack.enter_async_context(join(config)))
        yield nodes


async def test_members_find_each_other_and_open_streams() -> None:
    async with closed(False, True) as (first, server, client):
        await server.directory.announce(MODEL, info(server, 0, 8), lifetime=60)
        for node in first, client:
            assert await node.directory.servers(MODEL) == (info(server, 0, 8),)
        await server.transport.listen(echo)
        stream = await client.transport.open(server.transport.peer, server.transport.addresses)
        await stream.send(b"header", [b"x" * 300_000])
        assert await stream.receive() == (b"header", bytearray(b"x" * 300_000))


@pytest.mark.parametrize(("key", "hint"), [(None, "use its invite code, or --swarm-key"), (OTHER, "is it the key of")])
async def test_a_peer_without_the_key_cannot_join(key: SwarmKey | None, hint: str) -> None:
    async with closed() as (first,):
        for is_client in True, False:
            config = NetworkConfig(first.transport.addresses, host="127.0.0.1", client_mode=is_client, swarm_key=key)
            with pytest.raises(BootstrapFailed, match="connected, but not to a swarm") as failure:
                async with join(config):
                    pass
            assert hint in str(failure.value.hint)


async def test_a_member_does_not_join_an_open_swarm() -> None:
    async with closed(key=None) as (first,):
        with pytest.raises(BootstrapFailed) as failure:
            async with join(NetworkConfig(first.transport.addresses, host="127.0.0.1", swarm_key=KEY)):
                pass
        assert "An open swarm has none" in str(failure.value.hint)


async def test_streams_without_a_proof_end_before_anything_of_them_is_handled() -> None:
    async with closed(False) as (server, member), closed(key=None) as (stranger,):
        handled: list[str] = []

        async def handler(stream: Stream) -> None:
            handled.append(stream.peer)
            await echo(stream)

        await server.transport.listen(handler)
        own, peer = stranger.transport.peer, server.transport.peer
        proofs = [
            b"hello",
            bytes(PROOF_BYTES),
            OTHER.proof(STREAM, own, peer),
            KEY.proof(STREAM, member.transport.peer, peer),  # another one's
            KEY.proof(STREAM, own, member.transport.peer),  # for another one
            KEY.proof(REQUEST, own, peer),  # for something else
        ]
        for header, payload in [*((proof, b"") for proof in proofs), (KEY.proof(STREAM, own, peer), b"too much")]:
            stream = await stranger.transport.open(peer, server.transport.addresses)
            await stream.send(header, [payload])
            with pytest.raises(StreamBroken):
                await stream.receive()
        assert handled == []
        stream = await stranger.transport.open(peer, server.transport.addresses)
        await stream.send(KEY.proof(STREAM, own, peer))
        await stream.send(b"hello")
        assert (await stream.receive())[0] == b"hello"
        assert handled == [own]


async def test_the_table_answers_no_stranger_and_stores_nothing_of_one() -> None:
    async with closed(False) as (first, member), foreign_daemon(first) as (daemon, mallory):
        await member.directory.announce(MODEL, info(member, 0, 4), lifetime=60)
        p2p = await p2p_module.P2P.replicate(daemon.control)
        table = await node_module.DHTNode.create(p2p=p2p)
        victim = p2p_module.PeerID.from_base58(first.transport.peer)
        stub = table.protocol.get_stub(victim)
        digest = node_module.DHTID.generate(shard_key(MODEL.key, Shard(0, 0, 0))).to_bytes()
        record = Announcement.of(MODEL, info(member, 0, 8), expires=node_module.get_dht_time() + 60)
        sealed = seal(mallory, record.model_copy(update={"peer": mallory.peer}))
        packed = table.protocol.serializer.dumps
        requests = {
            "rpc_ping": dht_pb2.PingRequest(peer=table.protocol.node_info),
            "rpc_find": dht_pb2.FindRequest(keys=[digest], peer=table.protocol.node_info),
            "rpc_store": dht_pb2.StoreRequest(
                keys=[digest],
                subkeys=[packed(mallory.peer)],
                values=[packed(sealed)],
                expiration_time=[record.expires],
                in_cache=[False],
                peer=table.protocol.node_info,
            ),
        }
        proofs = (b"", bytes(PROOF_BYTES), KEY.proof(REQUEST, member.transport.peer, first.transport.peer))
        for name, request in requests.items():
            for proof in proofs:
                request.auth.signature = proof
                with pytest.raises(P2PHandlerError, match="this swarm is closed"):
                    await getattr(stub, name)(request, timeout=PATIENCE)
        assert {each.peer for each in await first.directory.servers(MODEL)} == {member.transport.peer}
        # The stranger's own table answers without a proof, so no member takes it for one.
        reached = await first.directory._node.protocol.call_ping(p2p_module.PeerID.from_base58(mallory.peer))
        assert reached is None
        await p2p.shutdown()
