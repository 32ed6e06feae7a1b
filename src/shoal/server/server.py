"""A server, from its start to its end: it looks at the model and the swarm, takes blocks, and serves them.

`serve` constructs the parts. What it keeps for its whole life is here; how it takes blocks and changes them is in
`shoal.server.placing`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable

from shoal.concurrency import background, owned_task
from shoal.events import Observers
from shoal.joining.invitation import Invitation
from shoal.ledgers.priorities import Priorities
from shoal.model.peft.block_adapters import import_peft
from shoal.model.weights.pieces.peer_files import PeerFiles
from shoal.net.transport import Node, Transport
from shoal.peers import ModelInfo, ServerInfo
from shoal.policy.batching.pass_rules import rule_of
from shoal.policy.network.reachability import Reach
from shoal.server.config import ServerConfig
from shoal.server.engine.engine import Engine
from shoal.server.inviting import invite, keep_head
from shoal.server.measuring.portrait import Portrait
from shoal.server.placing.compute_thread import Compute
from shoal.server.placing.setup import Surroundings, open_checkpoint, prepare
from shoal.server.placing.span_keeper import SpanKeeper
from shoal.server.placing.span_state import SpanPhase
from shoal.server.rpc.weights_service import WeightsService
from shoal.server.startup_progress import Phase, Progress, Report


class Server:
    """A running server: what it announces, its model, and the engine of the blocks that it holds.

    `invitation` is done when the server can invite others: when it has read all weights that are here once.
    `keeps_head` is done when it has fetched the embeddings and the output head for others; its result says whether it
    does. Both are for waiting only.
    """

    def __init__(
        self,
        model: ModelInfo,
        keeper: SpanKeeper,
        transport: Transport,
        invitation: asyncio.Future[Invitation],
        keeps_head: asyncio.Future[bool],
    ) -> None:
        self.model = model
        self.invitation = invitation
        self.keeps_head = keeps_head
        self._keeper = keeper
        self._transport = transport

    @property
    def info(self) -> ServerInfo:
        """What it announces at this moment."""
        return self._keeper.announcer.info

    @property
    def reach(self) -> Reach:
        """How others reach it."""
        return self._transport.reach

    @property
    def phase(self) -> SpanPhase:
        """What it is doing about its blocks."""
        return self._keeper.state.phase

    @property
    def engine(self) -> Engine:
        """What computes its blocks. Raises `SwarmError` while it holds none, because it is changing them."""
        return self._keeper.engine


@contextlib.asynccontextmanager
async def serve(
    config: ServerConfig,
    node: Node,
    *,
    report: Report = lambda progress: None,
    clock: Callable[[], float] = time.time,
) -> AsyncIterator[Server]:
    """Run a server until the context is left. Then it announces that it leaves, and stops.

    `report` is called with each step of the start, and of each change of blocks. `clock` is the Unix time. If the start
    is cancelled, the server does not wait for what the compute thread is doing. Raises `UserError`, `CheckpointError`
    or `UnsupportedModel` for what cannot be served.
    """
    rule_of(config.scheduling)  # a wrong name is told before anything is loaded
    observers = Observers(config.observers)
    weights = WeightsService(upload_limit=config.upload_limit)
    portrait = Portrait(config, node, clock=clock)
    node = portrait.node
    priorities = Priorities(config.ledger_folder, node.transport.peer, unix_time=clock)
    with Compute(config, priorities) as compute:
        report(Progress(Phase.OPENING))
        checkpoint = await compute.executor.run(lambda: open_checkpoint(config))
        setup = await prepare(config, node, checkpoint, compute.executor, report)
        around = Surroundings(config, node, setup, compute, portrait, observers, weights, report, clock)
        keeper = SpanKeeper(around)
        # PEFT is imported while the server claims blocks, on the thread that needs it before it serves them.
        async with (
            priorities.kept(),
            background(keeper.live(), name="shoal-blocks") as living,
            owned_task(compute.executor.run(import_peft)),
        ):
            try:
                await keeper.online.wait()
                async with owned_task(invite(around)) as inviting, owned_task(keep_head(around)) as keeping:
                    yield Server(setup.model, keeper, node.transport, inviting, keeping)
            finally:
                weights.close()
                if isinstance(config.files, PeerFiles):
                    config.files.stop()
                await keeper.stop(living)
                await observers.close()
