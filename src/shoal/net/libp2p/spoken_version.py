"""Which version of shoal's protocol a peer speaks that does not speak this one: half of a swarm may be upgraded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from shoal.errors import BootstrapFailed
from shoal.net.libp2p.daemon import Daemon, DaemonFailed
from shoal.protocol import PROTOCOL, PROTOCOL_VERSION, UPGRADE, protocol_id, speaks_other

logger = logging.getLogger(__name__)

ASK_SECONDS = 5.0
"""How long a peer may take to say what it speaks."""
LATER_VERSIONS = 16
"""The versions after this one that a peer is asked for. Each costs a round trip, where the daemons do not know yet."""


async def spoken_version(daemon: Daemon, peer: str) -> int | None:
    """The version that a peer speaks, this one if it can; None if it takes no streams of shoal, or does not answer."""
    others = [each for each in range(PROTOCOL_VERSION + LATER_VERSIONS, 0, -1) if each != PROTOCOL_VERSION]
    by_id = {PROTOCOL: PROTOCOL_VERSION} | {protocol_id(each): each for each in others}
    try:
        async with asyncio.timeout(ASK_SECONDS):
            return by_id.get(await daemon.chosen_protocol(peer, list(by_id)))
    except (DaemonFailed, TimeoutError) as failure:
        logger.debug("%s does not say which protocol it speaks: %s", peer, failure)
        return None


async def check_versions(daemon: Daemon, peers: Sequence[str]) -> None:
    """Raises `BootstrapFailed` if none of these peers speaks this version, and some speak another.

    A bootstrap peer speaks none: it takes no streams. Where some speak this version, the log names the others.
    """
    spoken = dict(zip(peers, await asyncio.gather(*(spoken_version(daemon, each) for each in peers)), strict=True))
    others = {peer: version for peer, version in spoken.items() if version not in (None, PROTOCOL_VERSION)}
    words = "; ".join(f"{peer} {speaks_other(version)}" for peer, version in others.items() if version is not None)
    if others and PROTOCOL_VERSION not in spoken.values():
        raise BootstrapFailed(words, hint=UPGRADE)
    if others:
        logger.warning("%s: it is not used", words)
