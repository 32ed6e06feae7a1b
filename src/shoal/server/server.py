"""A server, put together: it chooses blocks, loads them, says what it has, computes, and says goodbye."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import torch

from shoal.errors import UserError
from shoal.model.body import Body
from shoal.model.linear.quantization import stored_quantization
from shoal.model.loading import load_body
from shoal.model.peft.block_adapters import get_ready
from shoal.model.peft.peft_folder import PeftFolder
from shoal.model.weights import disk_cache as memo
from shoal.model.weights.checkpoint import Checkpoint
from shoal.net.transport import Node
from shoal.peers import ModelInfo, ServerInfo, ServerState
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
from shoal.server.neighbors import NeighborMonitor
from shoal.server.rpc.push_service import PushService
from shoal.server.rpc.streams import Handler
from shoal.server.speed_watch import Speeds, Watch
from shoal.server.startup_progress import Phase, Progress, Report, reporter
from shoal.server.throughput import name_of, speeds_of
from shoal.tensors import LOSSY

log = logging.getLogger(__name__)

VERSION = importlib.metadata.version("shoal")


@dataclass(frozen=True)
class Server:
    """A running server: what it announces, and the means to see how it is doing."""

    info: ServerInfo
    model: ModelInfo
    engine: Engine


@contextlib.asynccontextmanager
async def serve(config: ServerConfig, node: Node, *, report: Report = lambda progress: None) -> AsyncIterator[Server]:
    """Run a server until the context is left; then it tells the swarm and stops. `report` hears what it is doing.

    If it is cancelled before it serves, what it computes meanwhile is not waited for.
    Raises `UserError`s (`CheckpointError`, `UnsupportedModel`) for what cannot be served.
    """
    executor = Executor(config.num_threads)
    cpu_turns: CpuTurns | None = None
    serves = False
    try:
        report(Progress(Phase.OPENING))
        checkpoint = await executor.run(lambda: open_checkpoint(config))
        model = model_info(checkpoint)
        view = SwarmView(model.num_blocks, await node.directory.servers(model))
        await check_identity(node, view)
        view = view.only(lambda server: server.peer != node.transport.peer)  # what we were before a crash
        device = choose_device(config.device)
        memory = free_memory(device)
        quantization = choose_quantization(config.quantization)
        check_blocks(config, checkpoint)
        report(Progress(Phase.FINGERPRINTING))
        fingerprint = await executor.run(lambda: checkpoint.fingerprint)
        dtype = join_dtype(config.dtype, checkpoint, view)
        log.info("computing in %s on %s", dtype, device)
        span = choose_blocks(config, checkpoint, view, dtype, device)
        joining = ServerInfo(
            peer=node.transport.peer,
            span=span,
            state=ServerState.JOINING,
            fingerprint=fingerprint,
            decode_speed=None,
            prefill_speed=None,
            cache_tokens_left=0,
            dtype=str(dtype).removeprefix("torch."),
            quantization=stored_quantization(checkpoint.config) or quantization.value,
            version=VERSION,
            name=config.name,
            addresses=node.transport.addresses,
            encodings=tuple(LOSSY),
            training=config.training,
        )
        async with Announcer(node, model, joining, every_seconds=config.announce_seconds) as announcer:
            report(Progress(Phase.LOADING))
            progress = reporter(report, executor, span)
            body = await executor.run(
                lambda: load_body(
                    checkpoint, span, dtype=dtype, device=device, quantization=quantization, progress=progress
                )
            )
            await executor.run(get_ready)
            head = None
            if config.serve_head and span.end == checkpoint.num_blocks:
                head = await executor.run(lambda: load_head(checkpoint, dtype, device))
            validator = RequestValidator(
                model=model.key,
                fingerprint=joining.fingerprint,
                span=span,
                hidden_size=body.backbone.config.hidden_size,
                max_length=max_length_of(config, checkpoint),
                training=config.training,
                vocabulary=None if head is None else head.vocabulary,
            )
            cpu_turns = (
                CpuTurns(executor, folder_of_turns())
                if uses_all_cores(device, config.num_threads or torch.get_num_threads())
                else None
            )
            report(Progress(Phase.MEASURING))
            engine, speeds = await make_engine(config, body, executor, validator, cpu_turns, memory, head)
            online = replace(
                joining,
                state=ServerState.ONLINE,
                decode_speed=speeds.decode,
                prefill_speed=speeds.prefill,
                head=head is not None,
            )
            await executor.run(lambda: host_adapters(config, checkpoint, engine))
            report(Progress(Phase.ANNOUNCING))
            async with answering(config, node, model, announcer, online, engine):
                serves = True
                yield Server(online, model, engine)
    finally:
        if serves:
            executor.close()
            if cpu_turns is not None:
                cpu_turns.close()
        else:
            executor.abandon(None if cpu_turns is None else cpu_turns.close)


@contextlib.asynccontextmanager
async def answering(
    config: ServerConfig, node: Node, model: ModelInfo, announcer: Announcer, info: ServerInfo, engine: Engine
) -> AsyncIterator[None]:
    """Answer clients with what is loaded, and announce that, until the context is left; then tell all of them."""
    push_service = PushService(node.transport)
    handler = Handler(engine, push_service, idle_seconds=config.idle_seconds)
    neighbours = NeighborMonitor(
        node, model, info, every_seconds=config.announce_seconds, changed=announcer.announce_soon
    )
    async with engine.running(), push_service.running(), neighbours.measuring():
        await node.transport.listen(handler)
        try:
            await announcer.set_description(
                lambda: replace(
                    info,
                    decode_speed=engine.speeds.decode if engine.speeds else info.decode_speed,
                    prefill_speed=engine.speeds.prefill if engine.speeds else info.prefill_speed,
                    cache_tokens_left=engine.cache_tokens_left,
                    queue_length=engine.queue_length,
                    adapters=engine.adapters.announced,
                    addresses=node.transport.addresses,
                    round_trips=neighbours.round_trips,
                )
            )
            yield
        finally:
            await announcer.leave()  # before the clients are told, who look for others at once
            if config.drain_seconds:
                await handler.drain(config.drain_seconds)
            await handler.leave()


async def check_identity(node: Node, view: SwarmView) -> None:
    """Raise `UserError` if another server has our identity: the two would hide each other."""
    for server in view.servers:
        elsewhere = tuple(place for place in server.addresses if place not in node.transport.addresses)
        is_another = server.peer == node.transport.peer and len(elsewhere) == len(server.addresses) > 0
        if is_another and server.state is not ServerState.LEAVING and await node.answers_elsewhere(elsewhere):
            raise UserError(
                f"another server is the peer {server.peer} already, at {', '.join(elsewhere)}",
                hint="an identity file was copied: name another one (--identity), or leave it out",
            )


def host_adapters(config: ServerConfig, checkpoint: Checkpoint, engine: Engine) -> None:
    """Have the adapters that the config names ready for everybody."""
    for adapter in config.adapters:
        for factors in PeftFolder.open(adapter).factors(checkpoint, engine.span):
            engine.adapters.host(factors)


def open_checkpoint(config: ServerConfig) -> Checkpoint:
    """The model that the config names."""
    return Checkpoint.open(config.model, revision=config.revision, allow_uncertified=config.allow_uncertified)


def model_info(checkpoint: Checkpoint) -> ModelInfo:
    """A model as the directory knows it."""
    return ModelInfo(
        key=checkpoint.key,
        name=checkpoint.name,
        family=checkpoint.family.model_type,
        num_blocks=checkpoint.num_blocks,
    )


async def make_engine(
    config: ServerConfig,
    body: Body,
    executor: Executor,
    validator: RequestValidator,
    cpu_turns: CpuTurns | None,
    memory: int,
    head: ServerHead | None = None,
) -> tuple[Engine, Speeds]:
    """The engine of a body, with room for sessions in what is left of `memory` bytes, and how fast it is."""
    shapes = await executor.run(lambda: key_value_shapes(body)) if body.family.packable else None
    num_pages = choose_num_pages(config, body, shapes, memory)
    kind = Int8Pages if cache_dtype_of(config, body) == torch.int8 else Pages
    cache = None if shapes is None else PagedCache(body, shapes, num_pages, kind=kind)
    compute = SequentialPass(body) if cache is None else PackedPass(body, cache)
    weights = f"{validator.fingerprint}, quantization {config.quantization},"
    async with turn_of(cpu_turns):
        fact = await executor.run(lambda: name_of(body, weights=weights))
        speeds = await executor.run(
            lambda: speeds_of(body, compute, fact=fact, num_pages=num_pages, check=executor.check)
        )

    engine = Engine(
        body,
        executor,
        validator,
        compute=compute,
        cache=cache,
        num_pages=num_pages,
        cpu_turns=cpu_turns,
        pass_time=PassTimeModel(1 / speeds.decode, 1 / speeds.prefill),
        limits=replace(config.limits, activation_bytes=choose_activation_bytes(config, body)),
        head=head,
        watch=Watch(speeds, body.span, corrected=lambda _: memo.forget(fact)),
    )
    return engine, speeds
