"""What a client is told at its start."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from shoal.errors import UserError
from shoal.policy.routing.route import Chooser
from shoal.protocol import MAX_TEXT
from shoal.spans import Span
from shoal.tensors import Encoding

CHOOSERS: tuple[Chooser, ...] = ("shortest", "nsga2")

FEWER_BYTES: tuple[Encoding, ...] = ("raw", "bfloat16", "int8")
"""The encodings, each smaller than the one before."""


@dataclass(frozen=True)
class ClientConfig:
    """How a client chooses its servers and how long it waits for them. Times are in seconds."""

    allowed_servers: frozenset[str] | None = None
    """Use these peers only; `None` allows all. What names a peer here and below: `shoal.client.options.peer_names`."""
    blocked_servers: frozenset[str] = frozenset()
    pinned: tuple[tuple[Span, str], ...] = ()
    """These blocks go through this peer and no other."""
    chooser: Chooser = "shortest"
    """How routes are chosen (`shoal.routing`)."""
    salt: str = ""
    """Servers share what they have computed of equal beginnings among sessions of equal salts only."""
    silence_seconds: float = 1.25
    """A server that says nothing for half a second is asked whether it is there; after so long without an answer it is
    lost. Longer while much is on its way."""
    longest_answer_seconds: float = 300.0
    """A server that says for so long that it is working on one request does not mean it."""
    patience_seconds: float = 30.0
    """How long to look for servers in place of those that were lost, or wait for those that are busy."""
    refresh_seconds: float = 20.0
    """The age at which a picture of the swarm is taken anew."""
    measure_seconds: float = 1.0
    """How long to wait for servers that were never measured to tell how far they are. Those that do not answer are used
    only if nobody else holds their blocks; 0 measures none in advance, and then nothing has to answer first."""
    remote_head: bool = False
    """Let the last server compute the output head in sessions, if any offers to."""
    head_top_k: int | None = None
    """Ask it for the logits of so many of the likeliest tokens only."""
    standby: bool = False
    """Keep a second server warm for each that a session is on: a failure then costs a step, and no replay."""
    wire: Encoding = "raw"
    """How hidden states and gradients travel. Whatever else than raw loses precision, so only the user chooses it."""
    history: Encoding = "raw"
    """How inputs are kept for the day that a server fails; the same holds for it."""
    history_memory: int | None = None
    """So many bytes of them, of all sessions together, stay in memory, the others in a file; `None`: all of them."""
    history_folder: Path | None = None
    """Where that file is; `None` is the system's folder for temporary files."""

    @property
    def kept(self) -> Encoding:
        """How inputs are kept in fact: what was rounded to travel loses nothing if it is kept the way it travels."""
        return max(self.history, self.wire, key=FEWER_BYTES.index)


def chooser_of(name: str) -> Chooser:
    """A way of choosing routes, by its name. Raises `UserError`."""
    for chooser in CHOOSERS:
        if chooser == name:
            return chooser
    raise UserError(f"no way of choosing routes is called {name!r}", hint=f"use one of {', '.join(CHOOSERS)}")


def salt_of(salt: str) -> str:
    """A salt that can travel. Raises `UserError`."""
    if len(salt) > MAX_TEXT:
        raise UserError(f"a salt of {len(salt)} characters", hint=f"{MAX_TEXT} are the most")
    return salt


def peers_of(peers: str | Iterable[object]) -> frozenset[str]:
    """Peers by their ids: in a list, or in one string with spaces or commas between them."""
    return frozenset(peers.replace(",", " ").split() if isinstance(peers, str) else map(str, peers))


def pins_of(pinned: Mapping[str, str]) -> tuple[tuple[Span, str], ...]:
    """Spans and their peers, from `{"0:4": PEER}`. Raises `UserError` for what is no span, and for a block with two."""
    try:
        pins = sorted((Span.parse(span), peer) for span, peer in pinned.items())
    except ValueError as error:
        raise UserError(str(error), hint='pin blocks to a peer like this: {"0:4": "12D3KooW..."}') from None
    for (one, peer), (other, other_peer) in combinations(pins, 2):
        if other.start < one.end and peer != other_peer:
            raise UserError(f"blocks {one} and {other} overlap, and are pinned to different peers")
    return tuple(pins)
