"""`shoal serve`: hold some blocks of a model for everybody in the swarm, until told to stop."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli import options
from shoal.cli.console import Wait, WrongUsage, hush_transformers, start_logging, waiting
from shoal.cli.identity import identity_file
from shoal.cli.invitation import invitation
from shoal.cli.lifetime import end_with_parent, run_until_signalled
from shoal.cli.rates import tokens_per_second
from shoal.client.options.client_options import INITIAL_PEERS
from shoal.model.weights.location import check_model, folder_of
from shoal.net import NetworkConfig, check_addresses
from shoal.server.engine.engine_limits import Limits
from shoal.spans import Span

if TYPE_CHECKING:
    from shoal.server.config import ServerConfig
    from shoal.server.server import Server


def command(
    model: options.Model,
    new_swarm: Annotated[bool, typer.Option("--new-swarm", help="Start a swarm.")] = False,
    initial_peers: options.InitialPeers = None,
    blocks: Annotated[
        str | None, typer.Option(metavar="0:8", help="These blocks. Default: those that help the swarm most.")
    ] = None,
    num_blocks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="So many blocks. Default: as many as fit into memory.")
    ] = None,
    device: Annotated[
        options.Device,
        typer.Option(
            metavar="DEVICE", help="Where to compute: cpu, cuda or mps (untested); auto is cuda if it is there."
        ),
    ] = options.Device.auto,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Threads of the processor to compute with; all by default.")
    ] = None,
    dtype: Annotated[
        options.DType,
        typer.Option(
            metavar="DTYPE", help=f"What to compute in: {options.DTYPES}; auto is what the swarm computes in."
        ),
    ] = options.DType.auto,
    quantization: Annotated[
        options.Quantization,
        typer.Option(metavar="KIND", help=f"How to hold the blocks' weights: {options.QUANTIZATIONS}."),
    ] = options.Quantization.none,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Room for so many tokens of all sessions together. Default: what memory allows."
        ),
    ] = None,
    cache_dtype: Annotated[
        options.CacheDType,
        typer.Option(metavar="DTYPE", help="What to keep sessions in: auto is exact, int8 takes half of the room."),
    ] = options.CacheDType.auto,
    prefill_share: Annotated[
        float, typer.Option(min=0.0, max=0.95, metavar="PART", help="Of a pass, for prompts while others decode.")
    ] = Limits.prefill,
    training_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, metavar="PART", help="Of the time, for training while others generate.")
    ] = Limits.training,
    training: Annotated[
        bool, typer.Option("--training/--no-training", help="Compute forward and backward passes too.")
    ] = True,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="ADAPTER", help="Host this PEFT adapter, a Hugging Face id or a folder. May be repeated."),
    ] = None,
    adapter_memory: Annotated[
        int, typer.Option(min=1, metavar="MIB", help="For adapters that clients bring.")
    ] = Limits.adapter_bytes >> 20,
    training_memory: Annotated[
        int, typer.Option(min=0, metavar="MIB", help="To keep what backward passes need; the rest is computed again.")
    ] = Limits.activation_bytes >> 20,
    serve_head: Annotated[
        bool,
        typer.Option("--serve-head", help="Hold the output head too, after the last block, for clients that ask."),
    ] = False,
    drain_timeout: Annotated[
        float,
        typer.Option(min=0.0, metavar="SECONDS", help="At the end, leave clients so long to go on elsewhere."),
    ] = 30.0,
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What people shall call this server. Default: this host's name.")
    ] = None,
    host: options.Host = "0.0.0.0",  # noqa: S104
    port: options.Port = 0,
    identity: options.IdentityFile = None,
    announce: options.Announce = None,
    relay: options.Relay = None,
    revision: options.Revision = None,
    allow_uncertified: options.AllowUncertified = False,
    exit_with_stdin: Annotated[bool, typer.Option("--exit-with-stdin", hidden=True)] = False,
    verbose: options.Verbose = False,
) -> None:
    """Serve some blocks of a model to the swarm, until Ctrl-C.

    Start a swarm with --new-swarm. The address that it prints lets other machines join, with --initial-peers.
    """
    start_logging(verbose=verbose, default="warning", progress=True)
    if exit_with_stdin:
        end_with_parent()
    if new_swarm and initial_peers:
        raise WrongUsage(
            "--new-swarm and --initial-peers exclude each other", hint="start a swarm, or join one: which of them?"
        )
    peers = () if new_swarm else options.peers_of(initial_peers)
    if not new_swarm and not peers:
        raise WrongUsage(
            "neither --new-swarm nor --initial-peers is given",
            hint=f"start a swarm with --new-swarm, or name a peer of one (also in {INITIAL_PEERS})",
        )
    if blocks is not None and num_blocks is not None:
        raise WrongUsage("--blocks and --num-blocks exclude each other", hint="--blocks 0:8 says which and how many")
    span, called = _parse_span(blocks), options.server_name(name, socket.gethostname())
    network = NetworkConfig(
        initial_peers=peers, host=host, port=port, announce=tuple(announce or ()), relays=tuple(relay or ())
    )
    check_addresses(network)
    check_model(model)
    for each in adapter or ():
        folder_of(each)

    with waiting("Importing PyTorch and Transformers"):
        import torch

        from shoal.server.capacity import choose_device
        from shoal.server.config import ServerConfig
        from shoal.server.server import serve  # noqa: F401 - slow, so it is named while it is awaited

        hush_transformers()
    with identity_file(identity, kind="serve") as path:
        config = ServerConfig(
            model=model,
            revision=revision,
            blocks=span,
            num_blocks=num_blocks,
            device=choose_device(device.value).type,
            num_threads=threads or torch.get_num_threads(),
            dtype=dtype.value,
            quantization=quantization.value,
            cache_tokens=cache_tokens,
            cache_dtype=cache_dtype.value,
            limits=Limits(
                prefill=prefill_share,
                training=training_share,
                adapter_bytes=adapter_memory << 20,
                activation_bytes=training_memory << 20,
            ),
            training=training,
            adapters=tuple(adapter or ()),
            serve_head=serve_head,
            drain_seconds=drain_timeout,
            name=called,
            allow_uncertified=allow_uncertified,
        )
        torch.set_num_threads(1)  # of this thread, the event loop's: see shoal.server.executor
        run_until_signalled(_serve(config, replace(network, identity=path)))


async def _serve(config: ServerConfig, network: NetworkConfig) -> None:
    from shoal.net import join
    from shoal.server.server import serve
    from shoal.server.startup_progress import Phase, Progress

    def show(progress: Progress) -> None:
        # These two draw progress bars of their own: hashing, and downloading.
        is_local = Path(config.model).expanduser().is_dir()
        draws = progress.phase is Phase.FINGERPRINTING or (progress == Progress(Phase.LOADING) and not is_local)
        wait.for_(progress.phase, step=progress.step, spin=not draws)

    with waiting("Joining the swarm" if network.initial_peers else "Starting the network") as wait:
        reminding = asyncio.create_task(_remind(wait))
        try:
            async with join(network) as node, serve(config, node, report=show) as server:
                wait.stop()
                print(describe(server, config), flush=True)
                await asyncio.Event().wait()
        finally:
            reminding.cancel()


async def _remind(wait: Wait) -> None:
    while True:
        await asyncio.sleep(1)
        wait.remind()


def describe(server: Server, config: ServerConfig) -> str:
    """What a server says when it is ready: a line for each fact, and the commands with which others go on."""
    info, model = server.info, server.model
    facts = [
        ("model", f"{model.name} ({model.family}, {model.num_blocks} blocks)"),
        ("blocks", f"{info.span} and the output head" if info.head else str(info.span)),
        ("computes", f"in {info.dtype} on {config.device}"),
        *([("quantized", info.quantization)] if info.quantization != "none" else []),
        ("decoding", f"{tokens_per_second(info.decode_speed)} through its blocks"),
        ("prefill", tokens_per_second(info.prefill_speed)),
        ("cache", f"{server.engine.cache_tokens:,} tokens"),
        ("weights", info.fingerprint),
        ("peer", info.peer),
        *(("address", each) for each in info.addresses),
    ]
    lines = [f"{fact:<10}{value}" for fact, value in facts]
    lines += ["", *invitation(config, info.addresses[0]), ""]
    if config.name:
        lines.insert(0, f"{'name':<10}{config.name}")
    return "\n".join(lines)


def _parse_span(text: str | None) -> Span | None:
    if text is None:
        return None
    try:
        return Span.parse(text)
    except ValueError as error:
        raise WrongUsage(str(error), hint="--blocks 0:8 are the first eight") from None
