"""Times passes of the server's own while no client wants any, so that no speed from a bad moment is announced for long.

The measurement at the start may have met a busy machine, and a server that announces too little speed gets no clients
whose passes would correct it. So an idle server computes a short prompt and a token now and then, as a session of its
own. The engine's watch compares these passes with the announced speed as it compares all others
(`shoal.server.speed_watch`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable

import torch

from shoal.concurrency import now
from shoal.prefix import PAGE_TOKENS
from shoal.protocol import Open, Step
from shoal.server.engine.engine import Engine
from shoal.server.refusals import Refused, busy
from shoal.server.speed_watch import MEASURED_PREFILL_TOKENS, MIN_PASSES, MIN_SECONDS

log = logging.getLogger(__name__)

IDLE_SECONDS = 30.0
"""A server is idle if it has computed nothing for so long."""
EVERY_SECONDS = 3600.0
"""How often an idle server is timed, first as soon as it is idle. A check takes a minute and a few per cent of it."""
BUSY_FRACTION = 0.1
"""The part of the time that the passes of a check may take: the machine's owner should not notice."""
SPARE_PASSES = 4
"""Passes beyond those that a correction needs: one may have been disturbed."""


async def time_when_idle(engine: Engine, peer: str, *, clock: Callable[[], float] = now) -> None:
    """Time the engine's passes whenever it is idle and was not timed for `EVERY_SECONDS`. Never returns.

    `peer` is the server's own id: in the engine's eyes it is one client more.
    """
    salt = secrets.token_hex(8)
    while True:
        await _until_idle(engine)
        began = clock()
        if await _check(engine, peer, salt, clock):
            log.debug("an idle server was timed: %s", engine.speeds)
            await asyncio.sleep(max(0.0, began + EVERY_SECONDS - clock()))


async def _until_idle(engine: Engine) -> None:
    seen = None
    while engine.queue_length or seen != engine.num_passes:
        seen = engine.num_passes
        await asyncio.sleep(IDLE_SECONDS)


async def _check(engine: Engine, peer: str, salt: str, clock: Callable[[], float]) -> bool:
    """Compute enough passes for a correction; returns whether no client came meanwhile."""
    engine.forget_speeds_seen()
    for _ in range(MIN_PASSES + SPARE_PASSES):
        began = clock()
        try:
            await _compute(engine, peer, salt)
        except Refused as refused:
            log.debug("an idle server is not timed: %s", refused)
            return False
        num_passes, took = engine.num_passes, clock() - began
        await asyncio.sleep(max(took / BUSY_FRACTION, MIN_SECONDS / MIN_PASSES))
        if engine.queue_length or engine.num_passes != num_passes:
            return False
    return True


async def _compute(engine: Engine, peer: str, salt: str) -> None:
    """Compute a prompt and one more token, in a session that ends then. Raises `Refused` if there is no free room."""
    span, validator = engine.span, engine.validator
    num_tokens = min(MEASURED_PREFILL_TOKENS, validator.max_length - 1)
    if engine.cache_tokens_left < num_tokens + PAGE_TOKENS:
        raise busy("clients have the cache")
    request = Open(
        model=validator.model,
        fingerprint=validator.fingerprint,
        start=span.start,
        end=span.end,
        batch_size=1,
        expected_length=num_tokens + 1,
        salt=salt,
    )
    generator = torch.Generator().manual_seed(0)
    inputs_BTD = torch.randn(1, num_tokens + 1, validator.hidden_size, generator=generator)
    session, _ = engine.open(peer, request, {})
    try:
        position = 0
        for hidden_BTD in (inputs_BTD[:, :num_tokens], inputs_BTD[:, num_tokens:]):
            inputs = validator.step_inputs({"hidden": hidden_BTD})
            await engine.step(session, Step(position=position), inputs)
            position += hidden_BTD.shape[1]
    finally:
        engine.close(session)
