"""The adapters that clients have sent: kept for them while they are here, and found by the names of their contents."""

from __future__ import annotations

import asyncio
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from shoal.model.adapters import BlockAdapter, name_of
from shoal.model.body import Body
from shoal.protocol import Adapter, Backward, Forward, Open
from shoal.server.executor import alone
from shoal.server.refusal import Tensors, misrouted, rejected
from shoal.spans import Span

ASIDE_BYTES = 1 << 20
"""Factors of so many bytes take long enough to be read that others should not wait for it."""


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
    holders: set[str] = field(default_factory=set)


class Adapters:
    """At most so many bytes of them. Whoever holds most loses first what he has not used for longest."""

    def __init__(self, body: Body, *, most_bytes: int) -> None:
        self._body = body
        self._most_bytes = most_bytes
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # those used last at the end

    @property
    def num_bytes(self) -> int:
        return sum(entry.adapter.nbytes for entry in self._entries.values())

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
        entry = self._entries.setdefault(adapter.name, _Entry(adapter, request.block))
        entry.holders.add(peer)
        self._entries.move_to_end(adapter.name)
        self._make_room()

    def _read(self, request: Adapter, values_N: torch.Tensor) -> BlockAdapter:
        if not torch.isfinite(values_N).all():
            raise rejected("factors that are not finite")
        name = name_of(request.block, request.layers, values_N)
        if (entry := self._entries.get(name)) is not None:
            return entry.adapter
        block, backbone = self._body.block(request.block), self._body.backbone
        try:
            return BlockAdapter(
                block,
                request.layers,
                values_N.to(backbone.device),
                name=name,
                hidden_size=backbone.config.hidden_size,
            )
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
            entry.holders.add(peer)
            self._entries.move_to_end(name)
        return {block: self._entries[name].adapter for block, name in wanted.items()}

    def release(self, peer: str) -> None:
        """A client is gone: what nobody else holds is forgotten."""
        for name in list(self._entries):
            self._release(peer, name)

    def _release(self, peer: str, name: str) -> None:
        if (entry := self._entries.get(name)) is not None:
            entry.holders.discard(peer)
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
            for peer in entry.holders:
                held[peer] = held.get(peer, 0) + entry.adapter.nbytes
        return held
