"""A server as a command runs it: it enters the swarm, shows how far it is, and prints what it serves and its code."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.cli.nearby.announce_swarm import announce_swarm
from shoal.cli.service.spare_memory import give_memory_back
from shoal.cli.terminal.console import ProgressReporter, waiting
from shoal.cli.terminal.notify import notify
from shoal.cli.terminal.serve_output import describe
from shoal.concurrency import in_thread, owned_task
from shoal.joining.invite_code import PRINTED_WAYS, InviteCode, in_turn, ways_of

if TYPE_CHECKING:
    from shoal.net import NetworkConfig
    from shoal.net.swarm_key import SwarmKey
    from shoal.net.transport import Node
    from shoal.server.config import ServerConfig
    from shoal.server.server import Server

CODE_SECONDS = 3.0
"""How long a server that is ready waits until it can invite others: small models are read in that time."""


async def serve_and_tell(
    configured: Callable[[], ServerConfig], network: NetworkConfig, code: InviteCode | None, *, lan: bool | None
) -> None:
    """Serve until it is cancelled.

    `configured` imports what a server needs and returns its config; it is called in a thread, while the network starts.
    `code` is that by which the server joins; `lan` is whether to announce the swarm on the local network, which a
    closed one never is.
    """
    is_new = code is None and not network.initial_peers
    with waiting("Starting the network" if is_new else "Joining the swarm") as reporter:
        async with (
            in_thread(configured) as config,
            in_swarm(config, network, code, reporter) as (node, completed, came_by),
        ):
            await _serve(node, completed, came_by, reporter, lan=lan, swarm_key=network.swarm_key)


async def _serve(
    node: Node,
    config: ServerConfig,
    came_by: Sequence[str],
    reporter: ProgressReporter,
    *,
    lan: bool | None,
    swarm_key: SwarmKey | None,
) -> None:
    from shoal.server.server import serve
    from shoal.server.startup_progress import Phase, Progress

    is_up = False

    def show(progress: Progress) -> None:
        # Hashing and downloading draw their own progress bars.
        is_local = Path(config.model).expanduser().is_dir()
        draws = progress.phase is Phase.FINGERPRINTING or (progress == Progress(Phase.LOADING) and not is_local)
        reporter.show(progress.phase, step=progress.step, spin=not draws)
        if is_up and progress.phase is Phase.ANNOUNCING:  # a change of blocks is done
            reporter.stop()
            notify(STATUS=f"Serving blocks {server.info.span}")

    async with (
        serve(config, node, report=show) as server,
        owned_task(announce_swarm(server, came_by, asked=lan if swarm_key is None else False)),
        owned_task(give_memory_back()),
    ):
        reporter.stop()
        is_up = True
        notify(READY="1", STATUS=f"Serving blocks {server.info.span}")
        await asyncio.wait({server.invitation}, timeout=CODE_SECONDS)
        code = code_of(server, came_by, swarm_key)
        print(describe(server, config, code, came_by, is_closed=swarm_key is not None), flush=True)
        if not server.invitation.done():
            await server.invitation
            if code := code_of(server, came_by, swarm_key):
                print(f"{'code':<10}{code}", flush=True)
        if await server.keeps_head:
            print(f"{'kept':<10}the embeddings and the output head, for clients without a copy", flush=True)
        await asyncio.Event().wait()


def code_of(server: Server, came_by: Sequence[str], swarm_key: SwarmKey | None) -> InviteCode | None:
    """The code by which others can join now; None if the server cannot invite them yet, or has no address.

    It leads to this server and to members by which it came: it should outlive some of them.
    """
    from shoal.net.addressing.own_addresses import bridge_hosts

    ways = ways_of(in_turn(server.info.addresses, came_by), most=PRINTED_WAYS, without=bridge_hosts())
    if not ways or not server.invitation.done():
        return None
    return InviteCode(server.invitation.result().digest, ways, swarm_key)


@contextlib.asynccontextmanager
async def in_swarm(
    config: asyncio.Future[ServerConfig],
    network: NetworkConfig,
    code: InviteCode | None,
    reporter: ProgressReporter,
) -> AsyncIterator[tuple[Node, ServerConfig, tuple[str, ...]]]:
    """Access to the swarm, the config completed by the swarm's invitation, if there is one, and by whom it came."""
    from shoal.joining.arrival import arrive, files_from_members
    from shoal.net import join

    if code is None:
        async with join(network) as node:
            yield node, await _imported(config, reporter), network.initial_peers
        return

    def show(come: int, wanted: int) -> None:
        if wanted:
            reporter.show("Getting the weights from members", step=f"{come / 1e6:,.0f} of {wanted / 1e6:,.0f} MB")

    async with arrive(code, network) as arrival:
        invitation = arrival.invitation
        files = await files_from_members(arrival.node, invitation, report=show)
        given = await _imported(config, reporter)
        completed = replace(
            given,
            model=invitation.model if files is not None else invitation.hub,
            revision=invitation.revision or None,
            files=files,
            invitation=invitation,
            dtype=invitation.dtype if given.dtype == "auto" else given.dtype,
            quantization=invitation.quantization if given.quantization == "none" else given.quantization,
        )
        yield arrival.node, completed, arrival.addresses


async def _imported(config: asyncio.Future[ServerConfig], reporter: ProgressReporter) -> ServerConfig:
    if not config.done():
        reporter.show("Importing Transformers")
    return await config
