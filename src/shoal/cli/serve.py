"""`shoal serve`: serve some blocks of a model until the process is told to stop."""

from __future__ import annotations

import socket
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli import network_options, options
from shoal.cli.network_options import network_of
from shoal.cli.service.devices import OnDevices, chosen_devices, shared_out, show_only
from shoal.cli.service.long_running import end_with_parent, identity_file, run_until_signalled
from shoal.cli.service.serve_and_tell import serve_and_tell
from shoal.cli.service.several_servers import CODE, When, run_servers
from shoal.cli.terminal.console import (
    WrongUsage,
    as_usage,
    hush_transformers,
    start_logging,
    waiting,
)
from shoal.client.options.client_options import INITIAL_PEERS
from shoal.host.computer import usable_cores
from shoal.host.large_imports import large_imports
from shoal.joining.invite_code import code_in
from shoal.ledgers.ledger_place import SERVERS, LedgerPlace
from shoal.model.weights.disk_cache import cache_folder
from shoal.model.weights.location import folder_of
from shoal.net.swarm_key import file_of_key
from shoal.policy.batching.engine_limits import Limits
from shoal.spans import Span

if TYPE_CHECKING:
    from shoal.server.config import ServerConfig

MOST_OF_ZONE = 32  # characters that a record takes (shoal.net.records)


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder, an id on the Hugging Face hub, or an invite code.",
            envvar=CODE,
            show_envvar=False,
        ),
    ],
    new_swarm: Annotated[bool, typer.Option("--new-swarm/--no-new-swarm", help="Start a new swarm.")] = False,
    initial_peers: options.InitialPeers = None,
    swarm_key: network_options.SwarmKeyFile = None,
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
    device: OnDevices = options.Device.auto,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="CPU threads to compute with. Default: PyTorch's.")
    ] = None,
    dtype: Annotated[
        options.DType,
        typer.Option(metavar="DTYPE", help=f"Compute in this dtype: {options.DTYPES}. auto: the dtype of the swarm."),
    ] = options.DType.auto,
    quantization: options.StoredAs = options.Quantization.none,
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
            "--serve-head/--no-serve-head",
            help="Also serve the output head, to clients with --remote-head. Needs the last block.",
        ),
    ] = False,
    upload_limit: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            metavar="MB",
            help="Megabytes a second of the model that machines which join may get here; 0: none. Default: no limit.",
        ),
    ] = None,
    when: Annotated[
        When,
        typer.Option(
            metavar="WHEN",
            help="always; or idle: only while other programs hardly use this machine's processor.",
        ),
    ] = When.always,
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
    host: network_options.Host = None,
    port: network_options.Port = 0,
    identity: network_options.IdentityFile = None,
    announce: network_options.Announce = None,
    relay: network_options.Relay = None,
    serve_relay: network_options.ServeRelay = None,
    upnp: network_options.Upnp = False,
    lan: network_options.OnLan = None,
    revision: options.Revision = None,
    allow_uncertified: options.AllowUncertified = False,
    mark: Annotated[str, typer.Option("--mark", hidden=True)] = "",
    exit_with_stdin: Annotated[bool, typer.Option("--exit-with-stdin", hidden=True)] = False,
    verbose: options.Verbose = False,
) -> None:
    """Serve some blocks of a model, until Ctrl-C.

    The first server starts a swarm with --new-swarm, and prints an invite code. Other machines join with
    `shoal join CODE`; those with a copy of the model may also use --initial-peers and the address that is printed.
    """
    given = locals().copy()
    start_logging(verbose=verbose, default="warning", progress=True)
    if exit_with_stdin:
        end_with_parent()
    with as_usage():
        code = code_in(model)
    key = swarm_key if code is None else network_options.key_beside_code(swarm_key)
    if code is not None and new_swarm:
        raise WrongUsage("an invite code is for a swarm that is there", hint="leave out --new-swarm")
    if new_swarm and initial_peers:
        raise WrongUsage(
            "--new-swarm and --initial-peers exclude each other", hint="use one: start a new swarm, or join one"
        )
    if new_swarm and when is When.idle:
        raise WrongUsage(
            "--new-swarm and --when idle exclude each other: the swarm would end whenever this machine is used",
            hint="start it on a machine that stays, and join it with --when idle",
        )
    is_named = new_swarm or (code is not None and not initial_peers)
    peers = () if is_named else options.peers_of(initial_peers)
    if not new_swarm and not peers and code is None:
        raise WrongUsage(
            "neither --new-swarm nor --initial-peers is given",
            hint=f"start a new swarm with --new-swarm, or join one with --initial-peers (or ${INITIAL_PEERS})",
        )
    span, server_name = check_options(
        blocks=blocks,
        num_blocks=num_blocks,
        name=name,
        zone=zone,
        adapter=adapter,
        host=host,
        announce=announce,
        relay=relay,
    )
    network = network_of(
        initial_peers=peers,
        host=host,
        port=port,
        announce=announce,
        relay=relay,
        serve_relay=serve_relay,
        upnp=upnp,
        swarm_key=key,
        is_new=new_swarm,
    )
    if code is not None:
        network = replace(network, swarm_key=code.swarm_key)
    if lan and network.swarm_key is not None:
        raise WrongUsage(
            "--lan announces an open swarm, and this one is closed", hint="leave out --lan; pass on the invite code"
        )
    options.check_places(model, revision=revision)
    devices = chosen_devices(device)
    if len(devices) > 1 or when is When.idle:
        run_servers(
            shared_out(devices, {**given, "name": server_name, "swarm_key": file_of_key(key)}, cores=usable_cores()),
            is_new=new_swarm,
            peers=peers,
            when=when,
            drain_seconds=drain_timeout,
        )
        return
    only = show_only(devices[0])

    with waiting("Importing PyTorch"), large_imports():
        import torch

        import shoal.joining.arrival  # noqa: F401 - imported here because the import is slow
        from shoal.net import import_network

        import_network()
    num_threads = threads or torch.get_num_threads()
    torch.set_num_threads(1)  # of the event loop's thread; the compute thread has its own, see shoal.server.executor

    def configured() -> ServerConfig:
        """What the options say. It imports Transformers, which takes seconds; the network starts meanwhile."""
        with large_imports():
            from shoal.server.capacity import choose_device
            from shoal.server.config import ServerConfig
            from shoal.server.server import serve  # noqa: F401

            hush_transformers()
        return ServerConfig(
            model=model,
            revision=revision,
            blocks=span,
            num_blocks=num_blocks,
            placement="petals" if placement is options.Placement.petals else "graded",
            move=move,
            device=choose_device(only).type,
            num_threads=num_threads,
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
            upload_limit=None if upload_limit is None else upload_limit * 1e6,
            name=server_name,
            zone=zone,
            allow_uncertified=allow_uncertified,
            ledger_folder=LedgerPlace.of(cache_folder()).folder,
        )

    with identity_file(identity, kind=f"{SERVERS}-{mark}" if mark else SERVERS) as path:
        run_until_signalled(serve_and_tell(configured, replace(network, identity=path), code, lan=lan))


def check_options(
    *,
    blocks: str | None,
    num_blocks: int | None,
    name: str | None,
    zone: str | None,
    adapter: list[str] | None,
    host: str | None,
    announce: list[str] | None,
    relay: list[str] | None,
    **_: Any,
) -> tuple[Span | None, str]:
    """The blocks to serve, and the server's name. Raises `WrongUsage` for what cannot be right; it takes no time."""
    if blocks is not None and num_blocks is not None:
        raise WrongUsage(
            "--blocks and --num-blocks exclude each other", hint="--blocks 0:8 gives both the blocks and their number"
        )
    found = _parse_span(blocks), options.server_name(name, socket.gethostname())
    checked_zone(zone)
    network_of(host=host, announce=announce, relay=relay, swarm_key="")
    with as_usage():
        for each in adapter or ():
            folder_of(each)
    return found


def checked_zone(given: str | None) -> str | None:
    """The name of a zone, as records take it. Raises `WrongUsage` for a name that no peer would accept."""
    if given is not None and (len(given) > MOST_OF_ZONE or not given.isprintable()):
        raise WrongUsage(
            f"not the name of a zone: {given!r}", hint=f"--zone takes up to {MOST_OF_ZONE} printable characters"
        )
    return given


def _parse_span(text: str | None) -> Span | None:
    if text is None:
        return None
    try:
        return Span.parse(text)
    except ValueError as error:
        raise WrongUsage(str(error), hint="--blocks 0:8 stands for the first eight blocks") from None
