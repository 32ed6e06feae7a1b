"""What a server decides once, whichever blocks it serves: the model, its weights, the dtype, the device."""

from __future__ import annotations

import importlib.metadata
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from shoal.errors import UserError
from shoal.events import Observers
from shoal.model.linear.quantization import Quantization, stored_quantization
from shoal.model.weights.checkpoint import Checkpoint
from shoal.net.transport import Node
from shoal.peers import ModelInfo, ServerInfo, ServerState
from shoal.policy.view import SwarmView
from shoal.protocol import PROTOCOL_VERSION
from shoal.server.capacity import (
    check_blocks,
    choose_device,
    choose_quantization,
    free_memory,
    join_dtype,
    max_num_blocks,
)
from shoal.server.config import ServerConfig
from shoal.server.executor import Executor
from shoal.server.measured_speed import machine_key, weights_key
from shoal.server.measuring.portrait import Portrait
from shoal.server.placing.compute_thread import Compute
from shoal.server.rpc.weights_service import WeightsService
from shoal.server.startup_progress import Phase, Progress, Report
from shoal.spans import Span
from shoal.tensors import LOSSY, PACKED

log = logging.getLogger(__name__)

VERSION = importlib.metadata.version("shoal")


@dataclass(frozen=True)
class Setup:
    """What stays when a server changes its blocks. It can hold at most `max_blocks` of them.

    `free_bytes` of memory were free before it loaded any. `key` names the weights, their form and this machine, for
    what is remembered about them.
    """

    checkpoint: Checkpoint
    model: ModelInfo
    fingerprint: str
    dtype: torch.dtype
    device: torch.device
    quantization: Quantization
    max_blocks: int
    free_bytes: int
    key: str


@dataclass(frozen=True)
class Surroundings:
    """What a server keeps when it changes its blocks. `weights` answers joining machines. `clock` is the Unix time."""

    config: ServerConfig
    node: Node
    setup: Setup
    compute: Compute
    portrait: Portrait
    observers: Observers
    weights: WeightsService
    report: Report = lambda progress: None
    clock: Callable[[], float] = time.time


async def prepare(
    config: ServerConfig, node: Node, checkpoint: Checkpoint, executor: Executor, report: Report
) -> Setup:
    """Decide it, from the config, the swarm and this machine. Raises `UserError` for what is impossible."""
    model = model_info(checkpoint)
    view = SwarmView(model.num_blocks, await node.directory.servers(model))
    await check_identity(node, view)
    # Not a record of this server from before a crash, and no server that cannot be talked to.
    view = view.only(lambda server: server.peer != node.transport.peer and server.protocol == PROTOCOL_VERSION)
    device = choose_device(config.device)
    free_bytes = free_memory(device)
    quantization = choose_quantization(config.quantization)
    check_blocks(config, checkpoint)
    report(Progress(Phase.FINGERPRINTING))
    fingerprint = await executor.run(lambda: checkpoint.fingerprint)
    if config.invitation is not None and config.invitation.fingerprint != fingerprint:
        raise UserError(
            f"these are not the weights that the invitation names: {fingerprint}, not {config.invitation.fingerprint}",
            hint="ask for a fresh code: `shoal invite` prints one",
        )
    dtype = join_dtype(config.dtype, checkpoint, view)
    log.info("the server computes in %s on %s", dtype, device)
    max_blocks = max_num_blocks(config, checkpoint, dtype, device)
    weights = weights_key(fingerprint, config.quantization)
    key = await executor.run(lambda: machine_key(weights=weights, dtype=dtype, device=device))
    return Setup(checkpoint, model, fingerprint, dtype, device, quantization, max_blocks, free_bytes, key)


def open_checkpoint(config: ServerConfig) -> Checkpoint:
    """The model that the config names, or whose files it has."""
    if config.files is not None:
        return Checkpoint.of(config.files, allow_uncertified=config.allow_uncertified)
    return Checkpoint.open(config.model, revision=config.revision, allow_uncertified=config.allow_uncertified)


def model_info(checkpoint: Checkpoint) -> ModelInfo:
    """What the directory records about a model."""
    return ModelInfo(
        key=checkpoint.key,
        name=checkpoint.name,
        family=checkpoint.family.model_type,
        num_blocks=checkpoint.num_blocks,
    )


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


def base_info(config: ServerConfig, node: Node, setup: Setup) -> ServerInfo:
    """What a server announces whatever it is doing. Its span and its state are yet to be chosen."""
    return ServerInfo(
        peer=node.transport.peer,
        span=Span(0, 1),
        state=ServerState.JOINING,
        fingerprint=setup.fingerprint,
        decode_speed=None,
        prefill_speed=None,
        cache_tokens_left=0,
        dtype=str(setup.dtype).removeprefix("torch."),
        quantization=stored_quantization(setup.checkpoint.config) or setup.quantization.value,
        version=VERSION,
        name=config.name,
        addresses=node.transport.addresses,
        encodings=(*LOSSY, PACKED),
        training=config.training,
        pinned=not config.moves,
        protocol=PROTOCOL_VERSION,
    )
