"""What is kept of forward passes for the backward passes that follow, as far as there is room.

PyTorch keeps what each operator will need for its gradient: of a block, some fifty times its inputs. Whatever is not
kept is computed again from the inputs of the block, which are always kept, or the pass, which the client has.
"""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Set
from dataclasses import dataclass, field

import torch

from shoal.model.body import Body
from shoal.model.peft.block_adapters import BlockAdapter
from shoal.server.training.pass_blocks import PassBlocks


@dataclass
class BlockActivations:
    """One block of one pass: what went in, and what came out with all that its gradient needs, if that is kept."""

    entered_BTD: torch.Tensor
    left_BTD: torch.Tensor | None
    num_bytes: int

    def forget(self) -> None:
        """Keep only what went in."""
        self.left_BTD, self.num_bytes = None, self.entered_BTD.nbytes


class ByteBudget:
    """How much may be kept. It is taken on the compute thread, and may be given back on another."""

    def __init__(self, most_bytes: int) -> None:
        self.num_bytes = 0  # that are taken
        self._most_bytes = most_bytes
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> bool:
        """Whether there was room."""
        with self._lock:
            fits = self.num_bytes + num_bytes <= self._most_bytes
            self.num_bytes += num_bytes * fits
            return fits

    def release(self, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes -= num_bytes


@dataclass(eq=False)
class SavedActivations:
    """What one pass has computed so far, block after block."""

    blocks: PassBlocks
    room: ByteBudget
    graphs: list[BlockActivations] = field(default_factory=list)
    is_dropped: bool = False
    is_complete: bool = True  # whether there was room for what went in, everywhere
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, graph: BlockActivations) -> None:
        """Keep what went into a block and, if there is room, what its gradient needs.

        Who goes back at once needs the former in any case; who comes later must not find more than there is room for.
        """
        with self._lock:  # it may be dropped just now, on another thread
            if self.is_dropped or not self.room.take(graph.num_bytes):
                graph.forget()
                if self.is_dropped or not self.room.take(graph.num_bytes):
                    graph.num_bytes, self.is_complete = 0, False
            self.graphs.append(graph)

    def pop(self) -> BlockActivations:
        """The last block that is left; it is for the caller to compute with, at once."""
        graph = self.graphs.pop()
        self.room.release(graph.num_bytes)
        return graph

    def drop(self) -> None:
        """Nobody is going to ask for it. May be called twice."""
        with self._lock:
            self.is_dropped = True
        with contextlib.suppress(IndexError):
            while True:
                self.pop()


class ActivationStore:
    """The passes that are kept, each for the client who made it and under the id that he gave it.

    Those that nobody has asked for in a long time go when another begins, which may need their room.
    """

    def __init__(self, body: Body, *, most_bytes: int, seconds: float) -> None:
        self.weights = frozenset(parameter.untyped_storage().data_ptr() for parameter in body.parameters())
        self.room = ByteBudget(most_bytes)
        self._seconds = seconds
        self._clock = asyncio.get_running_loop().time
        self._activations: dict[tuple[str, str], tuple[float, SavedActivations]] = {}

    def new(self, blocks: PassBlocks) -> SavedActivations:
        """What a pass that comes now is to be kept in."""
        now = self._clock()
        for key, (since, old) in list(self._activations.items()):
            if now - since > self._seconds:
                old.drop()
                del self._activations[key]
        return SavedActivations(blocks, self.room)

    def keep(self, peer: str, name: str, kept: SavedActivations) -> None:
        """A pass is to be kept, in place of one that had its name."""
        if (namesake := self.take(peer, name)) is not None:
            namesake.drop()
        self._activations[peer, name] = self._clock(), kept

    def take(self, peer: str, name: str) -> SavedActivations | None:
        """A pass that this client has made, once."""
        found = self._activations.pop((peer, name), None)
        return None if found is None else found[1]

    def release(self, peer: str) -> None:
        """A client is gone."""
        for key in [key for key in self._activations if key[0] == peer]:
            self._activations.pop(key)[1].drop()

    def drop_adapters(self, adapters: Collection[BlockAdapter]) -> None:
        """Keep nothing that was computed with these."""
        for key, (_, kept) in list(self._activations.items()):
            if any(adapter in adapters for adapter in kept.blocks.adapters.values()):
                self._activations.pop(key)[1].drop()


@contextlib.contextmanager
def counting_saved_bytes(weights: Set[int]) -> Iterator[Callable[[], int]]:
    """What autograd keeps meanwhile: how many bytes that takes beside the weights."""
    sizes: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an operator that saves its own output would keep itself, where no gc sees it

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield lambda: sum(sizes.values())
