"""A swarm of servers that may change their blocks, in one process and in virtual time.

The servers are real ones (`serve`): they choose, claim, load and serve blocks of a checkpoint on disk. Computing takes
no time, loading a block takes `LOAD_SECONDS`, and a frame travels for `TRIP_SECONDS`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.client.options.client_options import ClientOptions
from shoal.client.swarm.swarm import Swarm
from shoal.events import BlocksChanged, Event, Observers
from shoal.model.weights.checkpoint import Checkpoint
from shoal.net.memory import MemoryNetwork
from shoal.net.transport import Node
from shoal.peers import ServerInfo
from shoal.policy.machines.speed_profile import BlockTime, SpeedProfile
from shoal.policy.view import SwarmView
from shoal.server.config import ServerConfig
from shoal.server.measuring.load_times import LoadTimes
from shoal.server.placing import span_keeper
from shoal.server.placing.loaded_span import LoadedSpan
from shoal.server.placing.setup import model_info
from shoal.server.server import Server, serve
from shoal.spans import Span

from .schedules.bed import Client
from .schedules.oracle import MAX_LENGTH, NUM_BLOCKS, oracle
from .schedules.work import prompt, reading
from .tiny_models import tiny_config, tiny_model
from .virtual_time import run

LOAD_SECONDS = 3.0
"""How long a block takes to load."""
TRIP_SECONDS = 0.005
BLOCK_SPEED = 1000.0
"""Tokens per second of one block, on every server."""
DRAIN_SECONDS = 10.0
PATIENT = ClientOptions(patience_seconds=200.0)


@dataclass(eq=False)
class Member:
    """A server, dead or alive: what was told of its blocks, each with the time."""

    name: str
    node: Node
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    changes: list[tuple[float, BlocksChanged]] = field(default_factory=list)
    server: Server | None = None
    task: asyncio.Task[None] | None = None

    @property
    def span(self) -> Span | None:
        """What it holds, as far as its observers know."""
        return self.changes[-1][1].now if self.changes else None

    @property
    def moves(self) -> list[tuple[float, BlocksChanged]]:
        """Its changes from some blocks to others."""
        return [(at, change) for at, change in self.changes if change.before and change.now]


class Town:
    """The swarm. Its servers get the `options` of `ServerConfig`, and hold two of four blocks each if they choose."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.network = MemoryNetwork()
        self.network.delay(TRIP_SECONDS)
        self.members: dict[str, Member] = {}
        self.checkpoint = Checkpoint.open(folder)
        self.model = model_info(self.checkpoint)
        self._config = ServerConfig(
            model=str(folder),
            dtype="float32",
            cache_tokens=4096,
            num_blocks=2,
            drain_seconds=DRAIN_SECONDS,
            measures_network=False,
        )
        self._config = replace(self._config, **options)
        self._clients: list[MovingClient] = []

    # -- servers ------------------------------------------------------------------------------------------------------

    def begin(self, name: str, **options: Any) -> Member:
        """Start a server. It is not online when this returns."""
        member = Member(name, self.network.node(name))

        def note(event: Event) -> None:
            if isinstance(event, BlocksChanged):
                member.changes.append((asyncio.get_running_loop().time(), event))

        config = replace(self._config, name=name, **options)
        member.task = asyncio.create_task(self._serve(member, config, note), name=f"server {name}")
        self.members[name] = member
        return member

    async def start(self, *names: str, **options: Any) -> None:
        """Start servers, one after another, and wait until they are online."""
        for name in names:
            await self.until_online(self.begin(name, **options))

    async def _serve(self, member: Member, config: ServerConfig, note: Callable[[Event], None]) -> None:
        clock = asyncio.get_running_loop().time
        async with serve(replace(config, observers=(note,)), member.node, clock=clock) as member.server:
            await member.stop.wait()
        await member.node.transport.close()

    async def until_online(self, *members: Member) -> None:
        await self.until(lambda: all(member.changes for member in members))

    async def until(self, condition: Callable[[], bool], *, seconds: float = 600.0) -> None:
        """Let time pass until a condition holds. Raises what servers raise meanwhile."""
        async with asyncio.timeout(seconds):
            while not condition():
                self.check()
                await asyncio.sleep(0.01)

    def check(self) -> None:
        """Raise what a server has raised."""
        for member in self.members.values():
            if member.task is not None and member.task.done() and not member.task.cancelled():
                member.task.result()

    def kill(self, name: str) -> None:
        """End a server as SIGKILL would: its record stays until it expires."""
        member = self.members[name]
        self.network.kill(name)
        assert member.task is not None
        member.task.cancel()

    async def leave(self, name: str) -> float:
        """Tell a server to stop; returns how long it took."""
        member = self.members[name]
        assert member.task is not None
        began = asyncio.get_running_loop().time()
        member.stop.set()
        if member.server is None:
            member.task.cancel()
        await asyncio.wait([member.task])
        return asyncio.get_running_loop().time() - began

    @property
    def infos(self) -> dict[str, ServerInfo]:
        """The latest records, by peer."""
        return {record.info.peer: record.info for record in self.network.records if record.info.peer in self.members}

    @property
    def view(self) -> SwarmView:
        """The servers that live and are online, as their records say."""
        living = [info for peer, info in self.infos.items() if not self.network.faults.is_dead(peer)]
        return SwarmView(NUM_BLOCKS, tuple(living)).online()

    def holders(self, span: Span) -> list[str]:
        """The living servers that hold all blocks of a span."""
        return sorted(server.peer for server in self.view.servers if span in server.span)

    @property
    def num_moves(self) -> int:
        return sum(len(member.moves) for member in self.members.values())

    # -- clients ------------------------------------------------------------------------------------------------------

    def client(self, config: ClientOptions = PATIENT) -> MovingClient:
        client = MovingClient(self, f"client{len(self._clients)}", config)
        self._clients.append(client)
        return client

    async def close(self) -> None:
        """Everything leaves. Raises what a server raised."""
        for client in self._clients:
            await client.close()
        for name, member in self.members.items():
            if member.task is not None and not member.task.done():
                await self.leave(name)
        self.check()


class MovingClient(Client):
    """A client of servers that serve a checkpoint on disk, which is the oracle's model."""

    def __init__(self, town: Town, name: str, config: ClientOptions) -> None:
        self.name = name
        self.whole = oracle()
        self.span = Span(0, NUM_BLOCKS)
        self.told: list[Event] = []
        self.num_tokens = 0
        """How many tokens it has got so far, in all of its sessions."""
        self._town = town
        self._node = town.network.node(name)
        observers = Observers((), direct=(self.told.append,))
        self.swarm = Swarm(self._node, town.model, town.checkpoint.fingerprint, config, observers=observers)

    def enters(self, phase: str) -> None:
        self.num_tokens += phase == "decode"

    def check_streams(self) -> None:
        num_streams = self._town.network.num_streams(self.name)
        assert not num_streams, f"{num_streams} streams of {self.name} are open and unused"

    async def talk(self, num_tokens: int, *, seed: int = 0, seconds_each: float = 0.0) -> None:
        """Generate greedily after a prompt. Every token is compared with the model in one piece."""
        async with reading(self, max_length=min(MAX_LENGTH, num_tokens + 16)) as text:
            last = await text.read(prompt(1, 9, seed=seed))
            for _ in range(num_tokens):
                last = await text.say(last, 1)
                await asyncio.sleep(seconds_each)

    async def close(self) -> None:
        await self._node.transport.close()


def make_checkpoint(folder: Path) -> Path:
    """The oracle's model on disk."""
    config = tiny_config(
        "llama", num_hidden_layers=NUM_BLOCKS, max_position_embeddings=MAX_LENGTH, initializer_range=0.4
    )
    model = tiny_model(config)
    ids = torch.arange(3, 9)[None]
    assert torch.equal(model(ids, use_cache=False).logits, oracle().logits(ids, torch.ones_like(ids)))
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Stage:
    """Plays scenes in towns of the tiny model on disk."""

    folder: Path

    def play(self, scene: Callable[[Town], Awaitable[None]], **options: Any) -> None:
        """Run a scene in virtual time, and end all servers and clients."""

        async def act() -> None:
            town = Town(self.folder, **options)
            try:
                await scene(town)
            finally:
                await town.close()

        run(act())


async def together(*works: Awaitable[Any]) -> None:
    """Run these at the same time. Raises the first error as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for work in works:
                group.create_task(_awaited(work))
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _awaited(work: Awaitable[Any]) -> None:
    await work


def make_virtual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let loading take virtual time, and servers have equal speeds, whatever this machine is doing."""
    load_span, extend_span = span_keeper.load_span, span_keeper.extend_span

    async def slow(config: Any, setup: Any, span: Span, *rest: Any) -> LoadedSpan:
        await asyncio.sleep(LOAD_SECONDS * len(span))
        return await load_span(config, setup, span, *rest)

    async def slowly_extended(config: Any, setup: Any, held: LoadedSpan, wanted: Span, *rest: Any) -> LoadedSpan:
        await asyncio.sleep(LOAD_SECONDS * sum(block not in held.span for block in wanted))
        return await extend_span(config, setup, held, wanted, *rest)

    def profile(body: Any, *_: Any, **__: Any) -> SpeedProfile:
        block = BlockTime(0.0, 1 / BLOCK_SPEED)
        return SpeedProfile(len(body.span), block, block, 10, ((1, block),))

    monkeypatch.setattr(span_keeper, "load_span", slow)
    monkeypatch.setattr(span_keeper, "extend_span", slowly_extended)
    # observers are told at once, not on threads, for which virtual time does not wait
    monkeypatch.setattr("shoal.server.server.Observers", lambda observers: Observers((), direct=observers))
    monkeypatch.setattr("shoal.server.placing.loaded_span.profile_of", profile)
    monkeypatch.setattr("shoal.server.measuring.own_capacity.known_times", lambda _: LoadTimes(read=LOAD_SECONDS))
    monkeypatch.setattr("shoal.server.placing.compute_thread.uses_all_cores", lambda *_, **__: False)


def spans_of(members: Sequence[Member]) -> list[Span | None]:
    return [member.span for member in members]
