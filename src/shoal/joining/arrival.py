"""A machine that has nothing but an invite code: it finds members, and learns from them what the swarm serves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shoal.errors import BootstrapFailed, CheckpointError, SwarmError
from shoal.joining.asking import first_answer, invitation_from, place
from shoal.joining.invitation import Invitation
from shoal.joining.invite_code import InviteCode
from shoal.joining.piece_fetcher import PATIENCE_SECONDS, FetchFromThreads, PieceFetcher, Report
from shoal.joining.requests import Member, NoAnswer
from shoal.model.weights.disk_cache import cache_folder
from shoal.model.weights.pieces.manifest import Manifest
from shoal.model.weights.pieces.peer_files import PeerFiles
from shoal.model.weights.pieces.piece_store import PieceStore
from shoal.net import NetworkConfig, find_peers, join
from shoal.net.transport import Node
from shoal.peers import ModelInfo, ServerInfo
from shoal.protocol import MAX_BLOCKS

log = logging.getLogger(__name__)

MANIFEST = "manifest"


@dataclass(frozen=True)
class Arrival:
    """A machine in the swarm: its access to the network, the swarm's invitation, and the addresses it came by."""

    node: Node
    invitation: Invitation
    addresses: tuple[str, ...]


@contextlib.asynccontextmanager
async def arrive(code: InviteCode, network: NetworkConfig) -> AsyncIterator[Arrival]:
    """Join the swarm of an invite code, with the code's key if it is closed, and leave it at the end of the context.

    Raises `BootstrapFailed` if no member answers at the code's ways in, `SwarmError` if no member knows the invitation,
    and what `shoal.net.join` raises.
    """
    network = await network_by(code, network)
    async with join(network) as node:
        addresses = network.initial_peers
        yield Arrival(node, await invitation_of(code.digest, node, addresses), addresses)


async def network_by(code: InviteCode, network: NetworkConfig, *, waits_for_all: bool = False) -> NetworkConfig:
    """How to join the swarm of a code: through its members too, and with its key.

    Once a member has answered, others are waited for only a little longer, unless it `waits_for_all`. Raises
    `BootstrapFailed` if no member answers at the code's ways in.
    """
    peers = (*await peers_of(code, waits_for_all=waits_for_all), *network.initial_peers)
    return replace(network, initial_peers=peers, swarm_key=code.swarm_key)


async def peers_of(code: InviteCode, *, waits_for_all: bool = False) -> tuple[str, ...]:
    """The addresses of the peers that answer at a code's ways in. Raises `BootstrapFailed` if none does."""
    addresses = await find_peers(code.addresses, waits_for_all=waits_for_all)
    if not addresses:
        tried = ", ".join(f"{way.host} port {way.port}" for way in code.ways)
        raise BootstrapFailed(
            f"no member answers at {tried}", hint="ask for a fresh code (`shoal invite` prints one); is the port open?"
        )
    return addresses


async def invitation_of(digest: str, node: Node, addresses: Sequence[str]) -> Invitation:
    """The invitation with this digest, from the members at these addresses or from any other.

    Raises `SwarmError` if no member knows it.
    """

    async def ask(host: Member) -> Invitation:
        return await invitation_from(host, digest)

    places = [(address.rpartition("/")[2], (address,)) for address in addresses]
    found, reason = await first_answer(node, places, ask)
    if found is None:
        servers = [each for model in await node.directory.models() for each in await node.directory.servers(model)]
        tried = {peer for peer, _ in places}
        found, reason = await first_answer(node, [place(each) for each in servers if each.peer not in tried], ask)
    if found is None:
        raise SwarmError(
            f"no member of this swarm knows this invitation: {reason}",
            hint="the code is old or of another swarm, or its member has just started; `shoal invite` prints a new one",
        )
    return found


async def files_from_members(
    node: Node, invitation: Invitation, *, report: Report = lambda come, wanted: None
) -> PeerFiles | None:
    """The model's files. Config and tokenizer have come; weights come when they are needed. All stays in shoal's cache.

    They may be used by threads other than the event loop's only. None if members refer to the hub. Raises
    `CheckpointError` if no member gives what is needed, `SwarmError` if members give nothing and the model is not from
    the hub, and `UserError` if the disk does not take it.
    """
    if not invitation.manifest:
        if invitation.hub:
            return None
        raise SwarmError(
            "no member of this swarm gives its weights away", hint="copy the model, and use it with --initial-peers"
        )
    folder = cache_folder() / "weights" / invitation.manifest[:32]
    model = ModelInfo(key=invitation.key, name=invitation.model, family="", num_blocks=_num_blocks(invitation.key))
    manifest = await asyncio.to_thread(_saved, folder / MANIFEST, invitation.manifest)
    if manifest is None:
        manifest = await _manifest(node, await node.directory.servers(model), invitation.manifest)
        await asyncio.to_thread(_save, folder / MANIFEST, manifest)
    # The name of the folder is what Transformers, and clients of a gateway, call the model.
    store = await asyncio.to_thread(PieceStore, manifest, folder / "files" / _plain(invitation.model))
    fetcher = PieceFetcher(node, model, store, report=report)
    await fetcher.fetch([piece for file in manifest.others for piece in manifest.pieces(file)])
    await asyncio.to_thread(store.save)
    return PeerFiles(store, FetchFromThreads(fetcher), name=invitation.model)


async def _manifest(node: Node, servers: Sequence[ServerInfo], name: str) -> Manifest:
    async def ask(host: Member) -> Manifest:
        try:
            return await host.manifest(name)
        except CheckpointError as error:
            log.warning("%s sent a wrong list of the weights' pieces", host.peer)
            raise NoAnswer(str(error)) from None

    found, reason = await first_answer(node, [place(each) for each in servers], ask, patience=PATIENCE_SECONDS)
    if found is None:
        raise CheckpointError(
            f"no member of the swarm gives the list of the weights' pieces: {reason}",
            hint="try again later, or name a folder or the model's id on the hub",
        )
    return found


def _saved(path: Path, name: str) -> Manifest | None:
    try:
        return Manifest.from_bytes(path.read_bytes(), name=name)
    except (OSError, CheckpointError):
        return None


def _save(path: Path, manifest: Manifest) -> None:
    with contextlib.suppress(OSError):  # the store of the pieces tells what is wrong with the disk
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(manifest.to_bytes())


def _num_blocks(key: str) -> int:
    """The number of blocks, which a model's key tells: `llama-16x2048-1a2b3c4d`. Raises `SwarmError` for another."""
    found = re.fullmatch(r".+-(\d{1,4})x\d+-[0-9a-f]{8}", key)
    if found is None or not 0 < int(found[1]) <= MAX_BLOCKS:
        raise SwarmError(f"the invitation is for a model that there cannot be: {key!r}")
    return int(found[1])


def _plain(name: str) -> str:
    """The last part of a model's name, as the name of a folder."""
    return re.sub(r"[^\w.-]", "-", name.rpartition("/")[2], flags=re.ASCII).strip(".") or "model"
