"""What `shoal doctor` looks at: this machine, and how it stands in a swarm."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import random
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from shoal.errors import ShoalError
from shoal.model.weights.disk_cache import cache_folder
from shoal.peers import ServerState
from shoal.policy.network.reachability import Reach, by_other_machines

if TYPE_CHECKING:
    from shoal.net import NetworkConfig
    from shoal.net.transport import Node, RelayTrial
    from shoal.peers import ServerInfo

GPU_SECONDS = 5.0
MOST_ASKED = 64
"""The servers that are asked whether they answer."""
AT_ONCE = 16
ASK_SECONDS = 6.0
BANDWIDTH_SECONDS = 5.0


@dataclass(frozen=True)
class MachineFacts:
    """This machine. Sizes are in bytes. `gpus` are what the NVIDIA driver lists; `None` without a driver.

    `torch` is the version of PyTorch, with what it was built for behind a `+`; "" if it is not installed.
    """

    cores: int
    memory_free: int
    memory_total: int
    cache: Path
    cache_free: int
    cache_is_writable: bool
    gpus: tuple[str, ...] | None
    torch: str


@dataclass(frozen=True)
class Answered:
    """A server of the swarm, and the seconds of its answer; `None` if it does not answer."""

    server: ServerInfo
    seconds: float | None
    is_relayed: bool = False


@dataclass(frozen=True)
class SwarmFacts:
    """How this machine stands in a swarm, and its `own` servers there. `reach` is what other machines say.

    `up` and `down` are bytes per second with the server `partner`. The port that others dialled `is_random_port` if
    none was given. Of the `num_ways` in that a code has, no member answers at the `silent_ways`.
    """

    reach: Reach
    addresses: tuple[str, ...]
    answered: tuple[Answered, ...]
    relays: tuple[RelayTrial, ...]
    own: tuple[ServerInfo, ...]
    is_random_port: bool = False
    partner: str = ""
    up: float | None = None
    down: float | None = None
    num_ways: int = 0
    silent_ways: tuple[str, ...] = ()

    @property
    def others(self) -> tuple[Answered, ...]:
        """The servers of other machines that were asked."""
        own = {each.peer for each in self.own}
        return tuple(each for each in self.answered if each.server.peer not in own)


@dataclass(frozen=True)
class Facts:
    """All of it. `swarm` is `None` if no swarm was named, or if it was not reached for the reason `failure`."""

    machine: MachineFacts
    swarm: SwarmFacts | None = None
    failure: ShoalError | None = None


def look_at_machine() -> MachineFacts:
    """This machine, as it is now. Imports nothing slow."""
    memory, cache = psutil.virtual_memory(), cache_folder()
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = ""
    return MachineFacts(
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_free=memory.available,
        memory_total=memory.total,
        cache=cache,
        cache_free=shutil.disk_usage(there).free,
        cache_is_writable=os.access(there, os.W_OK | os.X_OK),
        gpus=_gpus(),
        torch=torch,
    )


def _gpus() -> tuple[str, ...] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = (program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=GPU_SECONDS, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())


async def look_at_swarm(network: NetworkConfig) -> SwarmFacts:
    """Join a swarm as a peer that others can dial, and see how it goes. Raises what `shoal.net.join` raises."""
    from shoal.net import join
    from shoal.net.addressing.addresses import peer_of
    from shoal.net.libp2p.identity_lock import is_used_here

    async with join(network) as node:
        models = await node.directory.models()
        found = await asyncio.gather(*(node.directory.servers(model) for model in models))
        servers = [each for of_model in found for each in of_model]
        own = tuple(each for each in servers if is_used_here(each.peer))
        answered = await _answers(node, servers)
        partner, up, down = await _bandwidth(node, [each for each in answered if each.server not in own])
        relays = await node.try_relays()
        reach = node.transport.reach
        here = {each.examiner for each in reach.reports if is_used_here(each.examiner)}
        return SwarmFacts(
            reach=by_other_machines(reach, here, has_named_relays=bool(network.relays)),
            addresses=node.transport.addresses,
            answered=answered,
            relays=tuple(each for each in relays if not is_used_here(peer_of(each.relay) or "")),
            own=own,
            is_random_port=not network.port,
            partner=partner,
            up=up,
            down=down,
        )


async def _answers(node: Node, servers: Sequence[ServerInfo]) -> tuple[Answered, ...]:
    from shoal.net.ping import ask_all

    online = [each for each in servers if each.state is ServerState.ONLINE]
    asked = random.sample(online, min(len(online), MOST_ASKED))
    found = await ask_all(node.transport, asked, max_concurrent=AT_ONCE, seconds=ASK_SECONDS)
    answered = []
    for server in (each for each in asked if each.peer in found):
        answer = found[server.peer]
        seconds, is_relayed = (None, False) if answer is None else (answer.seconds, answer.is_relayed)
        answered.append(Answered(server, seconds, is_relayed))
    return tuple(sorted(answered, key=lambda each: each.server.span))


async def _bandwidth(node: Node, answered: Sequence[Answered]) -> tuple[str, float | None, float | None]:
    """The name of the nearest server, and the bytes per second to it and from it."""
    from shoal.net.bandwidth import measure_bandwidth

    near = sorted((each for each in answered if each.seconds is not None), key=lambda each: each.seconds or 0.0)
    if not near:
        return "", None, None
    server = near[0].server
    up = down = None
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(BANDWIDTH_SECONDS):
            up, down = await measure_bandwidth(node.transport, server.peer, server.addresses)
    return server.name or server.peer[-6:], up, down
