"""What a server invites others with: a description of the swarm, and the pieces of its model that are here."""

from __future__ import annotations

import asyncio
import logging
import threading

from shoal.errors import ShoalError
from shoal.joining.invitation import Invitation
from shoal.model.weights.checkpoint import Checkpoint
from shoal.model.weights.hub import HubFiles
from shoal.model.weights.pieces.peer_files import PeerFiles
from shoal.model.weights.pieces.piece_store import PieceSource
from shoal.model.weights.pieces.sources import source_of
from shoal.policy.keeping import keeps_head
from shoal.server.executor import Abandoned
from shoal.server.placing.setup import Surroundings, base_info

log = logging.getLogger(__name__)


async def invite(around: Surroundings) -> Invitation:
    """Read the weights, if they are here, and let the server invite others from now on. Returns what it invites with.

    Reading takes as long as the disk needs. A server that was invited itself passes that invitation on.
    """
    source = None
    ended = threading.Event()
    try:
        if around.config.upload_limit != 0:
            source = await around.weights.read(lambda: _source_of(around.setup.checkpoint, ended))
    except (ShoalError, OSError) as error:
        log.warning("others cannot get the weights here: %s", error)
    except Exception:  # a defect must not end a server that serves
        log.exception("others cannot get the weights here")
    finally:
        ended.set()
    invitation = around.config.invitation or _invitation(around, source)
    around.weights.offer(invitation, source)
    return invitation


async def keep_head(around: Surroundings) -> bool:
    """Fetch the embeddings and the output head from members, to pass them on. Returns whether they are here.

    Clients that came by a code need them, and the machines that began with a copy may be gone. A server with a copy
    of its own, or that gives nothing away, fetches nothing. In a large swarm, few servers do it.
    """
    config, setup = around.config, around.setup
    if not isinstance(config.files, PeerFiles) or config.upload_limit == 0:
        return False
    try:
        servers = await around.node.directory.servers(setup.model)
        if not keeps_head(around.node.transport.peer, len(servers)):
            return False
        await asyncio.to_thread(setup.checkpoint.head_tensors)  # mapped into memory, and not read
    except (ShoalError, OSError) as error:
        log.info("the embeddings and the output head are not kept here: %s", error)
        return False
    log.info("the embeddings and the output head are kept here for clients")
    return True


def _source_of(checkpoint: Checkpoint, ended: threading.Event) -> PieceSource | None:
    def check() -> None:
        if ended.is_set():
            raise Abandoned

    return source_of(checkpoint, check=check)


def _invitation(around: Surroundings, source: PieceSource | None) -> Invitation:
    config, setup = around.config, around.setup
    files = setup.checkpoint.files
    return Invitation(
        model=setup.model.name,
        key=setup.model.key,
        fingerprint=setup.fingerprint,
        dtype=base_info(config, around.node, setup).dtype,
        quantization=setup.quantization.value,
        manifest="" if source is None else source.manifest.name,
        hub=files.name if isinstance(files, HubFiles) else "",
        revision=files.commit if isinstance(files, HubFiles) else "",
    )
