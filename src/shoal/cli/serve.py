"""`shoal serve`: serve some blocks of a model until the process is told to stop."""

from __future__ import annotations

import asyncio
import shlex
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.cli import options
from shoal.cli.console import (
    ProgressReporter,
    WrongUsage,
    hush_transformers,
    start_logging,
    tokens_per_second,
    waiting,
)
from shoal.cli.long_running import end_with_parent, identity_file, run_until_signalled
from shoal.client.options.client_options import INITIAL_PEERS
from shoal.large_imports import large_imports
from shoal.model.weights.location import check_model, folder_of
from shoal.net import NetworkConfig, check_addresses
from shoal.policy.batching.engine_limits import Limits
from shoal.spans import Span

if TYPE_CHECKING:
    from shoal.server.config import ServerConfig
    from shoal.server.server import Server

EXAMPLE_PROMPT = "Once upon a time"


def command(
    model: options.Model,
    new_swarm: Annotated[bool, typer.Option("--new-swarm", help="Start a new swarm.")] = False,
    initial_peers: options.InitialPeers = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            metavar="START:END",
            help="Serve these blocks, such as 0:8, and no others. Default: those that the swarm needs most.",
        ),
    ] = None,
    num_blocks: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Serve at most this many blocks. Default: as many as fit into memory."),
    ] = None,
    placement: Annotated[
        options.Placement,
        typer.Option(metavar="RULE", help="How blocks are chosen: graded, or petals, the rule of PETALS."),
    ] = options.Placement.graded,
    move: Annotated[
        bool,
        typer.Option(
            "--move/--no-move", help="Go to other blocks when the swarm needs them more. With --blocks, it never does."
        ),
    ] = True,
    device: Annotated[
        options.Device,
        typer.Option(metavar="DEVICE", help="Compute on cpu, cuda or mps (untested). auto: cuda if there is a GPU."),
    ] = options.Device.auto,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="CPU threads to compute with. Default: PyTorch's.")
    ] = None,
    dtype: Annotated[
        options.DType,
        typer.Option(metavar="DTYPE", help=f"Compute in this dtype: {options.DTYPES}. auto: the dtype of the swarm."),
    ] = options.DType.auto,
    quantization: Annotated[
        options.Quantization,
        typer.Option(metavar="KIND", help=f"Quantize the weights of the blocks: {options.QUANTIZATIONS}."),
    ] = options.Quantization.none,
    cache_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Size of the key-value cache, for all sessions together. Default: as memory allows.",
        ),
    ] = None,
    cache_dtype: Annotated[
        options.CacheDType,
        typer.Option(metavar="DTYPE", help="Dtype of the key-value cache. auto: exact; int8: half of the memory."),
    ] = options.CacheDType.auto,
    prefill_share: Annotated[
        float,
        typer.Option(
            min=0.0, max=0.95, metavar="FRACTION", help="Share of a pass for prompts, while other sessions decode."
        ),
    ] = Limits.prefill,
    scheduling: Annotated[
        options.Scheduling,
        typer.Option(
            metavar="RULE",
            help=f"Whose tokens are computed next, and whose pages are taken: {options.SCHEDULINGS}.",
        ),
    ] = options.DEFAULT_SCHEDULING,
    training_share: Annotated[
        float,
        typer.Option(
            min=0.0, max=1.0, metavar="FRACTION", help="Share of the time for training, while other clients generate."
        ),
    ] = Limits.training,
    training: Annotated[
        bool,
        typer.Option(
            "--training/--no-training", help="Also compute forward and backward passes for clients that train."
        ),
    ] = True,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="ADAPTER", help="Host this PEFT adapter: a folder or a Hugging Face id. May be repeated."),
    ] = None,
    adapter_memory: Annotated[
        int, typer.Option(min=1, metavar="MIB", help="Memory for adapters that clients upload.")
    ] = Limits.adapter_bytes >> 20,
    training_memory: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="MIB",
            help="Memory for activations that backward passes need. What does not fit is computed again.",
        ),
    ] = Limits.activation_bytes >> 20,
    serve_head: Annotated[
        bool,
        typer.Option(
            "--serve-head", help="Also serve the output head, to clients with --remote-head. Needs the last block."
        ),
    ] = False,
    drain_timeout: Annotated[
        float,
        typer.Option(
            min=0.0, metavar="SECONDS", help="When stopped, wait this long for clients to move to other servers."
        ),
    ] = 30.0,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of this server in `shoal status`. Default: the host's name."),
    ] = None,
    zone: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="What may fail together with this server, such as its building. Default: its network.",
        ),
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
    """Serve some blocks of a model, until Ctrl-C.

    The first server starts a swarm with --new-swarm, and prints an address. Other machines join with --initial-peers
    and that address.
    """
    start_logging(verbose=verbose, default="warning", progress=True)
    if exit_with_stdin:
        end_with_parent()
    if new_swarm and initial_peers:
        raise WrongUsage(
            "--new-swarm and --initial-peers exclude each other", hint="use one: start a new swarm, or join one"
        )
    peers = () if new_swarm else options.peers_of(initial_peers)
    if not new_swarm and not peers:
        raise WrongUsage(
            "neither --new-swarm nor --initial-peers is given",
            hint=f"start a new swarm with --new-swarm, or join one with --initial-peers (or ${INITIAL_PEERS})",
        )
    if blocks is not None and num_blocks is not None:
        raise WrongUsage(
            "--blocks and --num-blocks exclude each other", hint="--blocks 0:8 gives both the blocks and their number"
        )
    span, server_name = _parse_span(blocks), options.server_name(name, socket.gethostname())
    zone_name = options.zone_name(zone)
    network = NetworkConfig(
        initial_peers=peers, host=host, port=port, announce=tuple(announce or ()), relays=tuple(relay or ())
    )
    check_addresses(network)
    check_model(model)
    for each in adapter or ():
        folder_of(each)

    with waiting("Importing PyTorch and Transformers"), large_imports():
        import torch

        from shoal.model.peft.block_adapters import import_peft
        from shoal.server.capacity import choose_device
        from shoal.server.config import ServerConfig
        from shoal.server.server import serve  # noqa: F401 - imported here because the import is slow

        import_peft()
        hush_transformers()
    with identity_file(identity, kind="serve") as path:
        config = ServerConfig(
            model=model,
            revision=revision,
            blocks=span,
            num_blocks=num_blocks,
            placement="petals" if placement is options.Placement.petals else "graded",
            move=move,
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
            scheduling=scheduling.value,
            training=training,
            adapters=tuple(adapter or ()),
            serve_head=serve_head,
            drain_seconds=drain_timeout,
            name=server_name,
            zone=zone_name,
            allow_uncertified=allow_uncertified,
        )
        torch.set_num_threads(
            1
        )  # of the event loop's thread; the compute thread has its own, see shoal.server.executor
        run_until_signalled(_serve(config, replace(network, identity=path)))


async def _serve(config: ServerConfig, network: NetworkConfig) -> None:
    from shoal.net import join
    from shoal.server.server import serve
    from shoal.server.startup_progress import Phase, Progress

    is_up = False

    def show(progress: Progress) -> None:
        # Hashing and downloading draw their own progress bars.
        is_local = Path(config.model).expanduser().is_dir()
        draws = progress.phase is Phase.FINGERPRINTING or (progress == Progress(Phase.LOADING) and not is_local)
        reporter.show(progress.phase, step=progress.step, spin=not draws)
        if is_up and progress.phase is Phase.ANNOUNCING:  # a change of blocks is done
            reporter.stop()

    with waiting("Joining the swarm" if network.initial_peers else "Starting the network") as reporter:
        reminding = asyncio.create_task(_remind(reporter))
        try:
            async with join(network) as node, serve(config, node, report=show) as server:
                reporter.stop()
                is_up = True
                print(describe(server, config), flush=True)
                await asyncio.Event().wait()
        finally:
            reminding.cancel()


async def _remind(reporter: ProgressReporter) -> None:
    while True:
        await asyncio.sleep(1)
        reporter.remind()


def describe(server: Server, config: ServerConfig) -> str:
    """What a server prints when it is ready: one fact per line, and the commands to join and use the swarm."""
    info, model = server.info, server.model
    facts = [
        ("model", f"{model.name} ({model.family}, {model.num_blocks} blocks)"),
        ("blocks", f"{info.span} and the output head" if info.head else str(info.span)),
        *([("because", info.reason)] if config.blocks is None and info.reason else []),
        ("dtype", f"{info.dtype} on {config.device}"),
        *([("quantized", info.quantization)] if info.quantization != "none" else []),
        ("decoding", f"{tokens_per_second(info.decode_speed)} through these blocks"),
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


def invitation(config: ServerConfig, address: str) -> list[str]:
    """Lines with both commands. They repeat the options of this server that change the model or its results."""
    model = _render_options({"--revision": config.revision}, allow_uncertified=config.allow_uncertified)
    dtype = _render_options({"--dtype": _unless(config.dtype, "auto")})
    storage = {
        "--quantization": _unless(config.quantization, "none"),
        "--cache-dtype": _unless(config.cache_dtype, "auto"),
    }
    name = shlex.quote(config.model)
    return [
        "Join this swarm from another machine:",
        f"  shoal serve {name}{model}{dtype}{_render_options(storage)} --initial-peers {address}",
        "Use the model:",
        f'  shoal generate {name}{model}{dtype} "{EXAMPLE_PROMPT}" --initial-peers {address}',
    ]


def _unless(value: str, default: str) -> str | None:
    return None if value == default else value


def _render_options(values: Mapping[str, str | None], *, allow_uncertified: bool = False) -> str:
    options = "".join(f" {option} {shlex.quote(value)}" for option, value in values.items() if value)
    return options + (" --allow-uncertified" if allow_uncertified else "")


def _parse_span(text: str | None) -> Span | None:
    if text is None:
        return None
    try:
        return Span.parse(text)
    except ValueError as error:
        raise WrongUsage(str(error), hint="--blocks 0:8 stands for the first eight blocks") from None
