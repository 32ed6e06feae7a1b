"""Options that several commands share, with the same names and meanings, and the `ClientOptions` made from them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from shoal.cli import network_options
from shoal.cli.terminal.console import WrongUsage, as_usage, start_logging
from shoal.cli.terminal.shown_parameters import with_parameters
from shoal.client.options.client_options import (
    AUTO,
    INITIAL_PEERS,
    PATIENCE_SECONDS,
    ClientOptions,
    parse_initial_peers,
)
from shoal.joining.invite_code import InviteCode, code_in, is_code
from shoal.model.weights.location import check_model, check_on_hub, folder_of
from shoal.policy.batching.pass_rules import DEFAULT_RULE

MOST_OF_NAME = 128  # what a record takes (shoal.net.records)
MOST_OF_HOST = 32
Command = Callable[..., None]


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class CacheDType(StrEnum):
    auto = "auto"
    int8 = "int8"


class DType(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Wire(StrEnum):
    auto = "auto"
    raw = "raw"
    bfloat16 = "bfloat16"
    int8 = "int8"


class Audits(StrEnum):
    off = "off"
    low = "low"
    high = "high"


class History(StrEnum):
    exact = "exact"
    bfloat16 = "bfloat16"
    int8 = "int8"


class Chooser(StrEnum):
    balanced = "balanced"
    shortest = "shortest"
    nsga2 = "nsga2"


class Scheduling(StrEnum):
    fair = "fair"
    first_come = "first-come"


class Placement(StrEnum):
    graded = "graded"
    petals = "petals"


class Quantization(StrEnum):
    none = "none"
    int8 = "int8"
    nf4 = "nf4"


DTYPES = ", ".join(DType)
QUANTIZATIONS = ", ".join(Quantization)
SCHEDULINGS = ", ".join(Scheduling)
DEFAULT_SCHEDULING = Scheduling(DEFAULT_RULE)

Code = Annotated[str, typer.Argument(metavar="CODE", help="An invite code, as members of the swarm print it.")]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, an id on the Hugging Face hub, or an invite code.")
]
InitialPeers = Annotated[
    list[str] | None,
    typer.Option(
        "--initial-peers",
        metavar="ADDRESS...",
        help=f"Peers to join by, as `shoal serve` prints them. Default: ${INITIAL_PEERS}.",
    ),
]
Revision = Annotated[
    str | None, typer.Option(metavar="REVISION", help="A branch, tag or commit of the model on the hub.")
]
AllowUncertified = Annotated[
    bool,
    typer.Option("--allow-uncertified/--no-allow-uncertified", help="Also models of families that were never checked."),
]
Adapter = Annotated[
    str | None, typer.Option(metavar="ADAPTER", help="Compute with this PEFT adapter, a Hugging Face id or a folder.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, metavar="N", help="Stop after this many tokens.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        min=0.0, metavar="T", help="Sample, with more variety the higher it is; 1 is the model's own distribution."
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=1.0, metavar="P", help="Sample from the likeliest tokens that together have this probability."
    ),
]
TopK = Annotated[int | None, typer.Option(min=1, metavar="N", help="Sample from this many of the likeliest tokens.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="The same seed samples the same text.")]
ClientDType = Annotated[
    DType,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help=f"What this machine computes in and sends: {DTYPES}; auto is what the swarm computes in.",
    ),
]
OnTheWire = Annotated[
    Wire,
    typer.Option(
        "--wire",
        metavar="ENCODING",
        help="How hidden states travel: auto, packed without loss where that is faster; raw; or bfloat16, int8: fewer "
        "bytes, less precise.",
    ),
]
HistoryEncoding = Annotated[
    History,
    typer.Option(
        "--history",
        metavar="ENCODING",
        help="How to keep the inputs that a replacement of a lost server needs: exact, or bfloat16, int8: fewer bytes, "
        "less precise.",
    ),
]
HistoryMemory = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="MIB",
        help="How much of these inputs stays in memory; the rest is in a temporary file.",
    ),
]
Standby = Annotated[
    bool,
    typer.Option(
        "--standby/--no-standby", help="Keep a second server warm for each in use: a failure then costs a step or two."
    ),
]
Draft = Annotated[
    str,
    typer.Option(
        "--draft",
        metavar="KIND",
        help="Guess tokens ahead where that is faster, with the same text: auto, from what the text repeats; mtp, by "
        "the checkpoint's own layers; MODEL, a small model (a folder, an id on the hub) that runs here; or off.",
    ),
]
AuditLevel = Annotated[
    Audits,
    typer.Option(
        "--audits", metavar="LEVEL", help=f"How often others check what a server computes: {', '.join(Audits)}."
    ),
]
Patience = Annotated[
    float,
    typer.Option(
        "--patience",
        min=0.0,
        metavar="SECONDS",
        help="How long to wait for blocks whose last server is lost or busy, or still loads them; 0: not at all.",
    ),
]
Pin = Annotated[
    list[str] | None,
    typer.Option(
        "--pin",
        metavar="SPAN=PEER",
        help="Let only this server compute these blocks: 0:4=NAME, or its id as status shows it.",
    ),
]
ChooseBy = Annotated[
    Chooser,
    typer.Option("--chooser", metavar="NAME", help=f"How the route is chosen: {', '.join(Chooser)}."),
]
SharePrefixes = Annotated[
    bool,
    typer.Option(
        "--share-prefixes/--no-share-prefixes",
        help="Reuse beginnings of texts that servers computed for others who say so too; these can find out which "
        "beginnings you have sent.",
    ),
]
RemoteHead = Annotated[
    bool,
    typer.Option(
        "--remote-head/--no-remote-head",
        help="Let a server compute the output head, if one offers to (serve --serve-head); else it is computed here.",
    ),
]
HeadQuantization = Annotated[
    Quantization,
    typer.Option("--head-quantization", metavar="KIND", help=f"How to hold the output head here: {QUANTIZATIONS}."),
]
OnDevice = Annotated[
    Device,
    typer.Option(metavar="DEVICE", help="Compute on cpu, cuda or mps (untested). auto: cuda if there is a GPU."),
]
StoredAs = Annotated[
    Quantization,
    typer.Option(metavar="KIND", help=f"Quantize the weights of the blocks: {QUANTIZATIONS}."),
]
Verbose = Annotated[
    bool, typer.Option("--verbose/--no-verbose", "-v", help="Log everything to stderr; so does SHOAL_LOG=debug.")
]


def peers_of(initial_peers: Sequence[str] | None) -> tuple[str, ...]:
    """The peers that `--initial-peers` names, or else the environment. May be empty."""
    return parse_initial_peers(" ".join(initial_peers) if initial_peers else None)


def checked_code(text: str) -> InviteCode:
    """The invite code that a user typed. Raises `WrongUsage` for anything else."""
    with as_usage():
        return InviteCode.parse(text)


@as_usage()
def swarm_peers(initial_peers: Sequence[str] | None) -> tuple[str, ...]:
    """The same, for a command that needs some. Raises `WrongUsage` for text that is not the address of a peer."""
    from shoal.net.addressing.addresses import check_peers

    peers = peers_of(initial_peers)
    if not peers:
        raise WrongUsage(
            "which swarm? No --initial-peers are given",
            hint=f"pass an address or an invite code, or set {INITIAL_PEERS}; `shoal join` lists those of this LAN",
        )
    if code := next(filter(is_code, peers), None):
        raise WrongUsage(f"{code} is an invite code", hint="it stands in place of MODEL, without --initial-peers")
    return check_peers(peers)


@as_usage()
def client_options(  # the first parameter stands first in the help of a command
    initial_peers: InitialPeers = None,
    swarm_key: network_options.SwarmKeyFile = None,
    adapter: Adapter = None,
    dtype: ClientDType = DType.auto,
    wire: OnTheWire = Wire.auto,
    history: HistoryEncoding = History.exact,
    history_memory: HistoryMemory = None,
    patience: Patience = PATIENCE_SECONDS,
    standby: Standby = False,
    draft: Draft = AUTO,
    audits: AuditLevel = Audits.low,
    own_server: network_options.OwnServers = None,
    pin: Pin = None,
    chooser: ChooseBy = Chooser.balanced,
    share_prefixes: SharePrefixes = False,
    remote_head: RemoteHead = False,
    head_quantization: HeadQuantization = Quantization.none,
    revision: Revision = None,
    allow_uncertified: AllowUncertified = False,
    *,
    models: Sequence[str] = (),
) -> ClientOptions:
    """The options of a client, from those of the command line. Imports nothing slow. Raises `WrongUsage`.

    If all `models` are invite codes, these name the swarm.
    """
    is_named = bool(models) and all(map(is_code, models))
    return ClientOptions.from_keywords(
        initial_peers=() if is_named and not initial_peers else swarm_peers(initial_peers),
        swarm_key=network_options.key_beside_code(swarm_key) if is_named else swarm_key,
        active_adapter=adapter,
        dtype=dtype,
        wire=wire,
        history=history,
        history_memory=None if history_memory is None else history_memory << 20,
        patience=patience,
        standby=standby,
        draft=draft,
        audits=audits,
        own_servers=own_server or None,
        pinned=pins(pin),
        chooser=chooser,
        salt="" if share_prefixes else None,
        remote_head=remote_head,
        head_quantization=head_quantization,
        revision=revision,
        allow_uncertified=allow_uncertified,
    )


def with_client_options(command: Command, *, log: str = "error", shows_progress: bool = False) -> Command:
    """Give a command the options of `client_options`, and --verbose, in place of its parameter `client`.

    The command is called with the finished `ClientOptions`, once the log is set up, at the level `log` by default. An
    option that it has itself is its own.
    """
    own_parameters = inspect.signature(command, eval_str=True).parameters
    of_clients = inspect.signature(client_options, eval_str=True).parameters
    shared = {name: each for name, each in of_clients.items() if name not in {*own_parameters, "models"}}
    verbose = inspect.Parameter("verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Verbose)

    @functools.wraps(command)
    def wrapped(*, verbose: bool, **values: Any) -> None:
        start_logging(verbose=verbose, default=log, progress=shows_progress)
        models = values.get("models") or ([values["model"]] if values.get("model") else [])
        client = client_options(**{name: values.pop(name) for name in shared}, models=models)
        command(client=client, **values)

    first, *others = shared.values()  # --initial-peers stands in the place of `client`, the others at the end
    own = [first if each.name == "client" else each for each in own_parameters.values()]
    return with_parameters(wrapped, [*own, *others, verbose])


def check_places(model: str, adapter: str | Path | None = None, *, revision: str | None = None) -> None:
    """Raises `UserError` for a model or an adapter that is nowhere, before anything slow is imported."""
    with as_usage():
        if adapter is not None:
            folder_of(str(adapter))
        if code_in(model) is not None:
            return
        check_model(model)
    check_on_hub(model, revision=revision)  # which may answer the next time: the command line need not change


def server_name(given: str | None, host: str) -> str:
    """A server's name: the given one, or the first part of its host's name, without characters that cannot be printed.

    Raises `WrongUsage` for a name that no peer would accept.
    """
    if given is None:
        short = host.partition(".")[0]
        return "".join(letter for letter in short if letter.isprintable())[:MOST_OF_HOST]
    if len(given) > MOST_OF_NAME or not given.isprintable():
        raise WrongUsage(
            f"a name of {len(given)} characters" if given.isprintable() else "a name with control characters",
            hint=f"--name takes up to {MOST_OF_NAME} printable characters",
        )
    return given


def pins(given: Sequence[str] | None) -> dict[str, str]:
    """What `--pin 0:4=PEER` says, in the form of the keyword `pinned`. Raises `WrongUsage`."""
    found: dict[str, str] = {}
    for each in given or ():
        span, _, peer = each.partition("=")
        if not span or not peer:
            hint = "write --pin 0:4=PEER, a name or an id that shoal status shows"
            raise WrongUsage(f"not a span and a peer: {each!r}", hint=hint)
        if found.setdefault(span, peer) != peer:
            raise WrongUsage(f"blocks {span} are pinned to two peers")
    return found


def sampling(
    temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None, num_beams: int = 1
) -> dict[str, Any]:
    """The arguments of `generate()` that say how tokens are chosen: greedily, unless an option asks for sampling.

    Raises `WrongUsage` for options that contradict each other.
    """
    if not temperature and temperature is not None and (top_p is not None or top_k is not None):
        raise WrongUsage("a temperature of 0 makes --top-p and --top-k useless", hint="leave --temperature out")
    is_random = bool(temperature) or (temperature is None and (top_p is not None or top_k is not None))
    if seed is not None and not is_random:
        raise WrongUsage("--seed changes nothing without sampling", hint="add --temperature 0.8")
    chosen: dict[str, Any] = {"do_sample": is_random, "num_beams": num_beams}
    if is_random:
        chosen |= {"temperature": temperature or 1.0, "top_p": top_p, "top_k": top_k or 0}
    return {option: value for option, value in chosen.items() if value is not None}
