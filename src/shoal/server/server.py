"""A server, put together: it chooses blocks, loads them, says what it has, computes, and says goodbye."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from enum import StrEnum

import psutil
import torch

from shoal.errors import UserError
from shoal.model.body import Body, build_body
from shoal.model.checkpoint import Checkpoint
from shoal.net.transport import ModelInfo, Node
from shoal.routing.placement import CACHE_SHARE, choose_num_blocks, choose_span
from shoal.routing.view import SwarmView
from shoal.server.config import ServerConfig
from shoal.server.engine import Engine
from shoal.server.executor import Executor, Priority
from shoal.server.handler import Handler
from shoal.server.throughput import Speeds, measure
from shoal.spans import ServerInfo, ServerState, Span

log = logging.getLogger(__name__)

VERSION = importlib.metadata.version("shoal")
MOST_CACHE_TOKENS = 1 << 20


class Phase(StrEnum):
    """What a server does before it serves, in this order; the values are for people."""

    OPENING = "Looking at the model"
    FINGERPRINTING = "Fingerprinting the weights"
    LOADING = "Loading the blocks and measuring their speed"


@dataclass(frozen=True)
class Server:
    """A running server: what it announces, and the means to see how it is doing."""

    info: ServerInfo
    model: ModelInfo
    engine: Engine


@contextlib.asynccontextmanager
async def serve(
    config: ServerConfig, node: Node, *, report: Callable[[Phase], None] = lambda phase: None
) -> AsyncIterator[Server]:
    """Run a server until the context is left; then it tells the swarm and stops. `report` hears what it is doing.

    Raises `UserError`s (`CheckpointError`, `UnsupportedModel`) for what cannot be served.
    """
    executor = Executor()
    try:
        report(Phase.OPENING)
        checkpoint = await executor.run(Priority.PREFILL, lambda: open_checkpoint(config))
        model = model_info(checkpoint)
        view = SwarmView(model.num_blocks, await node.directory.servers(model))
        device = choose_device(config.device)
        dtype = choose_dtype(config.dtype, checkpoint)
        span = choose_blocks(config, checkpoint, view, device)
        report(Phase.FINGERPRINTING)
        info = ServerInfo(
            peer=node.transport.peer,
            span=span,
            state=ServerState.JOINING,
            fingerprint=await executor.run(Priority.PREFILL, lambda: checkpoint.fingerprint),
            decode_speed=0.0,
            prefill_speed=0.0,
            cache_tokens_left=0,
            dtype=str(dtype).removeprefix("torch."),
            quantization="none",
            version=VERSION,
            name=config.name,
            addresses=node.transport.addresses,
        )
        lifetime = 3 * config.announce_seconds
        await node.directory.announce(model, info, lifetime=lifetime)
        report(Phase.LOADING)
        try:
            body, speeds = await executor.run(Priority.PREFILL, lambda: load(checkpoint, span, dtype, device))
        except BaseException:  # nobody shall count on blocks that will never come
            await node.directory.announce(model, replace(info, state=ServerState.LEAVING), lifetime=lifetime + 1)
            raise
        engine = Engine(
            body,
            executor,
            model=model.key,
            fingerprint=info.fingerprint,
            cache_tokens=config.cache_tokens or choose_cache_tokens(checkpoint, span, dtype, device),
            max_length=max_length_of(config, checkpoint),
        )
        info = replace(info, state=ServerState.ONLINE, decode_speed=speeds.decode, prefill_speed=speeds.prefill)
        handler = Handler(engine, idle_seconds=config.idle_seconds)
        await node.transport.listen(handler)
        try:
            async with _announced(node, model, info, engine, config):
                yield Server(info, model, engine)
        finally:
            await handler.leave()
    finally:
        executor.close()


@contextlib.asynccontextmanager
async def _announced(
    node: Node, model: ModelInfo, info: ServerInfo, engine: Engine, config: ServerConfig
) -> AsyncIterator[None]:
    """Keep the server's record in the directory fresh, and take it back at the end, so that nobody waits for it."""
    lifetime = 3 * config.announce_seconds

    async def announce() -> None:
        now = replace(info, cache_tokens_left=engine.cache_tokens_left, addresses=node.transport.addresses)
        await node.directory.announce(model, now, lifetime=lifetime)

    async def keep_announcing() -> None:
        while True:
            await asyncio.sleep(config.announce_seconds)
            await announce()

    await announce()
    task = asyncio.create_task(keep_announcing())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await node.directory.announce(model, replace(info, state=ServerState.LEAVING), lifetime=lifetime + 1)


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


def choose_blocks(config: ServerConfig, checkpoint: Checkpoint, view: SwarmView, device: torch.device) -> Span:
    """The span that was asked for, or the one that helps the swarm most and fits into memory."""
    if config.blocks is not None:
        if config.blocks.end > checkpoint.num_blocks:
            raise UserError(
                f"{checkpoint.name} has {checkpoint.num_blocks} blocks; there is no span {config.blocks} of them"
            )
        return config.blocks
    memory = free_memory(device)
    num_blocks = config.num_blocks or choose_num_blocks(memory, checkpoint.block_bytes)
    if num_blocks == 0:
        largest = max(checkpoint.block_bytes)
        raise UserError(
            f"a block of {checkpoint.name} takes {largest / 2**30:.1f} GiB and {memory / 2**30:.1f} GiB are free",
            hint="free some memory, or name the blocks yourself: --num-blocks 1",
        )
    if num_blocks > checkpoint.num_blocks:
        raise UserError(f"{checkpoint.name} has only {checkpoint.num_blocks} blocks")
    span = choose_span(view.throughput(), num_blocks=num_blocks)
    log.info("serving blocks %s of %d: %.1f GiB are free", span, checkpoint.num_blocks, memory / 2**30)
    return span


def choose_device(name: str) -> torch.device:
    """The device that was asked for. Raises `UserError` if this machine, or its PyTorch, has none."""
    device = torch.device(name)
    usable = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not usable.get(device.type, False):
        raise UserError(
            f"PyTorch {torch.__version__} finds no device {name!r} here",
            hint="use --device cpu, or install a PyTorch and a driver that know it",
        )
    return device


def choose_dtype(name: str, checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that was asked for; "auto" is the checkpoint's own."""
    if name == "auto":
        stored = checkpoint.config.get_text_config(decoder=True).dtype
        return stored if isinstance(stored, torch.dtype) else torch.float32
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise UserError(f"{name!r} is no dtype to compute in", hint="auto, float32, bfloat16 or float16")
    return dtypes[name]


def free_memory(device: torch.device) -> int:
    """Bytes that may be used on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def choose_cache_tokens(checkpoint: Checkpoint, span: Span, dtype: torch.dtype, device: torch.device) -> int:
    """How many tokens' keys and values, over all blocks of the span, a fair part of what memory is left holds."""
    config = checkpoint.config.get_text_config(decoder=True)
    num_heads = getattr(config, "num_attention_heads", None) or 1
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    token_bytes = 2 * num_kv_heads * head_dim * dtype.itemsize * len(span)
    return int(min(free_memory(device) * CACHE_SHARE // token_bytes, MOST_CACHE_TOKENS))


def max_length_of(config: ServerConfig, checkpoint: Checkpoint) -> int:
    """The longest sequence that the model was made for."""
    text = checkpoint.config.get_text_config(decoder=True)
    return getattr(text, "max_position_embeddings", None) or config.max_length


def load(checkpoint: Checkpoint, span: Span, dtype: torch.dtype, device: torch.device) -> tuple[Body, Speeds]:
    """The blocks, ready to compute, and how fast they are."""
    tensors = checkpoint.block_tensors(span)
    body = build_body(checkpoint.family, checkpoint.config, span, tensors, dtype=dtype, device=device)
    hidden_size = checkpoint.config.get_text_config(decoder=True).hidden_size
    return body, measure(body, hidden_size=hidden_size, dtype=dtype, device=device)
