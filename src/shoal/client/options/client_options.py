"""Everything that is asked of a client, checked once and frozen. Nothing here imports PyTorch or anything else slow."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from shoal.client.options.keywords import resolve
from shoal.errors import UserError
from shoal.events import Observer
from shoal.ledgers.ledger_place import LedgerPlace
from shoal.model.weights.disk_cache import cache_folder
from shoal.model.weights.location import check_model, is_path
from shoal.net import NetworkConfig
from shoal.net.swarm_key import SwarmKey, key_in
from shoal.policy.audits.audit_budget import RATES, AuditLevel
from shoal.spans import Span

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from shoal.joining.invite_code import InviteCode
    from shoal.policy.routing.route import Chooser
    from shoal.tensors import Encoding

T = TypeVar("T")

INITIAL_PEERS = "SHOAL_INITIAL_PEERS"
"""The environment variable that names the initial peers when the caller names none."""

PATIENCE_SECONDS = 180.0
"""The default patience: long enough for another server to notice that blocks have no server, and to load them."""

CHOOSERS: Mapping[str, Chooser] = {"balanced": "balanced", "shortest": "shortest", "nsga2": "nsga2"}
"""How routes are chosen (`shoal.policy.routing.route`)."""

WIRES: Mapping[str, Encoding] = {"auto": "raw", "raw": "raw", "bfloat16": "bfloat16", "int8": "int8"}
"""How hidden states and gradients travel, and the encoding that each name means."""
UNPACKED = "raw"
"""The way to travel without packing. All others pack, without loss, what is there sooner then."""

AUTO, MTP, OFF = "auto", "mtp", "off"
"""How the next tokens of a stream are guessed, if not by a model: from what the text repeats; by layers of the
checkpoint that predict further tokens, too; or not at all."""

HISTORIES: Mapping[str, Encoding] = {"exact": "raw", "bfloat16": "bfloat16", "int8": "int8"}
"""How inputs are kept for a replay, and the encoding that each name means."""

ENCODINGS_BY_SIZE: tuple[Encoding, ...] = ("raw", "bfloat16", "int8")
"""Each encoding takes fewer bytes than the one before it."""


@dataclass(frozen=True)
class ModelOptions:
    """Which checkpoint is read, and how the part of it that the client computes is set up."""

    revision: str | None = None
    token: str | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    allow_uncertified: bool = False
    dtype: torch.dtype | str = "auto"
    """What the client computes in and sends; "auto" is what the swarm computes in."""
    device: torch.device | str = "cpu"
    head_quantization: str = "none"
    tuning_mode: str | None = None
    pre_seq_len: int = 0
    """The length of the soft prompt, in tokens; 0 without a `tuning_mode`."""
    active_adapter: str | Path | None = None
    """A PEFT folder, or its id on the Hugging Face hub."""
    config_changes: Mapping[str, Any] = field(default_factory=dict)
    """What the caller changes about the model's config, by attribute."""


@dataclass(frozen=True)
class ClientOptions:
    """How a client opens one model, chooses servers for it, and how long it waits for them.

    Python's keywords (`from_keywords`) and the command line make one each; everything else is given the finished value.
    A server is named here by its peer id, by the end of that, or by its own name (`shoal.client.options.peer_names`).
    """

    initial_peers: tuple[str, ...] = ()
    """Addresses of the peers through which the client joins the swarm."""
    swarm_key: SwarmKey | None = None
    """The key of a closed swarm."""
    allowed_servers: frozenset[str] | None = None
    """The only servers that may be used; `None` allows all."""
    blocked_servers: frozenset[str] = frozenset()
    pinned: tuple[tuple[Span, str], ...] = ()
    """Spans of blocks, each with the only server that may compute it."""
    chooser: Chooser = "balanced"
    salt: str | None = field(default=None, repr=False)
    """Servers share what they have cached among sessions with equal salts only. `None` is a secret one that the model
    draws when it is opened; "" is that of all clients that want to share."""
    silence_seconds: float = 1.25
    """A server that sends nothing for half a second is pinged, and is lost when it is silent for this long. The client
    waits longer while many bytes are in flight."""
    longest_answer_seconds: float = 300.0
    """A server may report progress on one request for this long before the client gives it up."""
    patience_seconds: float = PATIENCE_SECONDS
    """How long a call waits for blocks that no server computes now: the last one is lost, busy or still loading. With 0
    it fails at once."""
    refresh_seconds: float = 20.0
    """The age at which the client reads the directory again."""
    measure_seconds: float = 1.0
    """How long the client waits for the first pings of servers that it has not measured. Servers that do not answer
    are used only where no other holds their blocks. With 0 the client does not ping in advance."""
    remote_head: bool = False
    """Whether the last server computes the output head in sessions, if it offers to."""
    head_top_k: int | None = None
    """How many logits a remote head sends for a token: those of the likeliest tokens. `None` is all of them."""
    standby: bool = False
    """Whether a second server is kept warm for every server of a session."""
    draft: str | Path | PreTrainedModel = AUTO
    """How streams guess their next tokens where that is faster: "auto", from what the text repeats; by layers of the
    checkpoint too ("mtp"), or by this model, which is a folder, an id on the hub, or one that is loaded; or "off"."""
    audits: AuditLevel = "low"
    """How often what servers answer is computed again by others, to find those that lie."""
    evidence_folder: Path | None = None
    """Where the evidence against liars is kept; `None` is `shut-out` in shoal's cache folder."""
    own_servers: tuple[Path, ...] | None = None
    """The identity files of the servers that the client acts for; `None` are those that `shoal serve` keeps here."""
    ledger_folder: Path | None = None
    """Where is kept what servers compute for this machine; `None` is `contribution` in shoal's cache folder."""
    wire: Encoding = "raw"
    """The encoding of hidden states and gradients on the network. All others than "raw" are lossy."""
    packs: bool = True
    """Whether tensors are packed without loss where they are there sooner then (`shoal.policy.network.goodput`)."""
    history: Encoding = "raw"
    """The encoding of the inputs that are kept for a replay. All others than "raw" are lossy."""
    history_memory: int | None = None
    """The bytes of history that stay in memory, for all sessions together; `None` keeps all of it there."""
    history_folder: Path | None = None
    """The folder of the file that takes the rest; `None` is the system's folder for temporary files."""
    observers: tuple[Observer, ...] = ()
    """What is told of this model's events, beside the log (`shoal.events`)."""
    model: ModelOptions = ModelOptions()

    def __post_init__(self) -> None:
        from shoal.protocol import MAX_TEXT  # here, because `shoal --help` needs none of the messages

        if self.salt is not None and len(self.salt) > MAX_TEXT:
            raise UserError(
                f"a salt of {len(self.salt)} characters is too long", hint=f"it may have up to {MAX_TEXT} characters"
            )
        if not 0 <= self.patience_seconds < float("inf"):
            raise UserError(
                f"patience={self.patience_seconds:g}: it is a number of seconds", hint="0 does not wait; a day is 86400"
            )
        if self.head_top_k is not None and not self.remote_head:
            raise UserError("head_top_k is for a head that a server computes", hint="add remote_head=True")
        if self.head_top_k is not None and self.head_top_k < 1:
            raise UserError(f"head_top_k={self.head_top_k}: it must be at least 1")

    @property
    def history_encoding(self) -> Encoding:
        """The smaller of both encodings: inputs that were rounded for the network lose nothing by being kept so."""
        return max(self.history, self.wire, key=ENCODINGS_BY_SIZE.index)

    @property
    def ledgers(self) -> LedgerPlace:
        """Where the machine's ledgers and its servers' identities are."""
        place = LedgerPlace.of(cache_folder(), self.own_servers)
        return place if self.ledger_folder is None else replace(place, folder=self.ledger_folder)

    @property
    def network(self) -> NetworkConfig:
        """How the client takes part in the swarm's network: it dials, and stores nothing for others."""
        return NetworkConfig(initial_peers=self.initial_peers, client_mode=True, swarm_key=self.swarm_key)

    def by_code(self, code: InviteCode, peers: Sequence[str]) -> ClientOptions:
        """The same for the swarm of an invite code, through these of its members too, with the code's key."""
        return replace(self, initial_peers=(*peers, *self.initial_peers), swarm_key=code.swarm_key)

    @classmethod
    def from_keywords(
        cls,
        *,
        initial_peers: str | Sequence[str] | None = None,
        swarm_key: str | Path | None = None,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        allowed_servers: str | Sequence[str] | None = None,
        blocked_servers: str | Sequence[str] | None = None,
        pinned: Mapping[str, str] | None = None,
        chooser: str = "balanced",
        wire: str = "auto",
        patience: float = PATIENCE_SECONDS,
        standby: bool = False,
        draft: str | Path | PreTrainedModel = AUTO,
        audits: str = "low",
        own_servers: str | Sequence[str | Path] | None = None,
        history: str = "exact",
        history_memory: int | None = None,
        history_folder: str | Path | None = None,
        remote_head: bool = False,
        head_top_k: int | None = None,
        head_quantization: str = "none",
        tuning_mode: str | None = None,
        pre_seq_len: int = 0,
        active_adapter: str | Path | None = None,
        salt: str | None = None,
        allow_uncertified: bool = False,
        local_files_only: bool = False,
        observers: Sequence[Observer] = (),
        **others: Any,
    ) -> ClientOptions:
        """The options that the keywords of `from_pretrained` ask for; its docstring describes them.

        Keywords of Transformers and PETALS are resolved (`shoal.client.options.keywords`); all others are changes of
        the model's config, which are checked when that is known. Raises `UserError`.
        """
        keywords = resolve(others, {"dtype": dtype, "device": device, "token": token})
        model = ModelOptions(
            revision=revision,
            token=keywords.own["token"],
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            allow_uncertified=allow_uncertified,
            dtype=keywords.own["dtype"],
            device=keywords.own["device"],
            head_quantization=head_quantization,
            tuning_mode=tuning_mode,
            pre_seq_len=pre_seq_len,
            active_adapter=active_adapter,
            config_changes=keywords.config_changes,
        )
        return cls(
            initial_peers=parse_initial_peers(initial_peers),
            swarm_key=key_in(swarm_key),
            allowed_servers=None if allowed_servers is None else parse_peers(allowed_servers),
            blocked_servers=parse_peers(blocked_servers or ()),
            pinned=parse_pins(pinned or {}),
            chooser=parse_chooser(chooser),
            salt=salt,
            remote_head=remote_head,
            head_top_k=head_top_k,
            patience_seconds=float(patience),
            standby=standby,
            draft=parse_draft(draft),
            audits=parse_audits(audits),
            own_servers=parse_own_servers(own_servers),
            wire=parse_wire(wire),
            packs=wire != UNPACKED,
            history=parse_history(history),
            history_memory=history_memory,
            history_folder=None if history_folder is None else Path(history_folder).expanduser(),
            observers=tuple(observers),
            model=model,
        )


def parse_initial_peers(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """The addresses in a list, or in a string with spaces or commas between them; of `None`, in `$SHOAL_INITIAL_PEERS`.

    May be empty. The addresses are checked by `shoal.net.addressing.addresses.check_peers`.
    """
    peers = os.environ.get(INITIAL_PEERS, "") if given is None else given
    return tuple(peers.replace(",", " ").split() if isinstance(peers, str) else peers)


def parse_peers(peers: str | Iterable[object]) -> frozenset[str]:
    """The servers in a list, or in a string with spaces or commas between them."""
    return frozenset(peers.replace(",", " ").split() if isinstance(peers, str) else map(str, peers))


def parse_pins(pinned: Mapping[str, str]) -> tuple[tuple[Span, str], ...]:
    """Spans and their servers, from `{"0:4": PEER}`, by their blocks.

    Raises `UserError` for a key that is not a span, and for a block that two servers are named for.
    """
    try:
        pins = sorted((Span.parse(span), peer) for span, peer in pinned.items())
    except ValueError as error:
        raise UserError(str(error), hint='pin blocks to a peer like this: {"0:4": "12D3KooW..."}') from None
    for (one, peer), (other, other_peer) in combinations(pins, 2):
        if other.start < one.end and peer != other_peer:
            raise UserError(f"blocks {one} and {other} overlap, and are pinned to different peers")
    return tuple(pins)


def parse_chooser(name: str) -> Chooser:
    """How routes are chosen. Raises `UserError` for a name that is not in `CHOOSERS`."""
    return _named(name, CHOOSERS, "a way to choose routes")


def parse_draft(draft: T) -> T:
    """How streams guess: "auto", "mtp", "off", or a model. Raises `UserError` for text that cannot be any of them.

    An id on the hub has an owner here, so that a misspelled "auto" is not one.
    """
    if isinstance(draft, str | Path) and draft not in (AUTO, MTP, OFF):
        if isinstance(draft, str) and "/" not in draft and not is_path(draft) and not Path(draft).is_dir():
            raise UserError(
                f"{draft!r} is not a way to guess tokens",
                hint=f"use {AUTO}, {MTP}, {OFF}, or a model: a folder, or OWNER/NAME on the hub",
            )
        check_model(draft)
    return draft


def parse_audits(name: str) -> AuditLevel:
    """How often servers are audited. Raises `UserError` for a name that is not in `RATES`."""
    levels: dict[str, AuditLevel] = {level: level for level in RATES}
    return _named(name, levels, "a level of audits")


def parse_own_servers(given: str | Sequence[str | Path] | None) -> tuple[Path, ...] | None:
    """The identity files of servers that a client acts for, from a list or a string of them, or the word "none".

    `None` stands for those that `shoal serve` keeps on this machine.
    """
    if given is None:
        return None
    names = given.replace(",", " ").split() if isinstance(given, str) else [*map(str, given)]
    return () if names == ["none"] else tuple(Path(name).expanduser() for name in names)


def parse_wire(name: str) -> Encoding:
    """How tensors travel. Raises `UserError` for a name that is not in `WIRES`."""
    return _named(name, WIRES, "a way to send tensors")


def parse_history(name: str) -> Encoding:
    """How inputs are kept. Raises `UserError` for a name that is not in `HISTORIES`."""
    return _named(name, HISTORIES, "a way to keep a history")


def _named(name: str, table: Mapping[str, T], what: str) -> T:
    if name not in table:
        raise UserError(f"{name!r} is not {what}", hint=f"use one of {', '.join(table)}")
    return table[name]
