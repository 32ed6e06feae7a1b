"""What a server invites others with: a description of the swarm, and the pieces of its model that are here."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from shoal.errors import ShoalError
from shoal.joining.invitation import Invitation
from shoal.model.weights.checkpoint import Checkpoint
from shoal.model.weights.hub import HubFiles
from shoal.model.weights.piece_store import PieceSource
from shoal.model.weights.pieces import source_of
from shoal.server.executor import Abandoned
from shoal.server.placing.setup import Surroundings, base_info

log = logging.getLogger(__name__)

LOWEST_PRIORITY = 19


async def invite(around: Surroundings) -> Invitation:
    """Read the weights, if they are here, and let the server invite others from now on. Returns what it invites with.

    Reading takes as long as the disk needs, at the lowest priority: tokens come first. A server that was invited itself
    passes that invitation on.
    """
    ended = threading.Event()
    reader = ThreadPoolExecutor(1, thread_name_prefix="shoal-pieces", initializer=_take_lowest_priority)
    try:
        loop = asyncio.get_running_loop()
        source = await loop.run_in_executor(reader, _source_of, around.setup.checkpoint, ended)
    except ShoalError as error:
        log.warning("others cannot get the weights here: %s", error)
        source = None
    finally:
        ended.set()
        reader.shutdown(wait=False)
    invitation = around.config.invitation or _invitation(around, source)
    around.weights.offer(invitation, source)
    return invitation


def _take_lowest_priority() -> None:
    if sys.platform == "linux":  # elsewhere, a thread has no priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)


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
        manifest="" if source is None or config.upload_limit == 0 else source.manifest.name,
        hub=files.name if isinstance(files, HubFiles) else "",
        revision=files.commit if isinstance(files, HubFiles) else "",
    )
