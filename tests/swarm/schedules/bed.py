"""A swarm of the tiny model in one process, on one event loop, in virtual time.

Servers are put together from the same parts as real ones, around blocks that are loaded once for all. Computing takes
virtual time, so that a failure may come in the middle of it, and is done when that is over.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

from shoal.client.options.client_options import ClientOptions
from shoal.client.swarm.swarm import Swarm
from shoal.concurrency import now
from shoal.net.memory import MemoryNetwork
from shoal.net.transport import Node
from shoal.peers import Capacity, ModelInfo, ServerInfo, ServerState
from shoal.policy.batching.pass_times import PassTimeModel
from shoal.server.announcer import Announcer
from shoal.server.config import ServerConfig
from shoal.server.engine.engine import Engine
from shoal.server.engine.validator import RequestValidator
from shoal.server.executor import Executor
from shoal.server.kv.batch import PackedPass, Pass
from shoal.server.kv.output_head import Answer
from shoal.server.kv.paged_cache import PagedCache
from shoal.server.neighbors import NeighborMonitor
from shoal.server.refusals import leaving
from shoal.server.rpc.pushing.push_service import PushService
from shoal.server.rpc.streams import Handler
from shoal.server.speed_watch import Watch
from shoal.spans import Span

from .oracle import FINGERPRINT, Oracle, oracle

T = TypeVar("T")

TRIP_SECONDS = 0.005
"""How long a frame travels from peer to peer."""
PASS_SECONDS = 0.02
"""How long a server computes a pass."""
RESERVE_SPEED = 0.1
"""Tokens per second of a reserve: so few that a client uses it only when the other servers fail."""
PATIENT = ClientOptions(patience_seconds=200.0)
SERVER = ServerConfig(model="", idle_seconds=20.0)


class VirtualExecutor(Executor):
    """Computes on the event loop, one function after another. Each takes virtual time first."""

    def __init__(self) -> None:
        super().__init__()
        self.slowness = 1.0
        self.thawed = asyncio.Event()
        self.thawed.set()
        self._free_at = 0.0

    async def run(self, function: Callable[[], T]) -> T:
        now = asyncio.get_running_loop().time()
        self._free_at = max(now, self._free_at) + PASS_SECONDS * self.slowness
        await asyncio.sleep(self._free_at - now)
        await self.thawed.wait()
        return function()

    def timed(self, compute: Pass) -> Pass:
        """The same passes, of which it is told what it has to know for their times: nothing here."""
        return compute

    def recover(self) -> None:
        """Be as quick as before a failure."""
        self.slowness = 1.0
        self.thawed.set()


def virtual_engine(
    span: Span, executor: VirtualExecutor, *, num_pages: int, watch: Watch | None = None, whole: Oracle | None = None
) -> Engine:
    """A server's engine over some blocks of the tiny model, or of another `whole` one, in virtual time."""
    whole = whole or oracle()
    body = whole.body(span)
    cache = PagedCache(body, whole.shapes(span), num_pages)
    return Engine(
        body,
        executor,
        RequestValidator(
            model=whole.model.key,
            fingerprint=FINGERPRINT,
            span=span,
            hidden_size=whole.hidden_size,
            max_length=whole.max_length,
        ),
        compute=executor.timed(PackedPass(body, cache)),
        cache=cache,
        num_pages=num_pages,
        cpu_turns=None,
        pass_time=PassTimeModel.measured(decode_seconds=PASS_SECONDS, prefill_token_seconds=PASS_SECONDS / 100),
        limits=SERVER.limits,
        watch=watch,
    )


def round_differently(engine: Engine, seed: int) -> None:
    """From now on, the outputs of each step differ in their last bits from those of any other time and server.

    Other machines, and other batches, do that to real outputs.
    """
    step, count = engine.step, itertools.count(seed)

    async def differing(*args: Any, **options: Any) -> Answer:
        answer = await step(*args, **options)
        if "hidden" in answer:
            hidden_BTD = answer["hidden"]
            answer = {**answer, "hidden": hidden_BTD * (1 + next(count) % 8 * torch.finfo(hidden_BTD.dtype).eps)}
        return answer

    engine.step = differing  # type: ignore[method-assign]


@dataclass(eq=False)
class Member:
    """A server, dead or alive. It is `sound` while nothing is wrong with it."""

    name: str
    span: Span
    speed: float
    node: Node
    engine: Engine
    executor: VirtualExecutor
    leaving: asyncio.Event = field(default_factory=asyncio.Event)
    alive: bool = True
    sound: bool = True
    prefill_speed: float = 0.0
    capacity: Capacity | None = None
    task: asyncio.Task[None] | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.span})"


class Bed:
    """The swarm. When the context is left, all servers leave, and every page of their caches has to be free.

    `reserves` are the spans of slow servers that take the places of others. The model is the tiny one by default.
    """

    def __init__(
        self,
        spans: Sequence[str],
        reserves: Sequence[str] = (),
        *,
        cache_pages: int,
        drain_seconds: float,
        whole: Oracle | None = None,
    ) -> None:
        self.network = MemoryNetwork()
        self.whole = whole or oracle()
        self.rounds_differently = True
        self.network.delay(TRIP_SECONDS)
        self.members: list[Member] = []  # dead ones included
        self.story: list[str] = []
        self.on_phase: Callable[[str], None] = lambda phase: None
        self.phases: dict[str, str] = {}
        self._cache_pages = cache_pages
        self._config = replace(SERVER, drain_seconds=drain_seconds)
        self._spans = spans
        self._reserves = reserves

    # -- servers ------------------------------------------------------------------------------------------------------

    @property
    def living(self) -> list[Member]:
        return [member for member in self.members if member.alive]

    def start(self, span: Span, name: str | None = None, *, speed: float = 1 / PASS_SECONDS) -> Member:
        """A server that is online after one turn of the event loop."""
        name = name or f"s{len({member.name for member in self.members})}"
        executor = self._executor()
        engine = virtual_engine(span, executor, num_pages=self._cache_pages, whole=self.whole)
        if self.rounds_differently:
            round_differently(engine, seed=len(self.members))
        member = self._member(name, span, speed, engine, executor)
        serving = _serve(member, self.whole.model, self._config)
        member.task = asyncio.create_task(serving, name=f"server {name}")
        self.members.append(member)
        return member

    def _executor(self) -> VirtualExecutor:
        return VirtualExecutor()

    def _member(self, name: str, span: Span, speed: float, engine: Engine, executor: VirtualExecutor) -> Member:
        return Member(name, span, speed, self.network.node(name), engine, executor, prefill_speed=100 * speed)

    def kill(self, member: Member) -> None:
        """Its process ends, as by SIGKILL."""
        assert member.task is not None
        member.alive = member.sound = False
        self.network.kill(member.name)
        member.task.cancel()

    def dismiss(self, member: Member) -> None:
        """It is told to leave, and says goodbye."""
        member.sound = False
        member.leaving.set()

    def keep_blocks_served(self, member: Member) -> None:
        """Start one more server if no other sound one has some of the blocks of this one."""
        others = [each for each in self.living if each.sound and each is not member]
        if any(all(block not in other.span for other in others) for block in member.span):
            self.tell(f"{self.start(member.span)} joins")

    # -- clients ------------------------------------------------------------------------------------------------------

    def client(self, name: str, config: ClientOptions) -> Client:
        return Client(name, self, self.network.node(name), config)

    def enters(self, client: str, phase: str) -> None:
        """A client begins a phase of its work. A failure may be due at that moment."""
        self.phases[client] = phase
        self.on_phase(phase)

    def tell(self, what: str) -> None:
        """Note an event, for the story that is shown when a schedule fails."""
        self.story.append(f"{asyncio.get_running_loop().time():9.3f} s  {what}")

    # -- beginning and end --------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        for span in self._spans:
            self.start(Span.parse(span))
        for span in self._reserves:
            self.start(Span.parse(span), speed=RESERVE_SPEED)
        await asyncio.sleep(0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            await asyncio.sleep(2 * SERVER.idle_seconds)  # servers that missed a goodbye close idle sessions
            self._check_pages(self.living)
        for member in self.living:
            self.dismiss(member)
            member.executor.recover()
        tasks = [member.task for member in self.members if member.task is not None]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        if error is None:
            for outcome in outcomes:
                if isinstance(outcome, Exception):
                    raise outcome
            self._check_pages(self.members)

    def _check_pages(self, members: list[Member]) -> None:
        for member in members:
            member.engine.check_integrity()
            used = member.engine.cache_tokens - member.engine.cache_tokens_left
            assert not used, f"{member} keeps room for {used} tokens of no session"


async def _serve(member: Member, model: ModelInfo, config: ServerConfig) -> None:
    info = ServerInfo(
        peer=member.name,
        span=member.span,
        state=ServerState.JOINING,
        fingerprint=FINGERPRINT,
        decode_speed=member.speed,
        prefill_speed=member.prefill_speed,
        cache_tokens_left=member.engine.cache_tokens,
        dtype="float32",
        quantization="none",
        version="0",
        capacity=member.capacity,
    )

    def describe() -> ServerInfo:
        return replace(
            info,
            state=ServerState.ONLINE,
            cache_tokens_left=member.engine.cache_tokens_left,
            queue_length=member.engine.queue_length,
            adapters=member.engine.adapters.announced,
            addresses=member.node.transport.addresses,
            round_trips=neighbors.round_trips,
        )

    every_seconds = config.announce_seconds
    announcer = Announcer(member.node, model, info, every_seconds=every_seconds)
    neighbors = NeighborMonitor(
        member.node, model, describe, every_seconds=every_seconds, on_new=announcer.announce_soon
    )
    pushes = PushService(member.node.transport)
    handler = Handler(member.engine, pushes, idle_seconds=config.idle_seconds)
    async with announcer.announcing(), member.engine.running(), pushes.running(), neighbors.measuring():
        await member.node.transport.listen(handler)
        try:
            announcer.describe_by(describe)
            await announcer.announce_now()
            await member.leaving.wait()
        finally:
            await announcer.leave()
            if config.drain_seconds:
                await handler.drain(config.drain_seconds, farewell=leaving().failure)
            await handler.leave(leaving().failure)
    member.alive = False
    await member.node.transport.close()


class Client:
    """A client: its view of the swarm, and the phase of its work."""

    def __init__(self, name: str, bed: Bed, node: Node, config: ClientOptions) -> None:
        self.name = name
        self.whole = bed.whole
        self.span = Span(0, bed.whole.model.num_blocks)
        self.swarm = Swarm(node, bed.whole.model, FINGERPRINT, config, unix_time=now)
        self.bed = bed
        self._node = node

    def enters(self, phase: str) -> None:
        self.bed.enters(self.name, phase)

    def check_streams(self) -> None:
        """Check that it has closed every stream that it opened."""
        num_streams = self.bed.network.num_streams(self.name)
        assert not num_streams, f"{num_streams} streams of {self.name} are open and unused"

    async def close(self) -> None:
        await self._node.transport.close()
