"""What a server invites others with: a description of the swarm, and the pieces of its model that are here."""

from __future__ import annotations

import logging
import threading

from shoal.errors import ShoalError
from shoal.joining.invitation import Invitation
from shoal.model.weights.checkpoint import Checkpoint
from shoal.model.weights.hub import HubFiles
from shoal.model.weights.pieces.piece_store import PieceSource
from shoal.model.weights.pieces.pieces import source_of
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
