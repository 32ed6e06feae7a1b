"""The assembly of a server: it chooses blocks, loads them, measures its speed, answers clients and leaves.

`serve` runs these steps in order. Nothing else constructs the parts of a server.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Self

import torch

from shoal.errors import UserError
from shoal.events import BlocksChanged, Observers
from shoal.model.body import Body
from shoal.model.linear.quantization import Quantization, stored_quantization
from shoal.model.loading import load_body
from shoal.model.peft.block_adapters import import_peft
from shoal.model.peft.peft_folder import PeftFolder
from shoal.model.weights import disk_cache
from shoal.model.weights.checkpoint import Checkpoint
from shoal.net.transport import Node
from shoal.peers import ModelInfo, ServerInfo, ServerState
from shoal.policy.placement.speed_profile import SpeedProfile
from shoal.policy.pass_rules import rule_of
from shoal.policy.scheduling import PassTimeModel
from shoal.policy.view import SwarmView
from shoal.server.announcer import Announcer
from shoal.server.capacity import (
    cache_dtype_of,
    check_blocks,
    choose_activation_bytes,
    choose_blocks,
    choose_device,
    choose_num_pages,
    choose_quantization,
    free_memory,
    join_dtype,
    max_length_of,
)
from shoal.server.config import ServerConfig
from shoal.server.engine.cpu_turns import CpuTurns, folder_of_turns, turn_of, uses_all_cores
from shoal.server.engine.engine import Engine
from shoal.server.engine.validator import RequestValidator
from shoal.server.executor import Executor
from shoal.server.kv.batch import PackedPass, SequentialPass
from shoal.server.kv.output_head import ServerHead, load_head
from shoal.server.kv.paged_cache import Int8Pages, PagedCache, Pages, key_value_shapes
from shoal.server.kv.sdpa_attention import SdpaAttention
from shoal.server.measuring.load_times import timed
from shoal.server.measuring.pass_timer import profile_of
from shoal.server.measuring.portrait import Portrait
from shoal.server.neighbors import NeighborMonitor
from shoal.server.rpc.push_service import PushService
from shoal.server.rpc.streams import Handler
from shoal.server.speed_watch import Speeds, Watch
from shoal.server.startup_progress import Phase, Progress, Report, reporter
from shoal.server.throughput import machine_key, speed_key, speeds_in
from shoal.spans import Span
from shoal.tensors import LOSSY

log = logging.getLogger(__name__)

VERSION = importlib.metadata.version("shoal")


@dataclass(frozen=True)
class Server:
    """A running server: what it announced when it began to answer, its model, and its engine."""

    info: ServerInfo
    model: ModelInfo
    engine: Engine


@dataclass(frozen=True)
class Choice:
    """What a server decides before it loads its blocks.

    `free_bytes` is how much memory the device had then. Caches get a part of it. `key` names the weights, their form
    and this machine, for what is remembered about them.
    """

    checkpoint: Checkpoint
    model: ModelInfo
    fingerprint: str
    span: Span
    dtype: torch.dtype
    device: torch.device
    quantization: Quantization
    free_bytes: int
    key: str


@dataclass(frozen=True)
class Loaded:
    """The parts of the model that a server computes. `head` is `None` unless it serves the output head."""

    body: Body
    head: ServerHead | None


@dataclass(frozen=True)
class CacheMemory:
    """The memory of the KV cache. `pages` is `None` for bodies that do not compute packed: their pages only count."""

    num_pages: int
    pages: PagedCache | None


class Compute:
    """The compute thread, and the turns that it takes with other servers of this machine.

    Leaving the context ends the thread. It waits for the current work only if the server `is_serving`.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.executor = Executor(config.num_threads)
        self.cpu_turns: CpuTurns | None = None
        self.is_serving = False
        self._num_threads = config.num_threads

    def share_cores(self, device: torch.device) -> None:
        """Take turns with other servers from now on, if a pass uses all cores of the machine."""
        if uses_all_cores(device, self._num_threads or torch.get_num_threads()):
            self.cpu_turns = CpuTurns(self.executor, folder_of_turns())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.is_serving:
            self.executor.abandon(None if self.cpu_turns is None else self.cpu_turns.close)
            return
        self.executor.close()
        if self.cpu_turns is not None:
            self.cpu_turns.close()


@contextlib.asynccontextmanager
async def serve(config: ServerConfig, node: Node, *, report: Report = lambda progress: None) -> AsyncIterator[Server]:
    """Run a server until the context is left. Then it announces that it leaves, and stops.

    `report` is called with each step of the start. If the start is cancelled, the server does not wait for what the
    compute thread is doing. Raises `UserError`, `CheckpointError` or `UnsupportedModel` for what cannot be served.
    """
    portrait = Portrait(config, node)
    node = portrait.node
    rule_of(config.scheduling)  # a wrong name is told before anything is loaded
    with Compute(config) as compute:
        report(Progress(Phase.OPENING))
        checkpoint = await compute.executor.run(lambda: open_checkpoint(config))
        choice = await choose(config, node, checkpoint, compute.executor, report)
        joining = await portrait.of_joining(joining_info(config, node, choice), choice, compute.executor)
        announcer = Announcer(node, choice.model, joining, every_seconds=config.announce_seconds)
        async with announcer.announcing():
            report(Progress(Phase.LOADING))
            loaded = await load(config, choice, compute.executor, report)
            compute.share_cores(choice.device)
            report(Progress(Phase.MEASURING))
            engine, profile = await make_engine(config, choice, loaded, compute)
            await portrait.add_capacity(choice, loaded.body, profile, compute.executor)
            await compute.executor.run(lambda: host_adapters(config, checkpoint, engine))
            online = portrait.of_online(online_info(joining, loaded, speeds_in(profile, choice.span)))
            report(Progress(Phase.ANNOUNCING))
            async with answering(config, node, choice.model, announcer, online, engine, portrait):
                compute.is_serving = True
                yield Server(online, choice.model, engine)


async def choose(
    config: ServerConfig, node: Node, checkpoint: Checkpoint, executor: Executor, report: Report
) -> Choice:
    """Decide what to serve, from the config, the swarm and this machine. Raises `UserError` for what is impossible."""
    model = model_info(checkpoint)
    view = SwarmView(model.num_blocks, await node.directory.servers(model))
    await check_identity(node, view)
    view = view.only(lambda server: server.peer != node.transport.peer)  # a record of this server from before a crash
    device = choose_device(config.device)
    free_bytes = free_memory(device)
    quantization = choose_quantization(config.quantization)
    check_blocks(config, checkpoint)
    report(Progress(Phase.FINGERPRINTING))
    fingerprint = await executor.run(lambda: checkpoint.fingerprint)
    dtype = join_dtype(config.dtype, checkpoint, view)
    log.info("the server computes in %s on %s", dtype, device)
    span = choose_blocks(config, checkpoint, view, dtype, device)
    weights = f"{fingerprint}, quantization {config.quantization},"
    key = await executor.run(lambda: machine_key(weights=weights, dtype=dtype, device=device))
    return Choice(checkpoint, model, fingerprint, span, dtype, device, quantization, free_bytes, key)


def joining_info(config: ServerConfig, node: Node, choice: Choice) -> ServerInfo:
    """What a server announces while it loads its blocks."""
    return ServerInfo(
        peer=node.transport.peer,
        span=choice.span,
        state=ServerState.JOINING,
        fingerprint=choice.fingerprint,
        decode_speed=None,
        prefill_speed=None,
        cache_tokens_left=0,
        dtype=str(choice.dtype).removeprefix("torch."),
        quantization=stored_quantization(choice.checkpoint.config) or choice.quantization.value,
        version=VERSION,
        name=config.name,
        addresses=node.transport.addresses,
        encodings=tuple(LOSSY),
        training=config.training,
    )


def online_info(joining: ServerInfo, loaded: Loaded, speeds: Speeds) -> ServerInfo:
    """What a server announces when it begins to answer clients."""
    return replace(
        joining,
        state=ServerState.ONLINE,
        decode_speed=speeds.decode,
        prefill_speed=speeds.prefill,
        head=loaded.head is not None,
    )


async def load(config: ServerConfig, choice: Choice, executor: Executor, report: Report) -> Loaded:
    """Load the blocks and, if the config says so and the last block is among them, the output head."""
    checkpoint, span, dtype, device = choice.checkpoint, choice.span, choice.dtype, choice.device
    seen = reporter(report, executor, span)

    def load_it(progress: Callable[[int, bool], None]) -> Body:
        return load_body(
            checkpoint, span, dtype=dtype, device=device, quantization=choice.quantization, progress=progress
        )

    body = await executor.run(lambda: timed(load_it, choice, span, seen))
    await executor.run(import_peft)
    head = None
    if config.serve_head and span.end == checkpoint.num_blocks:
        head = await executor.run(lambda: load_head(checkpoint, dtype, device))
    return Loaded(body, head)


async def make_engine(
    config: ServerConfig, choice: Choice, loaded: Loaded, compute: Compute
) -> tuple[Engine, SpeedProfile]:
    """The engine of what is loaded, with the memory of its cache, and how fast it is."""
    body = loaded.body
    memory = await make_cache(config, body, compute.executor, free_bytes=choice.free_bytes)
    pass_of = (
        SequentialPass(body) if memory.pages is None else PackedPass(body, memory.pages, SdpaAttention(memory.pages))
    )
    key = choice.key
    async with turn_of(compute.cpu_turns):
        profile = await compute.executor.run(
            lambda: profile_of(body, pass_of, key=key, num_pages=memory.num_pages, check=compute.executor.check)
        )
    speeds = speeds_in(profile, body.span)
    engine = Engine(
        body,
        compute.executor,
        make_validator(config, choice, loaded),
        compute=pass_of,
        cache=memory.pages,
        num_pages=memory.num_pages,
        cpu_turns=compute.cpu_turns,
        pass_time=PassTimeModel(1 / speeds.decode, 1 / speeds.prefill),
        limits=replace(config.limits, activation_bytes=choose_activation_bytes(config, body)),
        rule=rule_of(config.scheduling),
        head=loaded.head,
        watch=Watch(speeds, body.span, on_correction=lambda _: disk_cache.remove(speed_key(key))),
        observers=Observers(config.observers),
    )
    return engine, profile


async def make_cache(config: ServerConfig, body: Body, executor: Executor, *, free_bytes: int) -> CacheMemory:
    """The memory of the cache. `free_bytes` were free before the blocks were loaded."""
    shapes = await executor.run(lambda: key_value_shapes(body)) if body.family.packable else None
    num_pages = choose_num_pages(config, body, shapes, free_bytes)
    kind = Int8Pages if cache_dtype_of(config, body) == torch.int8 else Pages
    return CacheMemory(num_pages, None if shapes is None else PagedCache(body, shapes, num_pages, kind=kind))


def make_validator(config: ServerConfig, choice: Choice, loaded: Loaded) -> RequestValidator:
    """The check whether this server can compute a request."""
    return RequestValidator(
        model=choice.model.key,
        fingerprint=choice.fingerprint,
        span=choice.span,
        hidden_size=loaded.body.backbone.config.hidden_size,
        max_length=max_length_of(config, choice.checkpoint),
        training=config.training,
        vocabulary=None if loaded.head is None else loaded.head.vocabulary,
    )


@contextlib.asynccontextmanager
async def answering(
    config: ServerConfig,
    node: Node,
    model: ModelInfo,
    announcer: Announcer,
    info: ServerInfo,
    engine: Engine,
    portrait: Portrait | None = None,
) -> AsyncIterator[None]:
    """Answer clients and announce the state of the engine until the context is left. Then tell clients and swarm."""
    push_service = PushService(node.transport)
    handler = Handler(engine, push_service, idle_seconds=config.idle_seconds)
    neighbors = NeighborMonitor(
        node, model, info, every_seconds=config.announce_seconds, on_new=announcer.announce_soon
    )

    def describe() -> ServerInfo:
        described = replace(
            info,
            decode_speed=engine.speeds.decode if engine.speeds else info.decode_speed,
            prefill_speed=engine.speeds.prefill if engine.speeds else info.prefill_speed,
            cache_tokens_left=engine.cache_tokens_left,
            queue_length=engine.queue_length,
            adapters=engine.adapters.announced,
            addresses=node.transport.addresses,
            round_trips=neighbors.round_trips,
        )
        return described if portrait is None else portrait.of_online(described)

    def network_measuring() -> contextlib.AbstractAsyncContextManager[None]:
        if portrait is None:
            return contextlib.nullcontext()
        size = engine.validator.hidden_size
        return portrait.measuring(info, neighbors, hidden_size=size, on_change=announcer.announce_soon)

    async with engine.running(), push_service.running(), neighbors.measuring(), network_measuring():
        await node.transport.listen(handler)
        try:
            await announcer.set_description(describe)
            engine.observers.emit(BlocksChanged(None, engine.span))
            yield
        finally:
            await announcer.leave()  # first, because clients that are told look for other servers at once
            if config.drain_seconds:
                await handler.drain(config.drain_seconds)
            await handler.leave()
            engine.observers.emit(BlocksChanged(engine.span, None))
            await engine.observers.close()


async def check_identity(node: Node, view: SwarmView) -> None:
    """Raise `UserError` if another server has this identity: the two would overwrite each other's records."""
    for server in view.servers:
        elsewhere = tuple(place for place in server.addresses if place not in node.transport.addresses)
        is_another = server.peer == node.transport.peer and len(elsewhere) == len(server.addresses) > 0
        if is_another and server.state is not ServerState.LEAVING and await node.answers_elsewhere(elsewhere):
            raise UserError(
                f"another server is the peer {server.peer} already, at {', '.join(elsewhere)}",
                hint="the identity file was copied: name another file (--identity), or leave the option out",
            )


def host_adapters(config: ServerConfig, checkpoint: Checkpoint, engine: Engine) -> None:
    """Load the adapters that the config names, for all clients."""
    for adapter in config.adapters:
        for factors in PeftFolder.open(adapter).factors(checkpoint, engine.span):
            engine.adapters.host(factors)


def open_checkpoint(config: ServerConfig) -> Checkpoint:
    """The model that the config names."""
    return Checkpoint.open(config.model, revision=config.revision, allow_uncertified=config.allow_uncertified)


def model_info(checkpoint: Checkpoint) -> ModelInfo:
    """What the directory records about a model."""
    return ModelInfo(
        key=checkpoint.key,
        name=checkpoint.name,
        family=checkpoint.family.model_type,
        num_blocks=checkpoint.num_blocks,
    )
