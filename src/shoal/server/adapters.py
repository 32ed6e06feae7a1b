"""The adapters that clients have sent: kept for them while they are here, and found by the names of their contents."""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from shoal.model.adapters import BlockAdapter
from shoal.model.body import Body
from shoal.model.factors import Factors, Layer, name_of
from shoal.protocol import Adapter, Backward, Forward, Open
from shoal.server.executor import alone
from shoal.server.refusal import Tensors, misrouted, rejected
from shoal.spans import MAX_HOSTED, Span

ASIDE_BYTES = 1 << 20
"""Factors of so many bytes take long enough to be read that others should not wait for it."""


EVERYBODY = "everybody"
"""Who holds what is hosted: no peer's id."""
POPULAR = "popular"
"""Who holds what several clients have used, when they are gone: no peer's id either."""
FEW_USERS = 2
MANY_NAMES = 256
"""Of shared adapters whose users are remembered."""


class Lacks(Exception):
    """Something has to be sent again before this can be computed: these adapters, or the inputs of a kept pass."""

    def __init__(self, *, adapters: tuple[str, ...] = (), kept: bool = False) -> None:
        super().__init__("it is not here any more")
        self.adapters = adapters
        self.kept = kept


@dataclass
class _Entry:
    adapter: BlockAdapter
    block: int
    shared: str | None = None
    holders: set[str] = field(default_factory=set)


class Adapters:
    """At most so many bytes of them. Whoever holds most loses first what he has not used for longest.

    What the operator hosts stays. Adapters that are shared and that several clients have used stay when these are gone,
    as long as nobody needs the room.
    """

    def __init__(self, body: Body, *, most_bytes: int) -> None:
        self._body = body
        self._most_bytes = most_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # those used last at the end
        self._users: OrderedDict[str, set[str]] = OrderedDict()  # of shared adapters, whoever is here or was

    @property
    def num_bytes(self) -> int:
        """Of those that clients have sent."""
        return sum(entry.adapter.nbytes for entry in self._entries.values() if EVERYBODY not in entry.holders)

    @property
    def announced(self) -> tuple[str, ...]:
        """The names of the shared adapters that clients need not send: those hosted first."""
        kept = [entry for entry in self._entries.values() if entry.shared is not None]
        hosted = [entry.shared for entry in kept if EVERYBODY in entry.holders]
        popular = [entry.shared for entry in reversed(kept) if self._is_popular(entry)]
        return tuple(dict.fromkeys(name for name in (*hosted, *popular) if name is not None))[:MAX_HOSTED]

    def _is_popular(self, entry: _Entry) -> bool:
        return entry.shared is not None and len(self._users.get(entry.shared, ())) >= FEW_USERS

    def host(self, factors: Factors) -> None:
        """Keep an adapter for everybody, as long as the server runs. Raises `Refused` for one that does not fit."""
        adapter = self._made(factors.block, factors.layers, factors.values, factors.name)
        entry = self._entries.setdefault(factors.name, _Entry(adapter, factors.block, factors.hosted))
        entry.holders.add(EVERYBODY)

    async def keep(self, peer: str, request: Adapter, tensors: Tensors) -> None:
        """Keep what a client sends. Raises `Refused` for what is no adapter of a block here, or too large."""
        values_N = tensors.get("factors")
        if request.block not in self._body.span:
            raise misrouted(f"this server holds blocks {self._body.span}, not {request.block}")
        if values_N is None or values_N.dim() != 1 or not values_N.is_floating_point():
            raise rejected("the factors of an adapter must be floating-point numbers in a row")
        if values_N.nbytes > self._most_bytes:
            raise misrouted(f"an adapter of {values_N.nbytes} bytes; this server has room for {self._most_bytes}")
        if values_N.nbytes < ASIDE_BYTES and "peft" in sys.modules:  # to import it takes seconds
            adapter = self._read(request, values_N)
        else:
            adapter = await asyncio.to_thread(alone, lambda: self._read(request, values_N))
        if request.replaces is not None and request.replaces != adapter.name:
            self._release(peer, request.replaces)
        self._entries.setdefault(adapter.name, _Entry(adapter, request.block, request.shared))
        self._use(peer, adapter.name)
        self._make_room()

    def _use(self, peer: str, name: str) -> None:
        entry = self._entries[name]
        entry.holders.add(peer)
        self._entries.move_to_end(name)
        if entry.shared is not None:
            users = self._users.setdefault(entry.shared, set())
            if len(users) < FEW_USERS:
                users.add(peer)
            self._users.move_to_end(entry.shared)
            if len(self._users) > MANY_NAMES:
                self._users.popitem(last=False)

    def _read(self, request: Adapter, values_N: torch.Tensor) -> BlockAdapter:
        if not torch.isfinite(values_N).all():
            raise rejected("factors that are not finite")
        name = name_of(request.block, request.layers, values_N)
        if (entry := self._entries.get(name)) is not None:
            return entry.adapter
        return self._made(request.block, request.layers, values_N, name)

    def _made(self, block: int, layers: Sequence[Layer], values_N: torch.Tensor, name: str) -> BlockAdapter:
        backbone = self._body.backbone
        values_N, hidden_size = values_N.to(backbone.device), backbone.config.hidden_size
        try:
            return BlockAdapter(self._body.block(block), layers, values_N, name=name, hidden_size=hidden_size)
        except ValueError as error:
            raise rejected(str(error)) from None

    def of(self, peer: str, request: Open | Forward | Backward, span: Span) -> dict[int, BlockAdapter]:
        """The adapters that a request names, by their blocks. Raises `Lacks`, and `Refused` for another block's."""
        wanted = {block: name for block, name in zip(span, request.adapters, strict=False) if name is not None}
        if missing := [name for name in wanted.values() if name not in self._entries]:
            raise Lacks(adapters=tuple(dict.fromkeys(missing)))
        for block, name in wanted.items():
            entry = self._entries[name]
            if entry.block != block:
                raise rejected(f"an adapter of block {entry.block} for block {block}")
            self._use(peer, name)
        return {block: self._entries[name].adapter for block, name in wanted.items()}

    def release(self, peer: str) -> None:
        """A client is gone: what nobody else holds is forgotten."""
        for name in list(self._entries):
            self._release(peer, name)

    def _release(self, peer: str, name: str) -> None:
        if (entry := self._entries.get(name)) is not None:
            entry.holders.discard(peer)
            if not entry.holders and peer != POPULAR and self._is_popular(entry):
                entry.holders.add(POPULAR)
            if not entry.holders:
                del self._entries[name]

    def _make_room(self) -> None:
        while self.num_bytes > self._most_bytes:
            held = self._held()
            greediest = max(held, key=lambda peer: held[peer])
            oldest = next(name for name, entry in self._entries.items() if greediest in entry.holders)
            self._release(greediest, oldest)

    def _held(self) -> Mapping[str, int]:
        held: dict[str, int] = {}
        for entry in self._entries.values():
            for peer in entry.holders if EVERYBODY not in entry.holders else ():
                held[peer] = held.get(peer, 0) + entry.adapter.nbytes
        return held
