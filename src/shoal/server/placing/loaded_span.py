"""A span that is loaded: its blocks, the engine that computes them, and how fast that is."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from shoal.events import Observers
from shoal.model.body import Body, joined_body
from shoal.model.linear.quantization import dequantized_bytes
from shoal.model.loading import load_body
from shoal.model.peft.block_adapters import import_peft
from shoal.model.peft.peft_folder import PeftFolder
from shoal.model.weights import disk_cache
from shoal.policy.batching.pass_rules import rule_of
from shoal.policy.batching.pass_times import PassTimeModel
from shoal.policy.machines.speed_profile import SpeedProfile
from shoal.server.attention_backends.backend_choice import attention_of
from shoal.server.capacity import (
    cache_dtype_of,
    choose_activation_bytes,
    choose_num_pages,
    free_memory,
    max_length_of,
)
from shoal.server.config import ServerConfig
from shoal.server.device_memory import release_unused
from shoal.server.engine.cpu_turns import turn_of
from shoal.server.engine.engine import Engine
from shoal.server.engine.validator import RequestValidator
from shoal.server.executor import Executor, alone
from shoal.server.kv.batch import Pass
from shoal.server.kv.batched_pass import pass_over
from shoal.server.kv.cache_shapes import cache_shapes
from shoal.server.kv.output_head import ServerHead, load_head
from shoal.server.kv.paged_cache import Int8Pages, PagedCache, Pages
from shoal.server.measured_speed import speed_key, speeds_in
from shoal.server.measuring.load_times import timed
from shoal.server.measuring.on_disk import quantizes, quick_blocks
from shoal.server.measuring.pass_timer import profile_of
from shoal.server.placing.compute_thread import Compute
from shoal.server.placing.setup import Setup
from shoal.server.speed_watch import Speeds, Watch
from shoal.server.startup_progress import Phase, Progress, Report, reporter
from shoal.spans import Span

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Weights:
    """The parts of the model that a server computes. `head` is `None` unless it serves the output head."""

    body: Body
    head: ServerHead | None


@dataclass(frozen=True)
class CacheMemory:
    """The memory of the cache."""

    num_pages: int
    pages: PagedCache


@dataclass(frozen=True)
class LoadedSpan:
    """What computes a span, and how fast it was when it was measured.

    `free_bytes` of memory were free before its blocks, or those that it was extended from, were loaded. `attention`
    says how attention is computed, and why not otherwise; it is empty for families with attention of their own.
    """

    span: Span
    engine: Engine
    weights: Weights
    profile: SpeedProfile
    free_bytes: int
    attention: str
    remains: Callable[[], list[str]]
    """Names what is still in memory. It has to be nothing once the other parts are forgotten."""

    @property
    def speeds(self) -> Speeds:
        """How fast the span was when it was measured."""
        return speeds_in(self.profile, self.span)


async def load_span(
    config: ServerConfig,
    setup: Setup,
    span: Span,
    compute: Compute,
    observers: Observers,
    report: Report,
    profile: SpeedProfile | None = None,
) -> LoadedSpan:
    """Load a span, measure it, and host the configured adapters for its blocks.

    It is not measured if a `profile` says how fast other blocks of the model were: these count as being as fast.
    `report` is called with each step. Raises what loading raises: `UserError`s, and errors of memory and files.
    """
    report(Progress(Phase.LOADING))
    free_bytes = free_memory(setup.device)
    body = await load_blocks(setup, span, compute.executor, report)
    await compute.executor.run(import_peft)
    weights = Weights(body, await load_head_after(config, setup, span, compute.executor))
    compute.share_cores(setup.device)
    report(Progress(Phase.MEASURING))
    return await with_engine(config, setup, weights, compute, observers, free_bytes=free_bytes, profile=profile)


async def extend_span(
    config: ServerConfig, setup: Setup, held: LoadedSpan, wanted: Span, compute: Compute, observers: Observers
) -> LoadedSpan:
    """Load what a span lacks beside the blocks that are `held`, which are computed meanwhile, and share those.

    Between two blocks that it loads, the compute thread computes for clients. The new blocks count as being as fast as
    the held ones. Raises what loading raises.
    """
    executor, parts = compute.executor, [held.weights.body]
    for block in wanted:
        if block not in held.span:
            span = Span(block, block + 1)
            if not quantizes(setup) or block not in quick_blocks(setup):
                await asyncio.to_thread(alone, partial(setup.checkpoint.read_ahead, span))
            parts.append(await load_blocks(setup, span, executor, _silent))
    body = await executor.run(lambda: joined_body(parts, wanted))
    head = held.weights.head if wanted.end == held.span.end else await load_head_after(config, setup, wanted, executor)
    weights = Weights(body, head)
    return await with_engine(
        config, setup, weights, compute, observers, free_bytes=held.free_bytes, profile=held.profile
    )


async def with_engine(
    config: ServerConfig,
    setup: Setup,
    weights: Weights,
    compute: Compute,
    observers: Observers,
    *,
    free_bytes: int,
    profile: SpeedProfile | None = None,
) -> LoadedSpan:
    """The loaded blocks with a cache and an engine. They are measured if their `profile` is not known."""
    body = weights.body
    memory = await make_cache(config, body, compute.executor, free_bytes=free_bytes)
    attention = await compute.executor.run(lambda: attention_of(body, memory.pages))
    pass_of = pass_over(body, memory.pages, attention.backend)
    engine, profile = await make_engine(config, setup, weights, memory, pass_of, compute, observers, profile)
    await compute.executor.run(lambda: host_adapters(config, setup, engine))
    large = {"the blocks": body, "the cache": memory.pages, "the output head": weights.head}
    return LoadedSpan(body.span, engine, weights, profile, free_bytes, attention.described, _remaining(large))


def _silent(_: Progress) -> None:
    """Nothing waits for it."""


def _remaining(objects: Mapping[str, object | None]) -> Callable[[], list[str]]:
    references = {name: weakref.ref(each) for name, each in objects.items() if each is not None}
    return lambda: [name for name, reference in references.items() if reference() is not None]


async def load_blocks(setup: Setup, span: Span, executor: Executor, report: Report) -> Body:
    """Load the blocks of a span on the compute thread, and remember how long that takes."""
    seen = reporter(report, executor, span)

    def load(progress: Callable[[int, bool], None]) -> Body:
        return load_body(
            setup.checkpoint,
            span,
            dtype=setup.dtype,
            device=setup.device,
            quantization=setup.quantization,
            progress=progress,
        )

    return await executor.run(lambda: timed(load, setup, span, seen))


async def load_head_after(config: ServerConfig, setup: Setup, span: Span, executor: Executor) -> ServerHead | None:
    """Load the output head, if the config says so and the model's last block is in the span."""
    if not config.serve_head or span.end < setup.checkpoint.num_blocks:
        return None
    return await executor.run(lambda: load_head(setup.checkpoint, setup.dtype, setup.device))


async def make_engine(
    config: ServerConfig,
    setup: Setup,
    weights: Weights,
    memory: CacheMemory,
    pass_of: Pass,
    compute: Compute,
    observers: Observers,
    profile: SpeedProfile | None,
) -> tuple[Engine, SpeedProfile]:
    """The engine of what is loaded, and how fast it is, which is measured if the `profile` is `None`."""
    body, key = weights.body, setup.key
    if profile is None:
        async with turn_of(compute.cpu_turns):
            profile = await compute.executor.run(
                lambda: profile_of(
                    body,
                    pass_of,
                    key=key,
                    num_pages=memory.num_pages,
                    state_pages=memory.pages.state_pages,
                    check=compute.executor.check,
                )
            )
    speeds, checkpoint = speeds_in(profile, body.span), setup.checkpoint
    if compute.priorities.is_on:
        counted = partial(dequantized_bytes, checkpoint.family, checkpoint.config, torch.uint8)  # a byte a parameter
        compute.priorities.learn_blocks(await compute.executor.run(counted))
    engine = Engine(
        body,
        compute.executor,
        make_validator(config, setup, weights),
        compute=pass_of,
        cache=memory.pages,
        num_pages=memory.num_pages,
        cpu_turns=compute.cpu_turns,
        pass_time=PassTimeModel.measured(decode_seconds=1 / speeds.decode, prefill_token_seconds=1 / speeds.prefill),
        limits=replace(config.limits, activation_bytes=choose_activation_bytes(config, body)),
        rule=rule_of(config.scheduling),
        head=weights.head,
        watch=Watch(speeds, body.span, on_correction=lambda _: disk_cache.remove(speed_key(key))),
        observers=observers,
        priorities=compute.priorities,
    )
    return engine, profile


async def make_cache(config: ServerConfig, body: Body, executor: Executor, *, free_bytes: int) -> CacheMemory:
    """The memory of the cache. `free_bytes` were free before the blocks were loaded."""
    shapes = await executor.run(lambda: cache_shapes(body))
    num_pages = choose_num_pages(config, body, shapes, free_bytes)
    kind = Int8Pages if cache_dtype_of(config, body) == torch.int8 else Pages
    return CacheMemory(num_pages, PagedCache(body, shapes, num_pages, kind=kind))


def make_validator(config: ServerConfig, setup: Setup, weights: Weights) -> RequestValidator:
    """The check whether this server can compute a request."""
    return RequestValidator(
        model=setup.model.key,
        fingerprint=setup.fingerprint,
        span=weights.body.span,
        hidden_size=weights.body.backbone.config.hidden_size,
        max_length=max_length_of(config, setup.checkpoint),
        training=config.training,
        vocabulary=None if weights.head is None else weights.head.vocabulary,
    )


def host_adapters(config: ServerConfig, setup: Setup, engine: Engine) -> None:
    """Load the adapters that the config names, for all clients."""
    for adapter in config.adapters:
        for factors in PeftFolder.open(adapter).factors(setup.checkpoint, engine.span):
            engine.adapters.host(factors)


async def collect_memory(executor: Executor, device: torch.device, remains: Callable[[], list[str]]) -> None:
    """Give the memory of blocks back that nothing refers to any more, and log what is in use nevertheless."""
    before = free_memory(device)
    await executor.run(_collect)
    if left := remains():
        log.warning("the server could not free %s of the span that it left", " and ".join(left))
    log.info("%.2f GiB are free again", (free_memory(device) - before) / 2**30)


def _collect() -> None:
    release_unused()
    with contextlib.suppress(OSError, AttributeError):  # other systems than Linux give memory back by themselves
        ctypes.CDLL("libc.so.6").malloc_trim(0)
