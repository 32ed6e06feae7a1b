"""`shoal plan`: will a model fit, before anything of its weights is downloaded."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal.cli import network_options, options
from shoal.cli.network_options import network_of
from shoal.cli.terminal.console import WrongUsage, start_logging, stdout, waiting
from shoal.cli.terminal.plan_table import Facts, Form, render, short_size
from shoal.errors import UserError
from shoal.host.computer import available_memory, may_have_gpu
from shoal.joining.invite_code import code_in
from shoal.model.weights.contents import ITEM_BYTES, Contents
from shoal.net import NetworkConfig
from shoal.peers import ModelInfo
from shoal.policy.dtypes import swarm_dtype
from shoal.policy.view import SwarmView
from shoal.policy.will_fit import DESKTOP, PROMPT_TOKENS, Hardware, Kind, Load, make_plan
from shoal.server.measured_speed import last_profile, weights_key

if TYPE_CHECKING:
    from shoal.joining.invite_code import InviteCode
    from shoal.net.transport import Node
    from shoal.peers import ServerInfo

THIS = "this"
"""How `--memory` names this machine."""
MOST_MACHINES = 10_000
_UNITS = {"m": 1e6, "g": 1e9, "t": 1e12, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_MEMORY = re.compile(r"(?:(\d{1,5}) ?[x*] ?)?(\d{1,6}(?:\.\d{1,3})?) ?([MGT]i?)B?", re.ASCII | re.IGNORECASE)
LAN_MILLISECONDS = 1.0


def command(
    model: options.Model,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE,...",
            help="Free memory of the machines to plan for, such as 8GB,24GB or 4x16GB; `this` is this machine. "
            "Default: this.",
        ),
    ] = None,
    initial_peers: options.InitialPeers = None,
    swarm_key: network_options.SwarmKeyFile = None,
    round_trip: Annotated[
        float,
        typer.Option(min=0.0, max=60_000.0, metavar="MS", help="Time from one machine to another and back."),
    ] = LAN_MILLISECONDS,
    bandwidth: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            max=1e6,
            metavar="GB/S",
            help="How fast the machines read their memory: 25 is assumed, a desktop; GPUs have hundreds.",
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=1e6,
            metavar="N",
            help="What the machines compute, in TFLOP/s: 0.2 is assumed; GPUs have tens.",
        ),
    ] = None,
    device: options.OnDevice = options.Device.auto,
    dtype: Annotated[
        options.DType,
        typer.Option(
            metavar="DTYPE", help=f"Compute in this dtype: {options.DTYPES}. auto: the swarm's, or the model's own."
        ),
    ] = options.DType.auto,
    revision: options.Revision = None,
    allow_uncertified: options.AllowUncertified = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Say whether a model fits on some machines, what is missing, and how fast it would be.

    Nothing of the weights is downloaded: sizes come from the headers of a folder or of the hub, or from the members of
    the swarm that an invite code names. With a code or --initial-peers, the machines are planned to join the servers
    that are there. The exit status is 1 if the model does not fit in any form.
    """
    start_logging(verbose=verbose)
    wanted = parse_memory(memory or [THIS])
    options.check_places(model, revision=revision)
    code = code_in(model)
    network = network_of(
        initial_peers=options.peers_of(initial_peers) if code is None or initial_peers else (),
        client_mode=True,
        swarm_key=swarm_key if code is None else network_options.key_beside_code(swarm_key),
    )
    with waiting("Reading what the model consists of") as reporter:
        own = own_memory(device)  # before this process itself takes more
        if code is not None:
            swarm = asyncio.run(_by_code(code, network, allow_uncertified=allow_uncertified))
        else:
            swarm = Swarm(Contents.open(model, revision=revision, allow_uncertified=allow_uncertified))
            if network.initial_peers:
                reporter.show("Asking the swarm")
                swarm = asyncio.run(_by_peers(swarm.contents, network))
    facts = Facts(
        contents=swarm.contents,
        servers=swarm.servers,
        kinds=tuple(kinds(wanted, own)),
        own=own,
        round_trip=round_trip / 1e3,
        dtype=chosen_dtype(dtype.value, swarm),
        stated=stated_speed(bandwidth, tflops),
    )
    forms = [plan_of(facts, quantization) for quantization in quantizations(swarm.contents)]
    if as_json:
        print(json.dumps(as_dictionary(facts, forms), indent=2, ensure_ascii=False))
    else:
        for part in render(facts, forms):
            stdout.print(part)
    if not any(form.plan.fits for form in forms):
        raise typer.Exit(1)


@dataclass(frozen=True)
class Swarm:
    """A model, and the servers that have it now, all of the same weights. `dtype` is that of the invitation."""

    contents: Contents
    servers: tuple[ServerInfo, ...] | None = None
    dtype: str | None = None


def parse_memory(given: Sequence[str]) -> list[tuple[int | None, int]]:
    """The sizes that `--memory` names, in bytes, and how many machines have each; `None` stands for this machine's.

    Raises `WrongUsage` for anything else.
    """
    sizes: list[tuple[int | None, int]] = []
    for each in (part.strip() for text in given for part in text.split(",")):
        if each.lower() == THIS:
            sizes.append((None, 1))
            continue
        found = _MEMORY.fullmatch(each)
        number = 1 if found is None or found[1] is None else int(found[1])
        size = 0 if found is None else round(float(found[2]) * _UNITS[found[3].lower()])
        if not size or not number:
            raise WrongUsage(f"not the size of a memory: {each!r}", hint="write --memory 8GB,24GB or --memory 4x16GB")
        sizes.append((size, number))
    if sum(number for _, number in sizes) > MOST_MACHINES:
        raise WrongUsage(f"more machines than a plan is made for: {MOST_MACHINES:,}")
    return sizes


def kinds(wanted: Sequence[tuple[int | None, int]], own: int) -> list[Kind]:
    """The machines of these sizes, equal ones together; `own` are the free bytes of this machine."""
    counts = Counter[int | None]()
    for size, number in wanted:
        counts[size] += number
    return [
        Kind("this machine" if size is None else short_size(size), own if size is None else size, number)
        for size, number in counts.items()
    ]


def own_memory(device: options.Device) -> int:
    """The bytes that a server on this machine would find free. Raises `UserError` for a device that is not there."""
    if device is options.Device.cpu or (device is options.Device.auto and not may_have_gpu()):
        return available_memory()
    from shoal.server.capacity import choose_device, free_memory

    return free_memory(choose_device(device.value))


def stated_speed(bandwidth: float | None, tflops: float | None) -> Hardware | None:
    """The speed of the machines as the options say it, `None` if they say nothing."""
    if bandwidth is None and tflops is None:
        return None
    return Hardware(
        DESKTOP.bandwidth if bandwidth is None else bandwidth * 1e9, DESKTOP.flops if tflops is None else tflops * 1e12
    )


def quantizations(contents: Contents) -> tuple[str, ...]:
    """The forms in which servers can hold a model: one if its weights are quantized already."""
    return ("none",) if contents.stored else tuple(options.Quantization)


def chosen_dtype(wanted: str, swarm: Swarm) -> str:
    """The dtype that servers which join would compute in."""
    if wanted != "auto":
        return wanted
    own, view = swarm.contents.dtype, SwarmView(swarm.contents.num_blocks, swarm.servers or ())
    weights = {server.fingerprint for server in view.servers}  # one, or none
    return next((swarm_dtype(view, fingerprint=each, own=own) for each in weights), None) or swarm.dtype or own


def load_of(contents: Contents, dtype: str, quantization: str) -> Load:
    """What the model takes in this form."""
    return Load(
        block_bytes=contents.block_bytes(dtype, quantization),
        cache_bytes=contents.cache_bytes(dtype),
        output_bytes=contents.hidden_size * ITEM_BYTES[dtype],
        read_bytes=contents.read_bytes(dtype, quantization),
        head_bytes=contents.output_bytes(dtype),
        used_weights=contents.used_weights,
    )


def plan_of(facts: Facts, quantization: str) -> Form:
    """The plan for the model in this form.

    All machines are as fast as the options say, or as this machine has measured itself for these weights.
    """
    contents, fingerprint = facts.contents, facts.contents.known_fingerprint
    load = load_of(contents, facts.dtype, quantization)
    profile = None
    if fingerprint is not None and facts.stated is None:
        profile = last_profile(weights=weights_key(fingerprint, quantization), dtype=facts.dtype)
    speed = profile or facts.stated or DESKTOP
    plan = make_plan(load, facts.kinds, facts.servers or (), round_trip=facts.round_trip, speed=speed, now=time.time())
    return Form(quantization, load, plan, own_holds=load.holds(facts.own), is_measured=profile is not None)


def as_dictionary(facts: Facts, forms: Sequence[Form]) -> dict[str, Any]:
    """What `--json` prints. Sizes are in bytes, times in seconds."""
    contents, swarm = facts.contents, facts.swarm
    return {
        "model": {
            "name": contents.name,
            "key": contents.key,
            "family": contents.model_type,
            "num_blocks": contents.num_blocks,
            "fingerprint": contents.known_fingerprint,
            "quantization": contents.stored,
        },
        "dtype": facts.dtype,
        "head_bytes": contents.head_bytes(facts.dtype),
        "this_machine": {"free_bytes": facts.own},
        "round_trip": facts.round_trip,
        "swarm": None if swarm is None else asdict(swarm),
        "fits": any(form.plan.fits for form in forms),
        "forms": [_form_as_dictionary(facts, form) for form in forms],
    }


def _form_as_dictionary(facts: Facts, form: Form) -> dict[str, Any]:
    plan = form.plan
    return {
        "quantization": facts.contents.stored or form.quantization,
        "block_bytes": list(form.load.block_bytes),
        "cache_bytes_of_1000_tokens": 1000 * form.load.cache_bytes,
        "this_machine_holds": form.own_holds,
        "machines": [
            asdict(kind) | {"holds": holds, "more_needed": more}
            for kind, holds, more in zip(facts.kinds, plan.holds, plan.more, strict=True)
        ],
        "fits": plan.fits,
        "missing": list(plan.missing),
        "copies": plan.copies,
        "servers_move": plan.moves,
        "parts": [{"machine": part.machine, "blocks": [part.span.start, part.span.end]} for part in plan.parts],
        "cache_tokens": plan.cache_tokens,
        "machines_in_a_row": plan.num_hops,
        "token_seconds": plan.token_seconds,
        "tokens_per_second": None if plan.token_seconds is None else 1 / plan.token_seconds,
        "prompt_tokens": PROMPT_TOKENS,
        "first_token_seconds": plan.first_seconds,
        "speed": "measured" if form.is_measured else "assumed" if facts.stated is None else "stated",
    }


async def _by_peers(contents: Contents, network: NetworkConfig) -> Swarm:
    """The servers of a model in the swarm of these peers: those of its own weights, or else of the most common ones."""
    from shoal.net import join

    async with join(network) as node:
        servers = await _servers(node, contents)
    weights = Counter(server.fingerprint for server in servers).most_common(1)
    return Swarm(contents, _with_weights(servers, contents.known_fingerprint or (weights[0][0] if weights else "")))


async def _by_code(code: InviteCode, network: NetworkConfig, *, allow_uncertified: bool) -> Swarm:
    """The model of an invite code, from members, and its servers. Only headers come of the weights."""
    from shoal.joining.arrival import arrive, files_from_members

    async with arrive(code, network) as arrival:
        invitation = arrival.invitation
        files = await files_from_members(arrival.node, invitation)

        def read() -> Contents:
            if files is not None:
                return Contents.of(files, allow_uncertified=allow_uncertified)
            revision = invitation.revision or None
            return Contents.open(invitation.hub, revision=revision, allow_uncertified=allow_uncertified)

        contents = await asyncio.to_thread(read)  # which fetches over this event loop
        if contents.known_fingerprint != invitation.fingerprint:
            raise UserError("members gave other weights than the invitation names", hint="ask for a fresh code")
        servers = await _servers(arrival.node, contents)
        return Swarm(contents, _with_weights(servers, invitation.fingerprint), invitation.dtype)


async def _servers(node: Node, contents: Contents) -> tuple[ServerInfo, ...]:
    return await node.directory.servers(
        ModelInfo(contents.key, contents.name, contents.model_type, contents.num_blocks)
    )


def _with_weights(servers: Sequence[ServerInfo], fingerprint: str) -> tuple[ServerInfo, ...]:
    return tuple(server for server in servers if server.fingerprint == fingerprint)
