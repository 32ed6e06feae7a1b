"""The adapters that clients have sent: kept for them while they are here, and found by the names of their contents."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch

from shoal.model.body import Body
from shoal.model.peft.block_adapters import BlockAdapter
from shoal.model.peft.factors import AdapterFactors, Layer, factors_name
from shoal.peers import MAX_HOSTED_ADAPTERS
from shoal.protocol import Adapter, Backward, Forward, Open
from shoal.server.executor import alone
from shoal.server.refusals import busy, misrouted, rejected
from shoal.server.step_inputs import Tensors
from shoal.spans import Span

LAYER_BYTES = 32 * 1024
"""What PEFT's layer takes beside its factors (26 KB were measured): small adapters count for what they are."""
OPERATOR = "everybody"
"""Who holds what is hosted: no peer's id."""
POPULAR = "popular"
"""Who holds what several clients have used, when they are gone: no peer's id either."""
FEW_USERS = 2
MANY_NAMES = 256
"""Of shared adapters whose users are remembered."""


class MissingFromCache(Exception):
    """Something has to be sent again before this can be computed: these adapters, or the inputs of a kept pass."""

    def __init__(self, *, adapters: tuple[str, ...] = (), kept: bool = False) -> None:
        super().__init__("it is not here any more")
        self.adapters = adapters
        self.kept = kept


@dataclass
class _Entry:
    adapter: BlockAdapter
    block: int
    num_bytes: int
    shared: str | None = None
    holders: set[str] = field(default_factory=set)


@dataclass
class _ClientHolding:
    """What one client holds: the names, those used last at the end, and how much room that takes."""

    names: OrderedDict[str, None] = field(default_factory=OrderedDict)
    num_bytes: int = 0


class AdapterStore:
    """At most so many bytes of them. Whoever holds most loses first what he has not used for longest.

    What the operator hosts stays. Adapters that are shared and that several clients have used stay when these are gone,
    as long as nobody needs the room.

    What left is still there while a session or a pass computes with it: as much again at most, together with what is
    here. Before anybody is told to come back, `drop_adapters` is asked to do without adapters that left, where it can.
    """

    def __init__(
        self, body: Body, *, most_bytes: int, drop_adapters: Callable[[Collection[BlockAdapter]], None]
    ) -> None:
        self._body = body
        self._most_bytes = most_bytes
        self._let_go = drop_adapters
        self._num_bytes = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # those used last at the end
        self._holdings: defaultdict[str, _ClientHolding] = defaultdict(_ClientHolding)
        self._left: WeakKeyDictionary[BlockAdapter, int] = WeakKeyDictionary()
        self._users: OrderedDict[str, set[str]] = OrderedDict()  # of shared adapters, whoever is here or was

    @property
    def num_bytes(self) -> int:
        """Of those that clients have sent."""
        return self._num_bytes

    @property
    def announced(self) -> tuple[str, ...]:
        """The names of the shared adapters that clients need not send: those hosted first."""
        kept = [entry for entry in self._entries.values() if entry.shared is not None]
        hosted = [entry.shared for entry in kept if OPERATOR in entry.holders]
        popular = [entry.shared for entry in reversed(kept) if self._is_popular(entry)]
        return tuple(dict.fromkeys(name for name in (*hosted, *popular) if name is not None))[:MAX_HOSTED_ADAPTERS]

    def _is_popular(self, entry: _Entry) -> bool:
        return entry.shared is not None and len(self._users.get(entry.shared, ())) >= FEW_USERS

    def host(self, factors: AdapterFactors) -> None:
        """Keep an adapter for everybody, as long as the server runs. Raises `Refused` for one that does not fit."""
        adapter = self._made(factors.block, factors.layers, factors.values, factors.name)
        entry = self._entries.setdefault(factors.name, _Entry(adapter, factors.block, 0, factors.hosted))
        entry.holders.add(OPERATOR)

    async def keep(self, peer: str, request: Adapter, tensors: Tensors) -> None:
        """Keep what a client sends.

        Raises `Refused` for what is no adapter of a block here, or too large, and while too much that left is in use.
        """
        values_N = tensors.get("factors")
        if request.block not in self._body.span:
            raise misrouted(f"this server holds blocks {self._body.span}, not {request.block}")
        if values_N is None or values_N.dim() != 1 or not values_N.is_floating_point():
            raise rejected("the factors of an adapter must be floating-point numbers in a row")
        num_bytes = values_N.nbytes + len(request.layers) * LAYER_BYTES
        if num_bytes > self._most_bytes:
            raise misrouted(f"an adapter of {num_bytes} bytes; this server has room for {self._most_bytes}")
        # PEFT takes two milliseconds to make a layer, a thread a tenth of one.
        adapter = await asyncio.to_thread(alone, lambda: self._read(request, values_N))
        if request.replaces is not None and request.replaces != adapter.name:
            self._release(peer, request.replaces)
        if adapter.name not in self._entries:
            self._make_room(num_bytes)
            self._left.pop(adapter, None)  # it went while it was being read
            self._entries[adapter.name] = _Entry(adapter, request.block, num_bytes, request.shared)
            self._num_bytes += num_bytes
        self._use(peer, adapter.name)

    def _use(self, peer: str, name: str) -> None:
        entry = self._entries[name]
        self._entries.move_to_end(name)
        if OPERATOR in entry.holders:
            return
        self._hold(peer, name)
        for holder in entry.holders:
            self._holdings[holder].names.move_to_end(name)
        if entry.shared is not None:
            users = self._users.setdefault(entry.shared, set())
            if len(users) < FEW_USERS:
                users.add(peer)
            self._users.move_to_end(entry.shared)
            if len(self._users) > MANY_NAMES:
                self._users.popitem(last=False)

    def _hold(self, holder: str, name: str) -> None:
        entry, holding = self._entries[name], self._holdings[holder]
        if holder not in entry.holders:
            entry.holders.add(holder)
            holding.names[name] = None
            holding.num_bytes += entry.num_bytes

    def _read(self, request: Adapter, values_N: torch.Tensor) -> BlockAdapter:
        if not torch.isfinite(values_N).all():
            raise rejected("factors that are not finite")
        name = factors_name(request.block, request.layers, values_N)
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
        """The adapters that a request names, by their blocks. Raises `MissingFromCache`, and `Refused` for another
        block's."""
        wanted = {block: name for block, name in zip(span, request.adapters, strict=False) if name is not None}
        if missing := [name for name in wanted.values() if name not in self._entries]:
            raise MissingFromCache(adapters=tuple(dict.fromkeys(missing)))
        for block, name in wanted.items():
            entry = self._entries[name]
            if entry.block != block:
                raise rejected(f"an adapter of block {entry.block} for block {block}")
            self._use(peer, name)
        return {block: self._entries[name].adapter for block, name in wanted.items()}

    def release(self, peer: str) -> None:
        """A client is gone: what nobody else holds is forgotten."""
        if (holding := self._holdings.get(peer)) is not None:
            for name in list(holding.names):
                self._release(peer, name)

    def _release(self, holder: str, name: str) -> None:
        entry = self._entries.get(name)
        if entry is None or holder not in entry.holders:
            return
        holding = self._holdings[holder]
        entry.holders.remove(holder)
        del holding.names[name]
        holding.num_bytes -= entry.num_bytes
        if not holding.names:
            del self._holdings[holder]
        if not entry.holders and holder != POPULAR and self._is_popular(entry):
            self._hold(POPULAR, name)
        if not entry.holders:
            del self._entries[name]
            self._num_bytes -= entry.num_bytes
            self._left[entry.adapter] = entry.num_bytes

    def _make_room(self, num_bytes: int) -> None:
        """Raises `Refused` if there is none, because those who compute with what left need it."""
        while self._num_bytes + num_bytes > self._most_bytes:
            greediest = max(self._holdings, key=lambda holder: self._holdings[holder].num_bytes)
            self._release(greediest, next(iter(self._holdings[greediest].names)))
        if not self._fits_beside_what_left(num_bytes):
            self._let_go(frozenset(self._left))
        if not self._fits_beside_what_left(num_bytes):
            raise busy("sessions and passes need the room for adapters that were replaced")

    def _fits_beside_what_left(self, num_bytes: int) -> bool:
        return self._num_bytes + num_bytes + sum(self._left.values()) <= 2 * self._most_bytes
