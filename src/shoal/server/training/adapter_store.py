"""The adapters that clients have sent and that the operator hosts, found by the digests of their contents."""

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
from shoal.server.refusals import busy, misrouted, moved, rejected
from shoal.server.step_inputs import Tensors
from shoal.spans import Span

LAYER_BYTES = 32 * 1024
"""What counts for each of PEFT's layers beside its factors: 26 KB were measured, more than many factors take."""
OPERATOR = "operator"
"""The holder of hosted adapters. It is no peer's id."""
POPULAR = "popular"
"""The holder of popular adapters whose clients are gone. It is no peer's id."""
MIN_POPULAR_USERS = 2
"""A shared adapter is popular if at least this many clients have used it."""
MAX_COUNTED_ADAPTERS = 256
"""How many shared adapters the server counts the users of: it bounds the memory of adapters that are gone."""


class MissingFromCache(Exception):
    """The client has to send something again: the adapters of these names, or the inputs of a pass.

    `activations` says that the activations of the pass are gone, `inputs` that what was pushed is of no use.
    """

    def __init__(self, *, adapters: tuple[str, ...] = (), activations: bool = False, inputs: bool = False) -> None:
        super().__init__("the server does not have it any more")
        self.adapters = adapters
        self.activations = activations
        self.inputs = inputs


@dataclass
class _Entry:
    """An adapter of one block: the bytes that it counts for, the name under which it is shared, and its holders."""

    adapter: BlockAdapter
    block: int
    num_bytes: int
    shared: str | None = None
    holders: set[str] = field(default_factory=set)


@dataclass
class _ClientHolding:
    """The names of one client's adapters, the most recently used last, and their bytes."""

    names: OrderedDict[str, None] = field(default_factory=OrderedDict)
    num_bytes: int = 0


class AdapterStore:
    """At most `max_bytes` bytes of clients' adapters.

    When a new adapter does not fit, the client that holds most loses its least recently used one. Hosted adapters stay,
    and do not count. Shared adapters that are popular stay after their clients are gone, until another client needs
    their memory.

    A removed adapter stays in memory while a session or a pass computes with it. The store and the removed adapters
    together take at most twice `max_bytes`: before the store refuses a new adapter as busy, it calls `drop_adapters`
    with the removed ones, to drop what can be computed again.
    """

    def __init__(
        self, body: Body, *, max_bytes: int, drop_adapters: Callable[[Collection[BlockAdapter]], None]
    ) -> None:
        self._body = body
        self._max_bytes = max_bytes
        self._drop_adapters = drop_adapters
        self._num_bytes = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # the most recently used last
        self._holdings: defaultdict[str, _ClientHolding] = defaultdict(_ClientHolding)
        self._removed: WeakKeyDictionary[BlockAdapter, int] = WeakKeyDictionary()  # their bytes
        self._users: OrderedDict[str, set[str]] = OrderedDict()  # of shared adapters, the most recently used last

    @property
    def num_bytes(self) -> int:
        """How many bytes the adapters that clients have sent take."""
        return self._num_bytes

    @property
    def names(self) -> Collection[str]:
        """The names of all adapters in the store, hosted ones too."""
        return self._entries.keys()

    @property
    def announced(self) -> tuple[str, ...]:
        """At most `MAX_HOSTED_ADAPTERS` names of shared adapters that clients need not send, the hosted ones first."""
        shared = [entry for entry in self._entries.values() if entry.shared is not None]
        hosted = [entry.shared for entry in shared if OPERATOR in entry.holders]
        popular = [entry.shared for entry in reversed(shared) if self._is_popular(entry)]
        return tuple(dict.fromkeys(name for name in (*hosted, *popular) if name is not None))[:MAX_HOSTED_ADAPTERS]

    def _is_popular(self, entry: _Entry) -> bool:
        return entry.shared is not None and len(self._users.get(entry.shared, ())) >= MIN_POPULAR_USERS

    def host(self, factors: AdapterFactors) -> None:
        """Hold an adapter for all clients while the server runs. Raises `Refused` if it does not fit its block."""
        adapter = self._make_adapter(factors.block, factors.layers, factors.values, factors.name)
        entry = self._entries.setdefault(factors.name, _Entry(adapter, factors.block, 0, factors.hosted))
        entry.holders.add(OPERATOR)

    async def store(self, peer: str, request: Adapter, tensors: Tensors) -> str:
        """Hold an adapter that a client sends. Returns its name.

        Raises `Refused` if it is no adapter of a block of this server or too large, and as busy while removed
        adapters that are still in use leave no memory.
        """
        values_N = tensors.get("factors")
        if request.block not in self._body.span:
            raise moved(f"this server holds blocks {self._body.span}, not block {request.block}")
        if values_N is None or values_N.dim() != 1 or not values_N.is_floating_point():
            raise rejected("the factors of an adapter must be floating-point numbers of shape [N]")
        num_bytes = values_N.nbytes + len(request.layers) * LAYER_BYTES
        if num_bytes > self._max_bytes:
            raise misrouted(f"an adapter of {num_bytes} bytes; this server has room for {self._max_bytes}")
        # PEFT needs two milliseconds to make a layer, and a thread starts in a tenth of one.
        adapter = await asyncio.to_thread(alone, lambda: self._read(request, values_N))
        if request.replaces is not None and request.replaces != adapter.name:
            self._release(peer, request.replaces)
        if adapter.name not in self._entries:
            self._make_room(num_bytes)
            self._removed.pop(adapter, None)  # it may have been removed while it was read
            self._entries[adapter.name] = _Entry(adapter, request.block, num_bytes, request.shared)
            self._num_bytes += num_bytes
        self._use(peer, adapter.name)
        return adapter.name

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
            if len(users) < MIN_POPULAR_USERS:
                users.add(peer)
            self._users.move_to_end(entry.shared)
            if len(self._users) > MAX_COUNTED_ADAPTERS:
                self._users.popitem(last=False)

    def _hold(self, holder: str, name: str) -> None:
        entry, holding = self._entries[name], self._holdings[holder]
        if holder not in entry.holders:
            entry.holders.add(holder)
            holding.names[name] = None
            holding.num_bytes += entry.num_bytes

    def _read(self, request: Adapter, values_N: torch.Tensor) -> BlockAdapter:
        if not torch.isfinite(values_N).all():
            raise rejected("the factors of an adapter must be finite")
        name = factors_name(request.block, request.layers, values_N)
        if (entry := self._entries.get(name)) is not None:
            return entry.adapter
        return self._make_adapter(request.block, request.layers, values_N, name)

    def _make_adapter(self, block: int, layers: Sequence[Layer], values_N: torch.Tensor, name: str) -> BlockAdapter:
        backbone = self._body.backbone
        values_N, hidden_size = values_N.to(backbone.device), backbone.config.hidden_size
        try:
            return BlockAdapter(self._body.block(block), layers, values_N, name=name, hidden_size=hidden_size)
        except ValueError as error:
            raise rejected(str(error)) from None

    def of(self, peer: str, request: Open | Forward | Backward, span: Span) -> dict[int, BlockAdapter]:
        """The adapters that a request names, by block.

        Raises `MissingFromCache` if the store lacks some, and `Refused` if one is another block's.
        """
        wanted = {block: name for block, name in zip(span, request.adapters, strict=False) if name is not None}
        if missing := [name for name in wanted.values() if name not in self._entries]:
            raise MissingFromCache(adapters=tuple(dict.fromkeys(missing)))
        for block, name in wanted.items():
            entry = self._entries[name]
            if entry.block != block:
                raise rejected(f"the adapter for block {block} is one of block {entry.block}")
            self._use(peer, name)
        return {block: self._entries[name].adapter for block, name in wanted.items()}

    def release(self, peer: str) -> None:
        """A client is gone. Its adapters are removed, unless another client holds them too or they are popular."""
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
            self._removed[entry.adapter] = entry.num_bytes

    def _make_room(self, num_bytes: int) -> None:
        """Remove adapters until `num_bytes` more fit. Raises `Refused` if removed ones in use leave no memory."""
        while self._num_bytes + num_bytes > self._max_bytes:
            largest = max(self._holdings, key=lambda holder: self._holdings[holder].num_bytes)
            self._release(largest, next(iter(self._holdings[largest].names)))
        if not self._fits_with_removed(num_bytes):
            self._drop_adapters(frozenset(self._removed))
        if not self._fits_with_removed(num_bytes):
            raise busy("sessions and passes still use adapters that were replaced, and no memory is left")

    def _fits_with_removed(self, num_bytes: int) -> bool:
        return self._num_bytes + num_bytes + sum(self._removed.values()) <= 2 * self._max_bytes

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless the sums of bytes are those of the adapters in the store."""
        assert self._num_bytes == sum(entry.num_bytes for entry in self._entries.values()) <= self._max_bytes
        held: dict[str, int] = defaultdict(int)
        for entry in self._entries.values():
            for holder in entry.holders - {OPERATOR}:
                held[holder] += entry.num_bytes
        assert {holder: each.num_bytes for holder, each in self._holdings.items()} == held
